"""What a GPU machine checks beside `verify` and `bench`:

python -m benchmarks.gpu_checks launches          every Triton kernel once, on tiny shapes, for compute-sanitizer
python -m benchmarks.gpu_checks graphs [--json F] CUDA graphs and torch.compile(fullgraph=True)
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sleepkern
from sleepkern.measure.environment import environment
from sleepkern.rules import GATED_DELTA_RULE, KDA, RULES, Rule
from sleepkern.testing import Shape, call, make_inputs, relative_error

ONE = {"H": 1, "HV": 2, "K": 32, "V": 32}
SHAPES = (Shape(T=1, **ONE), Shape(T=24, **ONE), Shape(T=150, **ONE), Shape(**ONE, lengths=(3, 0, 70)))
"""The step, one chunk in one launch, several chunks, packed."""


def launches(device: str) -> None:
    """Forward, backward and replay of every rule and kernel."""
    for rule in RULES.values():
        for shape in SHAPES:
            x = make_inputs(rule, shape, torch.bfloat16, device=device)
            leaves = {n: t.requires_grad_() for n, t in x.items() if t is not None and n != "cu_seqlens"}
            o, state = call(rule, {**x, **leaves}, "triton")
            assert state is not None
            torch.autograd.grad([o.float().sum() + state.sum()], list(leaves.values()))
        slept = sleepkern.sleep_ingest(**make_inputs(rule, SHAPES[1], device=device), passes=3, rule=rule)
        assert slept.output is not None
    if device == "cuda":
        torch.cuda.synchronize()


def graphs(device: str = "cuda") -> Iterator[tuple[str, str | None]]:
    """(what, None or what is wrong) of each check."""
    for rule in (GATED_DELTA_RULE, KDA):
        for shape in (SHAPES[2], SHAPES[3]):
            name = f"graph of {rule.name} T={shape.T}{' packed' * (shape.lengths is not None)}"
            yield name, _attempt(lambda rule=rule, shape=shape: _captured(rule, shape, device))
        yield f"graph of {rule.name} decode", _attempt(lambda rule=rule: _captured(rule, SHAPES[0], device))
        yield f"compile of {rule.name}", _attempt(lambda rule=rule: _compiled(rule, device))


def _attempt(check: Callable[[], float]) -> str | None:
    try:
        difference = check()
    except Exception as error:  # the next check is still worth making
        return f"{type(error).__name__}: {str(error)[:300]}"
    return None if difference == 0 else f"differs by {difference:.1e}"


def _captured(rule: Rule, shape: Shape, device: str) -> float:
    """Capture on some inputs, replay on others, against an eager call on those."""
    first, second = (make_inputs(rule, shape, torch.bfloat16, seed=seed, device=device) for seed in (0, 1))
    call(rule, first, "triton")  # compiles
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call(rule, first, "triton")
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o, state = call(rule, first, "triton")
    for name, t in second.items():
        if isinstance(t, Tensor):
            first[name].copy_(t)
    graph.replay()
    expected_o, expected_state = call(rule, second, "triton")
    assert state is not None
    assert expected_state is not None
    return max(relative_error(o, expected_o), relative_error(state, expected_state))


def _compiled(rule: Rule, device: str) -> float:
    x = make_inputs(rule, SHAPES[2], torch.bfloat16, device=device)
    expected, _ = call(rule, x, "triton")
    compiled = torch.compile(lambda y: call(rule, y, "triton")[0], fullgraph=True)
    return relative_error(compiled(x), expected)


def main() -> int:
    """Run what is asked for; 1 when a check is red."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("launches", "graphs"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("torch sees no CUDA device here")
        return 1
    if options.what == "launches":
        launches("cuda")
        print("every kernel was launched")
        return 0
    found: dict[str, Any] = {}
    for name, fault in graphs():
        found[name] = fault or "ok"
        print(f"{name}: {found[name]}")
    if options.json is not None:
        options.json.write_text(json.dumps({"environment": environment("cuda"), "checks": found}, indent=1) + "\n")
    return int(any(fault != "ok" for fault in found.values()))


if __name__ == "__main__":
    sys.exit(main())
