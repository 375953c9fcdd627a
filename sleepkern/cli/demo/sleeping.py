"""The model of the patch demo sleeps over a long text with several N, in memory that does not grow."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...integrations.caches import cache_in
from ...integrations.transformers import patch
from ...measure.model_cases import hybrid_model, quiet_transformers

WINDOW = 512
PASSES = (1, 2, 4)
TOKENS = 8192


def run_sleep(
    text: bytes, progress: Callable[[str], None] | None = None, tokens: int = TOKENS, window: int = WINDOW
) -> dict[str, Any]:
    """A model sleeps over a text with N = 1, 2 and 4, with torch's threads.

    Args:
        text: the bytes to read, one token a byte, repeated up to `tokens`.
        progress: called with a line of text before each part.
        tokens: tokens to read, at least two windows.
        window: tokens between two sleeps.

    Returns:
        tokens, window;
        rows: for each N passes, tokens_per_second, memory_bytes (of the session, after a quarter of the text and at its
            end), overhead (of a sleep over N plain forwards of the blocks on the same window, one after the other;
            median);
        kept_bytes: size of the keys and values of the whole text.

    Raises:
        ImportError: transformers is not installed.
        ValueError: no bytes to read, or fewer than two windows.
    """
    if not text or tokens < 2 * window:
        raise ValueError(f"text: got {len(text)} bytes, {tokens} to read; expected at least 1, and {2 * window}")
    say = progress or (lambda line: None)
    with quiet_transformers(), patch(), torch.no_grad():
        say("building the model")
        model = hybrid_model()
        ids = torch.tensor([list((text * (tokens // len(text) + 1))[:tokens])])
        rows = []
        for passes in PASSES:
            say(f"sleeping over {tokens} bytes, N = {passes}")
            rows.append(_slept(model, ids, window, passes))
        kept = sum(_bytes(x.keys) + _bytes(x.values) for x in _plain(model, ids[:, :window])[1].layers[3::4])
    return {"tokens": tokens, "window": window, "rows": rows, "kept_bytes": kept * tokens // window}


def _plain(model: Any, ids: Tensor) -> tuple[float, Any]:
    """Seconds of a forward of the blocks over a window, and its cache."""
    began = time.perf_counter()
    cache = cache_in(model.model(ids, use_cache=True))
    return time.perf_counter() - began, cache


def _slept(model: nn.Module, ids: Tensor, window: int, passes: int) -> dict[str, Any]:
    from ...sleep import SleepSession

    session, memory, ratios = SleepSession(model, window, passes), [], []
    for part in ids.split(window, dim=1):
        plain, _ = _plain(model, part)
        session.ingest(part)
        memory.append(sum(map(_bytes, session.state_dict().values())))
        ratios.append(session.reports[-1].seconds / (passes * plain))
    return {
        "passes": passes,
        "tokens_per_second": window / statistics.median(report.seconds for report in session.reports),
        "memory_bytes": [memory[len(memory) // 4], memory[-1]],
        "overhead": statistics.median(ratios) - 1,
    }


def _bytes(t: Tensor) -> int:
    return t.numel() * t.element_size()
