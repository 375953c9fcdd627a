"""A whole model with and without sleepkern: what it is, whether both agree, and what is timed of it."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..integrations.caches import cache_in, cache_name
from ..integrations.transformers import patch
from ..rules import GATED_DELTA_RULE, Rule
from ..testing import Shape
from .block_cases import Prepared
from .model_calls import ALL, decoding, prefill

MODEL = (
    "Qwen3-Next of transformers with random weights. True: its code, the layer pattern (3 linear, "
    "1 full attention), the heads (linear attention 16 key and 32 value heads of 128, attention "
    "head 256, convolution 4). Shrunk: 4 of 48 layers, hidden size 256 of 2048, 8 experts of 64 of "
    "which 2 a token (of 512 experts of 512, 10 a token), 2 of 16 attention heads, 256 tokens "
    "(bytes) of 151936. So the recurrence takes a larger share of the time than in the model of "
    "true size. Decay is set slow (about 160 tokens), or random gates would forget within a token."
)
CLOSE = 1e-5
"""Largest difference of logits, over the largest logit, up to which both models count as the same."""
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


@dataclass(frozen=True)
class ModelCase:
    """One thing to time of the model that MODEL describes.

    op         read: a forward of `tokens` tokens into an empty cache; generate: `generated` tokens one by one, greedy,
               after `tokens`
    tokens     of the text
    generated  of generate; the check of either generates as many
    threads    None, the bench's own
    """

    op: Literal["read", "generate"]
    tokens: int
    generated: int = 16
    threads: None = None

    tolerance = CLOSE
    passes = 1

    @property
    def rule(self) -> Rule:
        """The name of its recurrence."""
        return GATED_DELTA_RULE

    @property
    def dtype(self) -> torch.dtype:
        """The type of its weights."""
        return torch.float32

    @property
    def name(self) -> str:
        """Unique, e.g. "model read T=2048"."""
        return f"model {self.op} T={self.tokens}" + (f" +{self.generated}" if self.op == "generate" else "")

    @property
    def shape(self) -> Shape:
        """The sizes of the recurrence in its linear attention."""
        return Shape(T=self.tokens if self.op == "read" else 1, H=16, HV=32, K=128, V=128)

    @property
    def timed_tokens(self) -> int:
        """Tokens of a call."""
        return self.tokens if self.op == "read" else self.generated

    @property
    def flops(self) -> None:
        """None: the operations of a whole model are not counted."""
        return None

    def quietly(self) -> AbstractContextManager[Any]:
        """Silence the advice of transformers."""
        return quiet_transformers()

    def prepare(self, quick: bool) -> Prepared:
        """Patched, and stock as the peer whose logits and tokens it has to have."""
        model = hybrid_model()
        error = check(model, self)
        if not error <= CLOSE:
            return Prepared({}, {"ours": error})
        patched, stock = calls(model, self)
        return Prepared({"ours": patched, "transformers": stock}, {"ours": error, "transformers": 0.0})


class Session(NamedTuple):
    """One reading of a text and the greedy continuation of it."""

    read_seconds: float
    generate_seconds: float
    logits: Tensor  # [T + generated, vocabulary]: of the text, then of each generated token
    generated: Tensor  # [generated]


def hybrid_model() -> nn.Module:
    """The model that MODEL describes; its weights are the same each time."""
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = Qwen3NextForCausalLM(Qwen3NextConfig(**_SIZES))
    slow_decay(model)
    return model.eval()


@torch.no_grad()
def slow_decay(model: nn.Module) -> None:
    """Let a model of random weights remember about 160 tokens; random gates would forget within a token."""
    for name, parameter in model.named_parameters():  # g = -exp(A_log) softplus(a + dt_bias), a ~ 0
        if name.endswith("A_log"):
            parameter.fill_(-3.0)
        elif name.endswith("dt_bias"):
            parameter.fill_(-2.0)


def sessions(model: nn.Module, ids: Tensor, generated: int) -> tuple[Session, Session]:
    """(stock, patched), one right after the other, so that both see the machine in one state; ids [1,T]."""
    stock = _session(model, ids, generated)
    with patch():
        return stock, _session(model, ids, generated)


def difference(stock: Session, patched: Session) -> dict[str, Any]:
    """How far the logits lie apart, as far as both generated the same, and whether that is to the end."""
    generated = len(stock.generated)
    same = int((stock.generated == patched.generated).int().cumprod(0).sum())
    known = len(stock.logits) - generated + same  # logits that came of the same tokens
    apart = float((patched.logits[:known] - stock.logits[:known]).abs().max())
    return {
        "max_logit_difference": apart,
        "relative_logit_difference": apart / float(stock.logits[:known].abs().max()),
        "same_tokens": same == generated,
    }


def check(model: nn.Module, case: ModelCase) -> float:
    """Relative difference of the logits of stock and patched; infinite when they generate other tokens."""
    found = difference(*sessions(model, _text(case.tokens), case.generated))
    return float(found["relative_logit_difference"]) if found["same_tokens"] else float("inf")


def calls(model: nn.Module, case: ModelCase) -> tuple[Callable[[], None], Callable[[], None]]:
    """(patched, stock): what is timed of each."""
    work = _reading if case.op == "read" else _generating
    with patch():
        patched = work(model, case)

    def ours() -> None:
        with patch():
            patched()

    return ours, work(model, case)


def _reading(model: nn.Module, case: ModelCase) -> Callable[[], Any]:
    return partial(prefill, model, _text(case.tokens), ALL)


def _generating(model: nn.Module, case: ModelCase) -> Callable[[], None]:
    return decoding(model, _text(case.tokens), case.generated)


def _text(tokens: int) -> Tensor:
    return torch.randint(256, (1, tokens), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def _session(model: nn.Module, ids: Tensor, generated: int) -> Session:
    start = time.perf_counter()
    out = model(ids, use_cache=True)
    read = time.perf_counter()
    name, cache = cache_name(model), cache_in(out)
    logits, tokens = [out.logits[0]], []
    for _ in range(generated):
        tokens.append(out.logits[:, -1:].argmax(-1))
        out = model(tokens[-1], **{name: cache}, use_cache=True)
        logits.append(out.logits[0])
    end = time.perf_counter()
    return Session(read - start, end - read, torch.cat(logits), torch.cat(tokens, dim=1)[0])


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence the bars of transformers, and its advice to install packages for speed, which comes once a function."""
    from transformers.utils import logging as advice

    before, bars = advice.get_verbosity(), advice.is_progress_bar_enabled()
    advice.set_verbosity(logging.ERROR)
    advice.disable_progress_bar()
    try:
        yield
    finally:
        advice.set_verbosity(before)
        if bars:
            advice.enable_progress_bar()
