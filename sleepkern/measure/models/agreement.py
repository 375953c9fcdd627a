"""The comparison of a model with and without the patch.

Both read the same tokens and take the same experts: a router whose scores differ by a rounding picks another expert now
and then, and everything after that token differs.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...integrations import fallback
from ...integrations.caches import cache_in, cache_name
from ...integrations.transformers import patch
from ...testing import TOLERANCE, relative_error
from ..model_calls import prefill

STEPS = 8
"""Tokens after the prompt whose logits are compared."""
MOST_LOGITS = 1 << 24
"""The most values of logits that are compared. Of a prompt with more, the last tokens are."""
AS_STOCK = 2.0
"""The largest ratio of the patched model's error to that of stock, both against a wider type."""
MOST_TOLERANCE = 0.2
"""The largest error against a wider type, whatever that of stock is. Logits of zeros alone have the error 1."""


class Agreement(NamedTuple):
    """Errors of the logits, the largest that counts as right, and why calls went to the original functions."""

    error: float
    stock_error: float | None
    tolerance: float
    left: tuple[str, ...]


def agreement(model: nn.Module, ids: Tensor) -> Agreement:
    """Compare a model with and without the patch on ids [B,T] and STEPS tokens after them.

    The difference counts, up to the tolerance of the type. A deep model makes more of a rounding, in whichever code; so
    where the difference is larger, both results are compared with those of the same weights in a wider type.
    """
    tolerance, choices = TOLERANCE[next(model.parameters()).dtype], list[Tensor]()
    with same_choices(choices, record=True):
        stock, tokens = _logits(model, ids)
    with patch(model), same_choices(choices), reasons() as left:
        ours, _ = _logits(model, ids, tokens)
    error, stock_error = relative_error(ours, stock), None
    if not error <= tolerance:
        expected = wider_logits(model, ids, tokens, choices)
        error, stock_error = relative_error(ours, expected), relative_error(stock, expected)
        tolerance = max(tolerance, min(AS_STOCK * stock_error, MOST_TOLERANCE))
    return Agreement(error, stock_error, tolerance, tuple(dict.fromkeys(left)))


def wider_logits(model: nn.Module, ids: Tensor, tokens: list[Tensor], choices: list[Tensor]) -> Tensor:
    """The logits of a stock copy of the model in float64, or in float32 for a model of a shorter type."""
    short = next(model.parameters()).dtype != torch.float32
    copied: Any = copy.deepcopy(model).to(torch.float32 if short else torch.float64)
    if hasattr(copied, "set_experts_implementation"):  # the default one multiplies no float64
        copied.set_experts_implementation("eager")
    with same_choices(choices):
        return _logits(copied, ids, tokens)[0]


@torch.no_grad()
def _logits(model: nn.Module, ids: Tensor, tokens: list[Tensor] | None = None) -> tuple[Tensor, list[Tensor]]:
    """Logits [B,n,vocabulary] of the prompt's last tokens and of those after it, and these tokens [B,1], or greedy."""
    vocabulary: Any = model.get_output_embeddings()  # type: ignore[operator]
    kept = max(1, min(ids.shape[1], MOST_LOGITS // (ids.shape[0] * vocabulary.weight.shape[0])))
    out = prefill(model, ids, kept)
    name, cache = cache_name(model), cache_in(out)
    found, made = [out.logits[:, -kept:].float()], []
    for i in range(STEPS):
        made.append(found[-1][:, -1:].argmax(-1) if tokens is None else tokens[i])
        out = model(input_ids=made[-1], **{name: cache}, use_cache=True)
        found.append(out.logits[:, -1:].float())
    return torch.cat(found, dim=1), made


@contextlib.contextmanager
def same_choices(indices: list[Tensor], record: bool = False) -> Iterator[None]:
    """Let `topk` record the indices that it picks, or pick the recorded ones, call by call."""
    function, method = torch.topk, torch.Tensor.topk
    left = iter(list(indices))

    def topk(x: Tensor, k: int, dim: int = -1, *arguments: Any, **options: Any) -> Any:
        if record:
            found = function(x, k, dim, *arguments, **options)
            indices.append(found.indices)
            return found
        picked, expected = next(left, None), list(x.shape)
        expected[dim] = k
        if picked is None or list(picked.shape) != expected:
            return function(x, k, dim, *arguments, **options)
        return torch.return_types.topk((x.gather(dim, picked), picked))

    torch.topk = topk  # type: ignore[assignment]
    torch.Tensor.topk = topk  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.topk = function
        torch.Tensor.topk = method  # type: ignore[method-assign]


@contextlib.contextmanager
def reasons() -> Iterator[list[str]]:
    """The reasons, in the debug log, why calls of a patched model went to the original functions."""
    found: list[str] = []

    class _Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.args:
                found.append(str(record.args[0] if isinstance(record.args, tuple) else record.args))

    handler, level, on = _Handler(), fallback.logger.level, fallback.logger.propagate
    fallback.logger.addHandler(handler)
    fallback.logger.setLevel(logging.DEBUG)
    fallback.logger.propagate = False
    try:
        yield found
    finally:
        fallback.logger.removeHandler(handler)
        fallback.logger.setLevel(level)
        fallback.logger.propagate = on
