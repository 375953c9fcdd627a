"""Prints as JSON the shortest seconds of torch's addition and of calls on next to no work."""

from __future__ import annotations

import json
import timeit
from collections.abc import Callable

import torch

import sleepkern
from sleepkern import rules
from sleepkern.testing import Shape, make_inputs

CALLS = 100


def main() -> None:
    torch.set_num_threads(1)
    x = make_inputs(rules.GATED_DELTA_RULE, Shape(T=1, H=1, HV=1, K=4, V=4))
    arguments = (x["q"], x["k"], x["v"], x["g"], x["beta"])
    state = torch.zeros(1, 1, 4, 4)
    offsets = torch.tensor([0, 1])
    candidates: dict[str, Callable[[], object]] = {
        "add": lambda: x["q"] + x["k"],
        "call": lambda: sleepkern.gated_delta_rule(*arguments),
        "step": lambda: sleepkern.recurrent_step(*arguments, state),
        "packed": lambda: sleepkern.gated_delta_rule(*arguments, cu_seqlens=offsets),
    }
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(60):
        for name, run in candidates.items():
            times[name].append(timeit.timeit(run, number=CALLS) / CALLS)
    print(json.dumps({name: min(t) for name, t in times.items()}))


if __name__ == "__main__":
    main()
