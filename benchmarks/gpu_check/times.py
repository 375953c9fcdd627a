"""Times beside flash-linear-attention and FlashQLA, in CUDA graphs and from Python.

    python -m benchmarks.gpu_check.times OUT.json [--seconds 100] [--dry]

A graph's replay has the device's time alone, a call from Python its host time too. First each case runs once in a
process of its own, as many at a time as there are cores, so that what they compile is in the caches of all; then the
cases are timed one after the other, in order of worth, until the seconds are over. Inputs stay the same within a
graph: those of the largest cases are bigger than the cache. OUT.json is replaced after each case.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sleepkern.measure.cases import Case, Op, run
from sleepkern.measure.environment import environment
from sleepkern.measure.peers import GPU_PEERS
from sleepkern.measure.timing import Candidate, ratio, time_in_turns
from sleepkern.rules import GATED_DELTA_RULE, KDA, Rule
from sleepkern.testing import Shape, relative_error

from .writing import write

PEERS = tuple(peer for peer in GPU_PEERS if peer.name in ("fla", "FlashQLA"))
WRONG = 2e-2
"""Relative error against ours above which a peer gets no ratio: both round to bfloat16."""
WARM_SHARE = 0.5
"""The share of the seconds that compiling may take."""
SECONDS = 0.4
"""The seconds of all ways of a case together; a case has three rounds at least."""


def _case(op: Op, T: int, H: int, HV: int, B: int = 1, rule: Rule = GATED_DELTA_RULE, **more: Any) -> Case:
    return Case(op, rule, Shape(B=B, T=T, H=H, HV=HV, K=128, V=128), torch.bfloat16, **more)


def _packed(op: Op, *lengths: int) -> Case:
    return Case(op, GATED_DELTA_RULE, Shape(H=32, HV=32, K=128, V=128, lengths=lengths), torch.bfloat16)


def _states(count: int) -> Case:
    HV = min(count, 32)
    return _case("decode", 1, HV, HV, count // HV)


CASES: tuple[Case, ...] = (
    _case("forward", 8192, 32, 32), _case("train", 8192, 32, 32), _case("train", 8192, 16, 32),
    _case("forward", 8192, 32, 32, rule=KDA), _case("train", 8192, 32, 32, rule=KDA),
    _case("forward", 8192, 2, 8), _case("forward", 8192, 4, 16), _case("forward", 8192, 8, 32),
    _case("forward", 8192, 16, 64), _case("forward", 8192, 64, 64), _case("train", 8192, 2, 8),
    _case("forward", 2048, 32, 32), _case("forward", 8192, 32, 32, 4), _case("forward", 65536, 2, 8),
    *(_states(count) for count in (1, 16, 64, 256, 1024, 4096)),
    _packed("forward", *[1024] * 8), _packed("forward", 7000, 1, 63, 64, 65, 500, 499), _packed("forward", *[64] * 128),
    _packed("train", *[1024] * 8),
    _case("ingest", 64, 32, 32, passes=8), _case("ingest", 512, 32, 32, passes=8),
    _case("ingest", 2048, 32, 32, passes=16),
)  # fmt: skip
"""In order of worth."""


def name_of(case: Case) -> str:
    """The case's name, with its lengths."""
    lengths = case.shape.lengths
    return case.name + (f" packed {len(lengths)} x <= {max(lengths)}" if lengths else "")


def tiny(case: Case) -> Case:
    """The same question on a few tokens and heads, for a rehearsal."""
    s = case.shape
    lengths = None if s.lengths is None else tuple(min(n, 5) for n in s.lengths[:4])
    shape = Shape(B=min(s.B, 2), T=min(s.T, 20), H=1, HV=2, K=16, V=16, lengths=lengths)
    return replace(case, shape=shape, dtype=torch.float32, passes=min(case.passes, 2))


def graph_of(call: Callable[[], Any]) -> Callable[[], Any]:
    """A CUDA graph of a call, as the function that replays it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = call()
    return lambda: (graph.replay(), kept)


def ways(case: Case, device: str) -> Iterator[tuple[str, Callable[[], Any] | str]]:
    """The callable of ours and of each peer on inputs of its own, or the reason why there is none."""
    inputs = case.inputs(device=device)
    yield "ours", lambda: run(case, inputs)
    for peer in PEERS:
        reason = peer.why_not(case, device)
        yield peer.name, reason if reason is not None else peer.prepare(case, case.inputs(device=device), 1)


def measured(case: Case, device: str) -> dict[str, Any]:
    """Microseconds of each way from Python and in a graph, errors against ours, ratios."""
    row: dict[str, Any] = {"case": name_of(case)}
    calls: dict[str, Callable[[], Any]] = {}
    expected: Any = None
    for name, call in ways(case, device):
        try:
            if isinstance(call, str):
                raise LookupError(call)
            made = call()
            expected = made if expected is None else expected
            errors = [
                relative_error(a, e) for a, e in zip(made, expected, strict=True) if a is not None and e is not None
            ]
            row[name] = {"error": max(errors, default=0.0)}
            calls[f"{name}, python"] = call
            calls[f"{name}, graph"] = graph_of(call) if device == "cuda" else call
        except Exception as error:  # the next way is still worth timing
            row[name] = row.get(name, {}) | {"note": f"{type(error).__name__}: {str(error)[:300]}"}
    times = time_in_turns({n: Candidate([c]) for n, c in calls.items()}, device, SECONDS if device == "cuda" else 0.01)
    for label, timing in times.items():
        name, kind = label.split(", ")
        row[name][f"{kind} us"] = round(timing.median * 1e6, 2)
        first = times.get(f"ours, {kind}")
        if name != "ours" and first is not None and row[name]["error"] <= WRONG:
            row[name][f"{kind} ratio"] = round(ratio(first, timing), 3)
    return row


def warm(count: int, dry: bool, seconds: float) -> dict[str, str]:
    """Run each case once in a process of its own; how those ended that did not end well."""
    deadline = time.monotonic() + seconds

    def one(i: int) -> str:
        words = [sys.executable, "-m", "benchmarks.gpu_check.times", "-", "--warm", str(i), *["--dry"] * dry]
        try:
            done = subprocess.run(
                words, capture_output=True, text=True, check=False, timeout=max(deadline - time.monotonic(), 1)
            )
        except subprocess.TimeoutExpired:
            return "out of time"
        return "" if done.returncode == 0 else (done.stdout + done.stderr)[-300:]

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        ends = list(pool.map(one, range(count)))
    return {name_of(CASES[i]): end for i, end in enumerate(ends) if end}


def through() -> dict[str, Any]:
    """Say whether flash-linear-attention's gradients run through TileLang, as some versions of Triton need."""
    if importlib.util.find_spec("fla") is None:
        return {"fla": "not installed"}
    try:
        backend = importlib.import_module("fla.ops.common.backends").CommonTileLangBackend
        return {"fla through TileLang": bool(backend.is_available() and backend.is_enabled()), "FLA_FLASH_QLA": "0"}
    except Exception as error:  # another version of it has other names
        return {"fla through TileLang": f"not known: {type(error).__name__}: {error}"}


def main() -> int:
    """Warm up, then time; 1 where ours ran in no case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=100)
    parser.add_argument("--dry", action="store_true", help="on the CPU, a few tokens")
    parser.add_argument("--warm", type=int, help="run this case once, in this process")
    options = parser.parse_args()
    begin, device = time.monotonic(), "cpu" if options.dry else "cuda"
    cases = [tiny(case) for case in CASES] if options.dry else list(CASES)
    if options.warm is not None:
        for name, call in ways(cases[options.warm], device):
            print(name, call if isinstance(call, str) else type(call()).__name__)
        return 0
    found: dict[str, Any] = {"environment": environment(device), "peers": through(), "unit": "us", "rows": []}
    write(options.out, found)
    found["not warmed"] = warm(1 if options.dry else len(cases), options.dry, WARM_SHARE * options.seconds)
    for case in cases:
        if time.monotonic() - begin > options.seconds:
            found["rows"].append({"case": name_of(case), "left out": "out of time"})
            continue
        found["rows"].append(measured(case, device))
        print(found["rows"][-1], flush=True)
        write(options.out, found)
    write(options.out, found)
    return int(not any("python us" in row.get("ours", {}) for row in found["rows"]))


if __name__ == "__main__":
    sys.exit(main())
