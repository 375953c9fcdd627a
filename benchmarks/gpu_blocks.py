"""sleep_blocks on a GPU: one launch against the modules, checked in float64 and timed.

    python -m benchmarks.gpu_blocks OUT.json [--seconds 60] [--compile] [--plans]

Checks come first, on a few windows, against the modules in float64 on the CPU: an error may be 1e-2, or 1.5 times what
the modules make of the same bfloat16. Then the times of a call, in turns, by CUDA events: ours, ours and the modules
each as one CUDA graph, and the modules one by one; with --compile also those compiled by torch, a minute a row.
OUT.json is written after every row; a row that fails says so and does not end the run. --plans times, instead, every
way to cut a call that fits, with N = 4 as a graph, beside what the plan's model expects. Exit status 1 when a check is
red.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from sleepkern.backends.cuda import blocks as cuda_blocks
from sleepkern.backends.cuda import blocks_plan as planning
from sleepkern.backends.cuda.device import current_device
from sleepkern.measure import timing
from sleepkern.measure.environment import environment
from sleepkern.nn import SleepLM
from sleepkern.problems.blocks import describe
from sleepkern.sleep import sleep_blocks
from sleepkern.sleep.blocks import Slept, one_by_one, why_not
from sleepkern.sleep.cuda_graph import CudaRecorder
from sleepkern.state import RecurrentState
from sleepkern.testing import relative_error

from .gpu_check.writing import write

TOLERANCE = 1e-2
BATCHES, PASSES = (1, 16, 128, 1024), (4, 1, 2, 8)
SECONDS, TURNS = 0.5, (3, 15)
"""Of all ways of a row together."""


class Size(NamedTuple):
    """Of a stack, with the windows to check it on."""

    name: str
    L: int
    d: int
    heads: int
    blocks: int
    factor: int = 4
    check: int = 2
    kept: int = 0
    mixer: dict[str, Any] = {}


PAPER = (Size("rule 110", 24, 256, 4, 4), Size("depo", 75, 512, 8, 10))
ODD = (
    Size("one token", 1, 32, 1, 2, 3, 3, 2),
    Size("tiny", 5, 24, 2, 3, 3, 3, 7, {"key_width": 7, "value_heads": 4, "value_width": 5, "convolution": 3}),
    Size("odd", 17, 40, 2, 3, 3, 5, 20),
    Size("wide heads", 75, 128, 1, 3, 3, 2, 33),
    Size("many windows", 24, 64, 4, 2, 4, 700),
)
WAYS = (("raw", "rewind", 2), ("reinject", "carry", 2))


def model(size: Size) -> SleepLM:
    """On the CPU, with norms that are not 1."""
    torch.manual_seed(0)
    made = SleepLM(2, size.d, size.heads, size.blocks, size.L, factor=size.factor, mixer=size.mixer)
    for parameter in made.parameters():
        if parameter.ndim == 1:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return made.to(torch.bfloat16)


def moved(states: list[Any], *to: Any) -> list[Any]:
    """States on another device, or of another type."""
    return [s if s is None else type(s)(*(t.to(*to) for t in s)) for s in states]


def check(size: Size, device: str, feedback: Any, conv_state: Any, passes: int) -> dict[str, Any]:
    """Errors of h, of what is remembered and of the changes; those of the modules in bfloat16."""
    lm = model(size)
    exact, there = copy.deepcopy(lm).double(), copy.deepcopy(lm).to(device)
    h, states = torch.randn(size.check, size.L, size.d).bfloat16(), [None] * size.blocks
    if size.kept:
        x, states = torch.randn(size.check, size.kept, size.d).double(), []
        for block in exact.blocks():
            x, state = block(x)
            states.append(state)
        states = [type(s)(*(t.to(torch.float32 if t.ndim == 4 and i else torch.bfloat16) for i, t in enumerate(s)))
                  if isinstance(s, RecurrentState) else moved([s], torch.bfloat16)[0] for s in states]  # fmt: skip
    true = one_by_one(h.double(), exact.blocks(), passes, moved(states, torch.float64), feedback, conv_state)
    x, before = h.to(device), moved(states, device)
    if device == "cuda":
        reason = why_not(x, there.blocks())
        if reason is not None:
            raise RuntimeError(f"not one launch: {reason}")
    ours = sleep_blocks(x, there.blocks(), before, passes, feedback, conv_state)
    modules = one_by_one(x, there.blocks(), passes, before, feedback, conv_state)
    again = sleep_blocks(x, there.blocks(), before, passes, feedback, conv_state)
    if not torch.equal(ours.h, again.h):
        raise RuntimeError("two calls differ")
    errors, theirs = (
        [relative_error(a.cpu(), b) for a, b in zip(flat(s), flat(true), strict=True) if b.numel()]
        for s in (ours, modules)
    )
    red = [
        f"{a:.1e} (modules {b:.1e})" for a, b in zip(errors, theirs, strict=True) if not a <= max(TOLERANCE, 1.5 * b)
    ]
    return {"worst": max(errors), "modules": max(theirs), "red": red}


@torch.enable_grad()
def check_gradients(size: Size, device: str) -> dict[str, Any]:
    """Of h and all parameters, against the modules' own; the backward runs them from what the launches left."""
    there = model(size).to(device)
    h = torch.randn(size.check, size.L, size.d, device=device).bfloat16().requires_grad_()
    wanted = [h, *(p for block in there.blocks() for p in block.parameters())]
    ours, theirs = (
        torch.autograd.grad(run(h, there.blocks(), passes=2).h.float().square().mean(), wanted)
        for run in (sleep_blocks, one_by_one)
    )
    errors = [relative_error(a.cpu(), b.double().cpu()) for a, b in zip(ours, theirs, strict=True)]
    return {"worst": max(errors), "red": [f"{max(errors):.1e}"] if max(errors) > 10 * TOLERANCE else []}


def flat(slept: Slept) -> list[Tensor]:
    """All results."""
    return [slept.h, *(t for state in slept.states for t in state), slept.changes]


def graph_of(call: Callable[[], Any]) -> Callable[[], None]:
    """The call, captured."""
    with cuda_blocks.reading() as weights:
        replay, made = CudaRecorder().record(call)

    def again(kept: Any = (made, weights)) -> None:
        replay()

    return again


def microseconds(calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Medians over turns."""
    candidates = {name: timing.Candidate([call]) for name, call in calls.items()}
    return {name: 1e6 * t.median for name, t in timing.time_in_turns(candidates, "cuda", SECONDS, TURNS).items()}


def times(size: Size, lm: SleepLM, B: int, N: int, compiled: bool) -> Iterator[tuple[str, float | str]]:
    """Of one row, all ways in turns; one that fails gives its error."""
    h, blocks = torch.randn(B, size.L, size.d, device="cuda").bfloat16(), lm.blocks()
    reason = why_not(h, blocks)
    if reason is not None:
        yield "by itself", reason

    def ours() -> Slept:
        with mock.patch.object(cuda_blocks, "slower", return_value=None):  # also where modules are expected to win
            return sleep_blocks(h, blocks, passes=N)

    def modules() -> Slept:
        return one_by_one(h, blocks, N)

    ways: dict[str, Callable[[], Callable[[], Any]]] = {
        "ours": lambda: ours,
        "ours, graph": lambda: graph_of(ours),
        "modules, graph": lambda: graph_of(modules),
        "modules": lambda: modules,
    }
    if compiled:
        ways["modules, compiled"] = lambda: graph_of(torch.compile(modules, dynamic=False))
    calls = {}
    for name, prepare in ways.items():
        try:
            call = prepare()
            call()
            calls[name] = call
        except Exception as error:  # the next way is still worth timing
            yield name, f"{type(error).__name__}: {str(error)[:200]}"
    yield from microseconds(calls).items()


def table_row(row: dict[str, Any]) -> str:
    """Microseconds, and how many times as fast as the modules' graph."""
    numbers = [f"{n} {row[n]:.0f}" if isinstance(row[n], float) else f"{n}: {row[n]}" for n in row if n not in KEYS]
    ours, graph = row.get("ours, graph"), row.get("modules, graph")
    gain = f"   x {graph / ours:.2f}" if isinstance(ours, float) and isinstance(graph, float) else ""
    return f"{row['size']} B={row['B']} N={row['N']} [{row['plan']}]: " + ", ".join(numbers) + " us" + gain


def all_plans(size: Size, lm: SleepLM, B: int) -> Iterator[dict[str, Any]]:
    """Microseconds of four passes by every plan, and as the model has it."""
    h, blocks, device = torch.randn(B, size.L, size.d, device="cuda").bfloat16(), lm.blocks(), current_device()
    shapes = cuda_blocks.shapes_of(describe(h, blocks).layers)
    for plan in planning.plans(B, size.L, size.d, shapes, device):
        row: dict[str, Any] = {"size": size.name, "B": B, "N": 4, "plan": plan._asdict()}
        row["expected"] = 4 * planning._time(plan, B, size.d, shapes, device) / CLOCK
        try:
            with mock.patch.multiple(cuda_blocks, plan=lambda *_, plan=plan: plan, slower=lambda *_: None):
                row |= microseconds({"ours, graph": graph_of(lambda: sleep_blocks(h, blocks, passes=4))})
        except Exception as error:  # the next plan is still worth timing
            row["ours, graph"] = f"{type(error).__name__}: {str(error)[:200]}"
        yield row


CLOCK = 1755.0
"""Of an H100, in MHz."""
KEYS = ("size", "B", "N", "plan")


def planned(size: Size, lm: SleepLM, B: int) -> str:
    """How a call is cut."""
    example = next(lm.parameters())
    shapes = cuda_blocks.shapes_of(describe(example, lm.blocks()).layers)
    plan = cuda_blocks.plan(B, size.L, size.d, shapes, current_device())
    return "no plan" if plan is None else " ".join(f"{name}={value}" for name, value in plan._asdict().items())


@torch.no_grad()
def main() -> int:
    """Checks, then times, until the seconds are over."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--plans", action="store_true")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu tries the checks alone")
    parser.add_argument("--few", action="store_true", help="the checks of one size")
    options = parser.parse_args()
    deadline = time.monotonic() + options.seconds
    if options.device == "cuda" and not torch.cuda.is_available():
        print("torch sees no CUDA device here")
        return 1
    found: dict[str, Any] = {"environment": environment(options.device), "checks": {}, "times": []}

    def save() -> None:
        write(options.out, found)

    for size in ODD[:1] if options.few else (*ODD, *PAPER):
        for way in WAYS:
            name = f"{size.name} {' '.join(map(str, way))}"
            try:
                found["checks"][name] = check(size, options.device, *way)
            except Exception as error:  # the next check is still worth making
                found["checks"][name] = {"red": [f"{type(error).__name__}: {str(error)[:300]}"]}
            print(f"{name}: {found['checks'][name]}", flush=True)
            save()
    try:
        found["checks"]["gradients"] = check_gradients(ODD[2], options.device)
    except Exception as error:
        found["checks"]["gradients"] = {"red": [f"{type(error).__name__}: {str(error)[:300]}"]}
    print(f"gradients: {found['checks']['gradients']}", flush=True)
    for B in BATCHES if options.device == "cuda" else ():
        for size in PAPER:
            lm = model(size).cuda()
            for row in all_plans(size, lm, B) if options.plans and time.monotonic() < deadline else ():
                print(row, flush=True)
                found["times"].append(row)
                save()
            for N in () if options.plans else PASSES:
                if time.monotonic() > deadline:
                    found["times"].append({"size": size.name, "B": B, "N": N, "left out": "out of time"})
                    continue
                row = {"size": size.name, "B": B, "N": N, "plan": planned(size, lm, B)}
                found["times"].append(row)
                for way_name, took in times(size, lm, B, N, options.compile):
                    row[way_name] = took
                    save()
                print(table_row(row), flush=True)
    save()
    return int(any(one["red"] for one in found["checks"].values()))


if __name__ == "__main__":
    sys.exit(main())
