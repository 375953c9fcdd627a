"""A model of Qwen3-Next's shape reads and generates bytes, with and without the patch."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

from ...measure.model_cases import CLOSE, MODEL, Session, difference, hybrid_model, quiet_transformers, sessions

_GENERATED = 32
_REPEATS = 3


def run_patched_model(text: bytes, progress: Callable[[str], None] | None = None, tokens: int = 1024) -> dict[str, Any]:
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
        sessions(model, ids[:, :64], _GENERATED)  # warm up
        pairs = []
        for i in range(_REPEATS):
            say(f"reading {ids.shape[1]} bytes, generating {_GENERATED}: {i + 1} of {_REPEATS}")
            pairs.append(sessions(model, ids, _GENERATED))
    return {
        "tokens": ids.shape[1],
        "generated_tokens": _GENERATED,
        "model": MODEL,
        "read_tokens_per_second": _rates(pairs, ids.shape[1], "read_seconds"),
        "generate_tokens_per_second": _rates(pairs, _GENERATED, "generate_seconds"),
        **difference(*pairs[0]),
    }


def same_model(result: dict[str, Any]) -> bool:
    """Tells whether the bytes are the same and the logits differ by at most CLOSE, as in `bench`; NaN differs."""
    return bool(result["same_tokens"]) and result["relative_logit_difference"] <= CLOSE


def _rates(pairs: list[tuple[Session, Session]], tokens: int, seconds: str) -> dict[str, float]:
    return {
        side: tokens / statistics.median(getattr(pair[i], seconds) for pair in pairs)
        for i, side in enumerate(("stock", "patched"))
    }
