"""What a GPU machine checks beside `verify` and `bench`:

python -m benchmarks.gpu_checks launches [--of PART]  every kernel once, on tiny shapes, for compute-sanitizer
python -m benchmarks.gpu_checks replays [--json F]    every CUDA kernel in every mode against the float64 reference
python -m benchmarks.gpu_checks graphs [--json F]     CUDA graphs and torch.compile(fullgraph=True)
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sleepkern
from sleepkern.backends.cuda import blocks as cuda_blocks
from sleepkern.backends.cuda import recurrence as cuda
from sleepkern.measure.environment import environment
from sleepkern.nn import SleepLM
from sleepkern.problems.blocks import describe
from sleepkern.rules import GATED_DELTA_RULE, KDA, Rule
from sleepkern.sleep import SleepSession
from sleepkern.sleep.settings import Eviction
from sleepkern.testing import Shape, call, make_inputs, relative_error, rules_of

from .cuda_calls import LONG, STEPS, WINDOWS, Call, calls
from .gpu_check.writing import write
from .gpu_verify import ALONE

ONE = {"H": 1, "HV": 2, "K": 32, "V": 32}
SHAPES = (Shape(T=1, **ONE), Shape(T=24, **ONE), Shape(T=150, **ONE), Shape(**ONE, lengths=(3, 0, 70)))
"""The step, one chunk in one launch, several chunks, packed."""

Results = tuple[Tensor | None, Tensor | None]
Found = Iterator[tuple[str, str | None]]
"""(what, None or what is wrong) of each check."""


def triton_launches(rule: Rule, device: str) -> None:
    """Forward, backward and replay of a rule by every Triton kernel."""
    for shape in SHAPES:
        x = make_inputs(rule, shape, torch.bfloat16, device=device)
        leaves = {n: t.requires_grad_() for n, t in x.items() if t is not None and n != "cu_seqlens"}
        o, state = call(rule, {**x, **leaves}, "triton")
        assert state is not None
        torch.autograd.grad([o.float().sum() + state.sum()], list(leaves.values()))
    slept = sleepkern.sleep_ingest(**make_inputs(rule, SHAPES[1], device=device), passes=3, rule=rule, backend="triton")
    assert slept.output is not None


def cuda_launches(device: str) -> None:
    """Every CUDA kernel, and none of Triton's: racecheck finds those of exact products at fault, whose lanes write sums

    of one number that are rounded one way or another (the last bits of it, for the compiler fuses what it likes).
    """
    for one in calls(small=True):
        one.run(one.inputs(device))
    for K in (32, 128):
        A, states = 0.1 * torch.randn(1, 2, K, K, device=device), torch.randn(2, 1, 2, K, 48, device=device)
        cuda.powers_backward(A, cuda.powers(A, states[0], states[1], 3), states[0], None)
    model = SleepLM(8, width=64, heads=2, blocks=2, window=20).to(device, torch.bfloat16)
    h = torch.randn(3, 20, 64, device=device).bfloat16()
    with torch.no_grad():
        problem = describe(h, model.blocks(), passes=2, reinject=True, carry=True)
        cuda_blocks.run(problem, h, model.blocks(), [None, None])


def cuda_backward_launches(device: str) -> None:
    """A replay's backward, whose ordinary passes are Triton's."""
    for shape in (SHAPES[1], Shape(T=24, H=1, HV=1, K=128, V=128)):
        x = make_inputs(GATED_DELTA_RULE, shape, device=device)
        leaves = {n: t.requires_grad_() for n, t in x.items() if t is not None}
        state = sleepkern.sleep_ingest(**leaves, passes=3, backend="cuda").final_state
        torch.autograd.grad(state.sum(), [t for n, t in leaves.items() if n != "q"])


LAUNCHES: dict[str, Callable[[str], None]] = {
    "cuda": cuda_launches,
    "cuda-backward": cuda_backward_launches,
    **{f"triton-{rule.name}": partial(triton_launches, rule) for rule in rules_of("triton").values()},
}
"""In parts, because nearly all of the time is compiling, on one core each."""


def launch_side_by_side() -> int:
    """All parts, each in a process of its own; 1 when one is red."""

    def launched(part: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "benchmarks.gpu_checks", "launches", "--of", part]
        return subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | ALONE)

    with ThreadPoolExecutor() as pool:
        done = dict(zip(LAUNCHES, pool.map(launched, LAUNCHES), strict=True))
    for part, one in done.items():
        print(f"{part}: {'ok' if one.returncode == 0 else (one.stdout + one.stderr)[-800:]}")
    return int(any(one.returncode for one in done.values()))


def rehearsal() -> Found:
    """One call by the float64 reference against itself: the form of what `replays` and `graphs` find."""
    one = Call(GATED_DELTA_RULE, Shape(T=5, **ONE), torch.float32)
    x = one.inputs("cpu")
    yield f"rehearsal of {one.name}", _attempt(lambda: relative_error(*[one.run(x, "reference")[1]] * 2))


def replays(device: str = "cuda", small: bool = False) -> Found:
    """Every CUDA kernel in every mode against the float64 reference."""
    for one in calls(small):
        yield one.name, _attempt(lambda one=one: one.error(device), one.tolerance)


def graphs(device: str = "cuda") -> Found:
    """Capture on some inputs, replay on others; then torch.compile."""
    for rule in (GATED_DELTA_RULE, KDA):
        for shape in (SHAPES[0], SHAPES[2], SHAPES[3]):
            name = f"graph of {rule.name} T={shape.T}{' packed' * (shape.lengths is not None)}"
            inputs = [make_inputs(rule, shape, torch.bfloat16, seed=seed, device=device) for seed in (0, 1)]
            yield name, _attempt(lambda rule=rule, inputs=inputs: _captured(lambda x: call(rule, x, "triton"), *inputs))
        for one in (
            Call(rule, WINDOWS[1], torch.bfloat16),
            Call(rule, LONG[0], torch.bfloat16, method="wy"),
            Call(rule, LONG[3], torch.bfloat16, method="affine"),
            Call(rule, STEPS[0], torch.bfloat16, passes=None),
        ):
            inputs = [one.inputs(device, seed) for seed in (0, 1)]
            yield f"graph of cuda {one.name}", _attempt(lambda one=one, inputs=inputs: _captured(one.run, *inputs))
        yield f"compile of {rule.name}", _attempt(lambda rule=rule: _compiled(rule, device))
    for eviction in ("hard", "sliding"):
        yield f"graph of a sleep, {eviction}", _attempt(lambda eviction=eviction: _slept(eviction, device), 1e-5)


def _attempt(check: Callable[[], float], tolerance: float = 0.0) -> str | None:
    try:
        difference = check()
    except Exception as error:  # the next check is still worth making
        return f"{type(error).__name__}: {str(error)[:300]}"
    return None if difference <= tolerance else f"differs by {difference:.1e}"


def _captured(run: Callable[[dict[str, Any]], Results], first: dict[str, Any], second: dict[str, Any]) -> float:
    """Difference between a graph captured on `first`, replayed on `second`, and an eager call on that."""
    run(first)  # compiles
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run(first)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(first)
    for name, t in second.items():
        if isinstance(t, Tensor):
            first[name].copy_(t)
    graph.replay()
    expected = run(second)
    return max(relative_error(a, e) for a, e in zip(captured, expected, strict=True) if a is not None and e is not None)


@torch.no_grad()
def _slept(eviction: Eviction, device: str) -> float:
    """Difference of fast weights after four windows, captured and not."""
    model = SleepLM(256, width=128, blocks=4, window=64).to(device)
    ids = torch.randint(256, (2, 256), device=device)
    found, expected = (
        SleepSession(model, 64, passes=3, eviction=eviction, capture=capture).ingest(ids).memory.fast()
        for capture in (True, False)
    )
    return max(relative_error(found[i].state, expected[i].state) for i in expected)


def _compiled(rule: Rule, device: str) -> float:
    x = make_inputs(rule, SHAPES[2], torch.bfloat16, device=device)
    expected, _ = call(rule, x, "triton")
    compiled = torch.compile(lambda y: call(rule, y, "triton")[0], fullgraph=True)
    return relative_error(compiled(x), expected)


def main() -> int:
    """Run what is asked for; 1 when a check is red."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("launches", "replays", "graphs"))
    parser.add_argument("--of", choices=LAUNCHES, help="part, in this process  [default: all, side by side]")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--dry", action="store_true", help="rehearse replays and graphs on the CPU")
    options = parser.parse_args()
    if not options.dry and not torch.cuda.is_available():
        print("torch sees no CUDA device here")
        return 1
    if options.what == "launches":
        if options.of is None:
            return launch_side_by_side()
        LAUNCHES[options.of]("cuda")
        torch.cuda.synchronize()
        print("every kernel was launched")
        return 0
    found: dict[str, Any] = {}
    where = environment("cpu" if options.dry else "cuda")
    checks = rehearsal() if options.dry else replays() if options.what == "replays" else graphs()
    for name, fault in checks:
        found[name] = fault or "ok"
        print(f"{name}: {found[name]}", flush=True)
        if options.json is not None:
            write(options.json, {"environment": where, "checks": found})
    return int(any(fault != "ok" for fault in found.values()))


if __name__ == "__main__":
    sys.exit(main())
