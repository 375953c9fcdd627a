"""The drop-in at work: a Qwen3-Next-shaped model reads and writes bytes, stock and patched."""

from __future__ import annotations

import contextlib
import logging
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..integrations.transformers import patch

MODEL = (
    "Qwen3-Next of transformers with random weights. True: its code, the layer pattern (3 linear, "
    "1 full attention), the heads (linear attention 16 key and 32 value heads of 128, attention "
    "head 256, convolution 4). Shrunk: 4 of 48 layers, hidden size 256 of 2048, 8 experts of 64 of "
    "which 2 a token (of 512 experts of 512, 10 a token), 2 of 16 attention heads, 256 tokens "
    "(bytes) of 151936. So the recurrence takes a larger share of the time than in the model of "
    "true size. Decay is set slow (about 160 tokens), or random gates would forget within a token."
)
_GENERATED = 32
_REPEATS = 3
_SIZES: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "eos_token_id": None,
}


class _Session(NamedTuple):
    """One reading of the text and the greedy continuation of it."""

    read_seconds: float
    generate_seconds: float
    logits: Tensor  # [T + _GENERATED, 256]: of the text, then of each generated token
    generated: Tensor  # [_GENERATED]


def run_dropin(text: bytes, progress: Callable[[str], None] | None = None, tokens: int = 1024) -> dict[str, Any]:
    """Time a model with and without the patch on the same bytes, in turns, with torch's threads.

    Args:
        text: what the model reads, one token a byte; its first `tokens` bytes.
        progress: called with a line of text before each part.
        tokens: bytes to read, >= 1.

    Returns:
        tokens, generated_tokens: how many were read and generated;
        model: what the model is, and what was shrunk;
        read_tokens_per_second, generate_tokens_per_second: {"stock": .., "patched": ..}, medians
            of three;
        max_logit_difference: largest |patched - stock|;
        relative_logit_difference: the same over the largest |stock|;
        same_tokens: whether both generated the same bytes (logits are compared as far as they did).

    Raises:
        ImportError: transformers is not installed.
        ValueError: no bytes to read.
    """
    if not text or tokens < 1:
        raise ValueError(f"text: got {len(text)} bytes, {tokens} to read; expected at least 1")
    say = progress or (lambda line: None)
    with quiet_transformers():
        say("building the model")
        model = hybrid_model()
        ids = torch.tensor([list(text[:tokens])])
        _sessions(model, ids[:, :64])  # warm up
        pairs = []
        for i in range(_REPEATS):
            say(f"reading {ids.shape[1]} bytes, generating {_GENERATED}: {i + 1} of {_REPEATS}")
            pairs.append(_sessions(model, ids))
    return {
        "tokens": ids.shape[1],
        "generated_tokens": _GENERATED,
        "model": MODEL,
        "read_tokens_per_second": _rates(pairs, ids.shape[1], "read_seconds"),
        "generate_tokens_per_second": _rates(pairs, _GENERATED, "generate_seconds"),
        **_difference(*pairs[0]),
    }


def hybrid_model() -> nn.Module:
    """What MODEL describes; the same weights each time."""
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = Qwen3NextForCausalLM(Qwen3NextConfig(**_SIZES))
    for name, parameter in model.named_parameters():  # g = -exp(A_log) softplus(a + dt_bias), a ~ 0
        if name.endswith("A_log"):
            nn.init.constant_(parameter, -3.0)
        elif name.endswith("dt_bias"):
            nn.init.constant_(parameter, -2.0)
    return model.eval()


def _sessions(model: nn.Module, ids: Tensor) -> tuple[_Session, _Session]:
    """(stock, patched), one right after the other, so that both see the machine in one state."""
    stock = _session(model, ids)
    with patch():
        return stock, _session(model, ids)


@torch.no_grad()
def _session(model: nn.Module, ids: Tensor) -> _Session:
    start = time.perf_counter()
    out = model(ids, use_cache=True)
    read = time.perf_counter()
    logits, generated = [out.logits[0]], []
    for _ in range(_GENERATED):
        generated.append(out.logits[:, -1:].argmax(-1))
        out = model(generated[-1], past_key_values=out.past_key_values, use_cache=True)
        logits.append(out.logits[0])
    end = time.perf_counter()
    return _Session(read - start, end - read, torch.cat(logits), torch.cat(generated, dim=1)[0])


def _rates(pairs: list[tuple[_Session, _Session]], tokens: int, seconds: str) -> dict[str, float]:
    return {
        side: tokens / statistics.median(getattr(pair[i], seconds) for pair in pairs)
        for i, side in enumerate(("stock", "patched"))
    }


def _difference(stock: _Session, patched: _Session) -> dict[str, Any]:
    same = int((stock.generated == patched.generated).int().cumprod(0).sum())
    known = len(stock.logits) - _GENERATED + same  # logits that came of the same tokens
    difference = float((patched.logits[:known] - stock.logits[:known]).abs().max())
    return {
        "max_logit_difference": difference,
        "relative_logit_difference": difference / float(stock.logits[:known].abs().max()),
        "same_tokens": same == _GENERATED,
    }


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without its advice, once a function, to install packages for speed."""
    from transformers.utils import logging as advice

    before = advice.get_verbosity()
    advice.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        advice.set_verbosity(before)
