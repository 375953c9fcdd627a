"""Find the fastest plan of the Triton kernels on the current device, stage by stage.

The whole call is timed while one tile varies and the others stay as found so far; then the next stage. A candidate
that does not fit the device, or whose result is not that of the built-in plan, is left out. The result is plans for
the table of backends/triton/plan_table.py, with the device's capability in the key.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from ..backends import triton as backend
from ..backends.triton.plan import DECODE_LIMIT, padded
from ..backends.triton.plan_table import PLAIN_HOPPER, TABLE, Direction, Key, Tile, TilePlan
from ..backends.triton.ptxas import capability_of_plans
from ..ops.recurrence import explain
from ..rules import Rule
from ..testing import TOLERANCE, Shape, call, make_inputs, relative_error
from .candidates import PlanCandidate, first_plan, of_key, plan_in_table
from .timing import Candidate, time_in_turns

Progress = Callable[[str, int, int], None]
"""Called with (what is timed, how many are done, how many there are)."""

Options = Callable[[str, "Tile | None"], Sequence[Tile]]
"""The tiles to try for a stage beside the current one."""

STAGES: dict[Direction, tuple[str, ...]] = {
    "forward": ("chunk_factors", "state_pass"),
    "backward": ("chunk_factors", "state_pass", "state_pass_backward", "chunk_backward"),
}
CHUNKS = (16, 32, 64)
COLUMNS = (16, 32, 64)
WARPS = (2, 4, 8)
LOADS = (2, 3, 4)


def stages_of(shape: Shape, chunk: int, direction: Direction) -> tuple[str, ...]:
    """The stages whose tiles a call of this shape takes: one for a step and for a single chunk."""
    if shape.lengths is None and shape.T <= DECODE_LIMIT and direction == "forward":
        return ("decode",)
    return ("single_chunk",) if shape.lengths is None and shape.T <= chunk else STAGES[direction]


@dataclass(frozen=True)
class PlanTrial:
    """One candidate; seconds None where it did not run or was wrong, which `note` says."""

    key: Key
    stage: str
    plan: TilePlan
    seconds: float | None
    note: str = ""


def tune(
    rule: Rule,
    shape: Shape,
    dtype: torch.dtype,
    device: str = "cuda",
    chunks: Sequence[int] = CHUNKS,
    seconds: float = 0.2,
    progress: Progress | None = None,
    candidates: Sequence[PlanCandidate] | None = None,
) -> tuple[dict[Key, TilePlan], list[PlanTrial]]:
    """The fastest plan found for each direction of calls of this shape, and all that was tried.

    Args:
        chunks: rows of a chunk to try. seconds: how long a candidate is timed.
        candidates: the tiles to try, and no others; their chunks replace `chunks`.

    Raises:
        ValueError: the Triton backend cannot do these calls on this device.
    """
    inputs = make_inputs(rule, shape, dtype, device=device)
    problem = explain(rule, **inputs).problem
    if (reason := backend.why_not(problem)) is not None:
        raise ValueError(f"device: got {device!r}, which Triton's kernels cannot use: {reason}")
    capability = capability_of_plans(torch.cuda.get_device_capability()) if device == "cuda" else 0
    precision = backend.precision_of(problem)
    best: dict[Key, TilePlan] = {}
    trials: list[PlanTrial] = []
    for direction in STAGES:
        key = Key(capability, direction, precision, rule.gate == "channel", _width(shape.K))
        run = _runner(rule, inputs, direction)
        search = _Search(key, run, run(), TOLERANCE[dtype], device, seconds, trials, progress)
        fastest = float("inf")
        for start, options in _starts(key, shape, chunks, candidates):
            tuned, took = search.descend(start, stages_of(shape, start.chunk, direction), options)
            if took < fastest:
                best[key], fastest = tuned, took
    return best, trials


def _starts(
    key: Key, shape: Shape, chunks: Sequence[int], candidates: Sequence[PlanCandidate] | None
) -> Iterator[tuple[TilePlan, Options]]:
    """A plan to start from and the tiles to try, for each chunk."""
    if candidates is None:
        for chunk in (c for c in chunks if c <= 32 or key.capability != PLAIN_HOPPER):
            yield replace(plan_in_table(key), chunk=chunk), partial(_grid, key)
        return
    wanted = of_key(candidates, key, shape.HV)
    for chunk in sorted({plan_in_table(key).chunk, *(one.chunk for one in wanted)}):
        here = [one for one in wanted if one.chunk == chunk]
        yield first_plan(here, key, chunk), partial(_listed, here)


def _grid(key: Key, stage: str, current: Tile | None) -> list[Tile]:
    return list(_tiles(stage, key, current))


def _listed(candidates: Sequence[PlanCandidate], stage: str, current: Tile | None) -> list[Tile]:
    return [one.tile for one in candidates if one.stage == stage and one.tile != current]


class _Search:
    """Times plans of one key, and remembers what came out."""

    def __init__(
        self, key: Key, run: Callable[[], Sequence[Tensor]], expected: Sequence[Tensor], tolerance: float,
        device: str, seconds: float, trials: list[PlanTrial], progress: Progress | None,
    ) -> None:  # fmt: skip
        self.key, self.run, self.expected, self.tolerance = key, run, expected, tolerance
        self.device, self.seconds, self.trials, self.progress = device, seconds, trials, progress

    def descend(self, plan: TilePlan, stages: Sequence[str], options: Options) -> tuple[TilePlan, float]:
        """The best plan with this chunk, and its seconds (infinite where none ran)."""
        best = self._time("all", plan)
        for stage in stages:
            tiles = options(stage, getattr(plan, stage))
            for done, tile in enumerate(tiles):
                if self.progress is not None:
                    self.progress(f"{self.key.direction}, chunks of {plan.chunk}, {stage}", done, len(tiles))
                change: dict[str, Any] = {stage: tile}
                candidate = replace(plan, **change)
                took = self._time(stage, candidate)
                if took < best:
                    plan, best = candidate, took
        return plan, best

    def _time(self, stage: str, plan: TilePlan) -> float:
        with _plan_in_table(self.key, plan):
            try:
                worst = max(relative_error(a, b) for a, b in zip(self.run(), self.expected, strict=True))
            except Exception as error:  # compilers and drivers refuse in many types; a refusal is one row
                return self._note(PlanTrial(self.key, stage, plan, None, f"{type(error).__name__}: {str(error)[:120]}"))
            if not worst <= 2 * self.tolerance:
                return self._note(PlanTrial(self.key, stage, plan, None, f"differs by {worst:.1e}"))
            timing = time_in_turns({"plan": Candidate([self.run])}, self.device, self.seconds)["plan"]
        return self._note(PlanTrial(self.key, stage, plan, timing.median))

    def _note(self, trial: PlanTrial) -> float:
        self.trials.append(trial)
        return float("inf") if trial.seconds is None else trial.seconds


def _tiles(stage: str, key: Key, current: Tile | None) -> Iterator[Tile]:
    """Candidates for a stage: all of a small grid but the current one.

    State passes hold all key columns, and have two warps where there must be no warp-group products (ptxas.py).
    """
    scans = stage in ("state_pass", "state_pass_backward")
    keys = (key.width,) if scans or stage == "decode" else tuple(c for c in COLUMNS if c <= key.width)
    loads = LOADS if scans else (1,)
    warps = (2,) if scans and key.capability == PLAIN_HOPPER else WARPS
    for sizes in product(keys, COLUMNS, warps, loads):
        tile = Tile(*sizes)
        if tile != current:
            yield tile


@contextmanager
def _plan_in_table(key: Key, plan: TilePlan) -> Iterator[None]:
    before = TABLE.get(key)
    TABLE[key] = plan
    try:
        yield
    finally:
        if before is None:
            del TABLE[key]
        else:
            TABLE[key] = before


def _width(K: int) -> int:
    return min(width for width in (64, 128, 256) if padded(K) <= width)


def _runner(rule: Rule, inputs: dict[str, Any], direction: Direction) -> Callable[[], Sequence[Tensor]]:
    """A call, or the gradients of one whose forward is already done; both return their tensors."""
    if direction == "forward":

        def forward() -> Sequence[Tensor]:
            o, state = call(rule, inputs, backend.NAME)
            assert state is not None
            return o, state

        return forward
    leaves = {n: t.detach().requires_grad_() for n, t in inputs.items() if t is not None and n != "cu_seqlens"}
    o, state = call(rule, {**inputs, **leaves}, backend.NAME)
    assert state is not None
    results = [o, state]
    upstream = [torch.randn_like(t) for t in results]

    def backward() -> Sequence[Tensor]:
        return torch.autograd.grad(results, list(leaves.values()), upstream, retain_graph=True)

    return backward
