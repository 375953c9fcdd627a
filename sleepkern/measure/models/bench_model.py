"""`bench_model`: a hybrid model of transformers with and without the patch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...integrations.caches import cache_in
from ...integrations.transformers import patch
from ...integrations.transformers import patched as replaced_in
from ...testing import type_name
from ...testing.verify import Progress
from .. import timing
from ..environment import environment
from ..model_calls import cache_bytes, decoding, greedy, patched, prefill, prompts, sleeping
from ..model_cases import quiet_transformers
from .agreement import agreement
from .layers import layer_types
from .memory import peaks_apart
from .report import LengthRow, ModelReport, Phase, SleepCost
from .sources import ModelSource, build, find_model
from .wording import one_line

LENGTHS, QUICK_LENGTHS = (512, 2048), (512,)
PASSES = (1, 2, 4)
TYPES = (torch.float32, torch.bfloat16, torch.float16)
_STEPS, _QUICK_STEPS = 64, 16
_SETS = 3
"""Prompts to rotate through."""


@dataclass(frozen=True)
class _Settings:
    lengths: tuple[int, ...]
    batch: int
    dtype: torch.dtype
    threads: int
    device: str
    quick: bool

    @property
    def steps(self) -> int:
        return _QUICK_STEPS if self.quick else _STEPS

    def in_turns(self, candidates: dict[str, timing.Candidate]) -> dict[str, timing.Timing]:
        seconds, turns = (1.0, (2, 20)) if self.quick else (4.0, (3, 40))
        return timing.time_in_turns(candidates, self.device, seconds, turns, skip_slow=False)


def bench_model(
    model: str | Path,
    lengths: Sequence[int] | None = None,
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
    layers: int | None = None,
    threads: int = 1,
    device: str = "cpu",
    quick: bool = False,
    memory: bool = True,
    progress: Progress | None = None,
) -> ModelReport:
    """Measure a hybrid model of transformers with and without `sleepkern.patch`, and what a sleep over it costs.

    At each length the logits are compared first. Then prefill (T tokens into an empty cache) and decode (64 greedy
    tokens through the cache) are timed with and without the patch in turns, and sleeps with N = 1, 2 and 4 passes over
    one window of T tokens with the patch. A length whose logits are wrong gets no times. Nothing is downloaded.

    Args:
        model: a family of `sleepkern.patch`, such as "qwen3_next" or "mamba2", in sizes for a CPU; the path of a
            config.json of transformers; or of a folder that holds one. Weights are random, the same each time, unless
            the folder has safetensors. A family comes first: write "./mamba2" for a folder of that name.
        lengths: tokens T of a prompt, each at least 1. Default 512 and 2048; 512 when quick.
        batch: sequences at once, at least 1.
        dtype: of the weights: float32 (the default), bfloat16 or float16.
        layers: keep this many neighbouring layers, with a recurrence and attention among them if both fit; the weights
            are then random. Default 4 of a family, else all.
        threads: torch's threads, with and without the patch.
        device: "cpu" or "cuda".
        quick: fewer turns, and 16 tokens of a decode.
        memory: measure the peak memory too, on a CPU in processes of their own. A script that sets it guards its
            `__main__`, as multiprocessing's "spawn" wants.
        progress: called with (text, done, total).

    Returns:
        A ModelReport, with one LengthRow for each length.

    Raises:
        ImportError: transformers is not installed, or is too old for the family.
        ValueError: nothing of that name, no config of transformers, weights of another config, a model in which `patch`
            finds nothing to replace, or a length, batch, number of layers or threads, or type out of range.
    """
    lengths = tuple(lengths or (QUICK_LENGTHS if quick else LENGTHS))
    for name, values in (("lengths", lengths), ("batch", (batch,)), ("threads", (threads,))):
        for value in values:
            if value < 1:
                raise ValueError(f"{name}: got {value}; expected at least 1")
    if dtype not in TYPES:
        raise ValueError(f"dtype: got {dtype}; expected one of {', '.join(map(str, TYPES))}")
    settings = _Settings(tuple(dict.fromkeys(lengths)), batch, dtype, threads, device, quick)
    return _bench_source(find_model(str(model), layers), settings, memory, progress or (lambda *_: None))


def _bench_source(source: ModelSource, settings: _Settings, memory: bool, progress: Progress) -> ModelReport:
    """`bench_model` of a model that was found."""
    total = 3 * len(settings.lengths) + 3
    with quiet_transformers(), timing.threads(settings.threads):
        report = _without_memory(source, settings, progress, total)  # its model is gone when others are built
        if memory and report.passed:
            report = replace(report, rows=_with_memory(source, report.rows, settings, progress, total))
    progress("measured", total, total)
    return report


def _without_memory(source: ModelSource, settings: _Settings, progress: Progress, total: int) -> ModelReport:
    progress(f"building {source.class_name}", 0, total)
    model = build(source, settings.dtype, settings.device)
    _try_stock(model, source, settings)
    with patch(model):
        replaced = replaced_in(model)
    rows, left, no_sleep = [], list[str](), None
    for i, tokens in enumerate(settings.lengths):
        texts = prompts(source.text, settings.batch, tokens, 1 if settings.quick else _SETS, settings.device)
        progress(f"comparing the logits of {tokens} tokens", 3 * i + 1, total)
        found = agreement(model, texts[0])
        left += found.left
        row = LengthRow(tokens, found.error, found.stock_error, found.tolerance)
        if row.passed:
            progress(f"timing {tokens} tokens", 3 * i + 2, total)
            row = _timed(model, row, texts, settings)
            progress(f"sleeping over {tokens} tokens", 3 * i + 3, total)
            row, no_sleep = _slept(model, row, texts, settings)
        rows.append(row)
    return ModelReport(
        environment=environment(settings.device), model=source.name, class_name=source.class_name,
        parameters=source.parameters, layer_types=layer_types(source.text), weights=str(source.weights or "random"),
        batch=settings.batch, dtype=type_name(settings.dtype), decoded=settings.steps, replaced=replaced,
        left=tuple(dict.fromkeys(left)), no_sleep=no_sleep, rows=tuple(rows),
    )  # fmt: skip


def _try_stock(model: nn.Module, source: ModelSource, settings: _Settings) -> None:
    """Raise a ValueError where transformers itself cannot run the model, as it cannot run some without attention."""
    (ids,) = prompts(source.text, settings.batch, 2, device=settings.device)
    try:
        greedy(model, cache_in(prefill(model, ids)), ids[:, -1:], 1)
    except Exception as error:
        kinds = ", ".join(dict.fromkeys(kind for kind in layer_types(source.text) if kind)) or "one kind"
        raise ValueError(
            f"model: transformers itself fails on {source.name} with {len(layer_types(source.text))} layer(s) of "
            f"{kinds}: {one_line(error)}"
        ) from error


def _timed(model: nn.Module, row: LengthRow, texts: list[Tensor], settings: _Settings) -> LengthRow:
    """The row with the times of prefill and decode, and with the bytes of the cache."""
    reads = [partial(prefill, model, ids) for ids in texts]
    kv, recurrent = cache_bytes(cache_in(prefill(model, texts[0])))
    first = _phase(model, reads, settings.batch * row.tokens, settings)
    steps = [decoding(model, texts[0], settings.steps)]
    second = _phase(model, steps, settings.batch * settings.steps, settings)
    return replace(row, prefill=first, decode=second, kv_bytes=kv, recurrent_bytes=recurrent)


def _phase(model: nn.Module, calls: Sequence[Callable[[], Any]], tokens: int, settings: _Settings) -> Phase:
    candidates = {
        "stock": timing.Candidate(calls, settings.threads),
        "patched": timing.Candidate([patched(model, call) for call in calls], settings.threads),
    }
    found = settings.in_turns(candidates)
    stock, ours = found["stock"], found["patched"]
    turns = min(len(stock.samples), len(ours.samples))
    return Phase(tokens / stock.median, tokens / ours.median, timing.ratio(ours, stock), turns)


def _slept(model: nn.Module, row: LengthRow, texts: list[Tensor], settings: _Settings) -> tuple[LengthRow, str | None]:
    """The row with the costs of sleeps; and why there are none."""
    try:
        with patch(model):
            sleeping(model, texts[0][:, : min(4, row.tokens)], 2)()
    except (TypeError, ValueError, ImportError) as error:
        return row, " ".join(str(error).split())
    candidates = {
        str(passes): timing.Candidate(
            [patched(model, sleeping(model, ids, passes)) for ids in texts], settings.threads
        )
        for passes in PASSES
    }  # fmt: skip
    found = settings.in_turns(candidates)
    one = found[str(PASSES[0])]
    costs = tuple(SleepCost(n, found[str(n)].median, timing.ratio(one, found[str(n)])) for n in PASSES)
    return replace(row, sleep=costs), None


def _with_memory(
    source: ModelSource, rows: tuple[LengthRow, ...], settings: _Settings, progress: Progress, total: int
) -> tuple[LengthRow, ...]:
    """The rows with their peaks."""
    found = []
    for which, with_patch in (("without", False), ("with", True)):
        progress(f"memory {which} the patch", total - 2 + with_patch, total)
        shared = (source, settings.batch, settings.lengths, settings.steps, with_patch, settings.dtype)
        found.append(peaks_apart(*shared, settings.threads, settings.device))
    return tuple(
        replace(row, prefill=_peaks_of(row.prefill, stock[0], ours[0]), decode=_peaks_of(row.decode, stock[1], ours[1]))
        for row, stock, ours in zip(rows, *found, strict=True)
    )


def _peaks_of(phase: Phase | None, stock: int | None, ours: int | None) -> Phase | None:
    return None if phase is None else replace(phase, stock_peak_bytes=stock, patched_peak_bytes=ours)
