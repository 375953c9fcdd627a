"""Prints as JSON the shortest seconds of torch's addition, of a call on next to no work, and of that call's kernel."""

from __future__ import annotations

import json
import timeit
from collections.abc import Callable
from typing import Any

import torch

import sleepkern
from sleepkern import rules
from sleepkern.backends import cpu
from sleepkern.testing import Shape, make_inputs

CALLS = 100


class Recorder:
    """The native module, but it remembers what `forward` was called with."""

    def __init__(self) -> None:
        self.seen: list[tuple[Any, ...]] = []
        self.native = cpu._C

    def forward(self, *arguments: Any) -> None:
        self.seen.append(arguments)
        self.native.forward(*arguments)


def main() -> None:
    torch.set_num_threads(1)
    x = make_inputs(rules.GATED_DELTA_RULE, Shape(T=1, H=1, HV=1, K=4, V=4))
    arguments = (x["q"], x["k"], x["v"], x["g"], x["beta"])
    cpu._C = recorder = Recorder()  # type: ignore[assignment]
    kept = sleepkern.gated_delta_rule(*arguments, output_final_state=True)  # what the recorded call writes to
    cpu._C = recorder.native
    candidates: dict[str, Callable[[], object]] = {
        "add": lambda: x["q"] + x["k"],
        "call": lambda: sleepkern.gated_delta_rule(*arguments),
        "kernel": lambda: recorder.native.forward(*recorder.seen[0]),
    }
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(60):
        for name, run in candidates.items():
            times[name].append(timeit.timeit(run, number=CALLS) / CALLS)
    assert len(recorder.seen) == 1 and kept[0].numel() == 4
    print(json.dumps({name: min(t) for name, t in times.items()}))


if __name__ == "__main__":
    main()
