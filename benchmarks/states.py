"""What states along the way cost on the CPU, in turns with the plain calls that they replace, one thread.

    python -m benchmarks.states --json out/states.json

Four ratios: a call with `state_every` over the same call without; decode on pools of float32 over bfloat16; eight
separate texts over a tree of a prefix and eight continuations, forward and with gradients.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sleepkern
from sleepkern import rules
from sleepkern.files import write_text
from sleepkern.measure.environment import environment
from sleepkern.measure.timing import Candidate, ratio, time_in_turns
from sleepkern.testing import Shape, call, make_inputs

RULE = rules.GATED_DELTA_RULE
SETS = 3
"""Sets of inputs that are rotated."""


def main() -> None:
    """Time the four pairs, print a table and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--json", type=Path, default=Path("out/states.json"), help="where the result is written")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each pair")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name, pair in PAIRS.items():
        found = time_in_turns({label: Candidate(calls) for label, calls in pair().items()}, seconds=options.seconds)
        (ours, mine), (other, theirs) = found.items()
        times = {ours: 1e3 * mine.median, other: 1e3 * theirs.median}
        rows.append({"case": name, "ms": times, "ratio": ratio(mine, theirs)})
        shown = ", ".join(f"{label} {ms:.2f} ms" for label, ms in times.items())
        print(f"{name}: {shown}; {other} / {ours} = {rows[-1]['ratio']:.2f}", flush=True)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    write_text(options.json, json.dumps({"environment": environment(), "rows": rows}, indent=1))


def state_every() -> dict[str, list[Callable[[], Any]]]:
    """Forward at T = 2048, 16 heads of 128, with and without the states after every 64 tokens."""
    sets = [make_inputs(RULE, Shape(T=2048, H=16, HV=16, K=128, V=128), torch.bfloat16, seed=i) for i in range(SETS)]
    return {
        "state_every=64": [lambda x=x: call(RULE, x, "cpu", state_every=64) for x in sets],
        "plain": [lambda x=x: call(RULE, x, "cpu") for x in sets],
    }


def pools() -> dict[str, list[Callable[[], Any]]]:
    """A token of 256 sequences of 16 heads of 128, on pools of 4,096 states of heads."""
    x = make_inputs(RULE, Shape(B=256, T=1, H=16, HV=16, K=128, V=128), torch.bfloat16)
    tokens = {name: x[name] for name in ("q", "k", "v", "g", "beta")}
    rows = torch.randperm(256)

    def step(dtype: torch.dtype) -> Callable[[], Any]:
        pool = torch.zeros(256, 16, 128, 128, dtype=dtype)
        return lambda: sleepkern.recurrent_step(**tokens, state=pool, state_indices=rows, backend="cpu")

    return {"bfloat16": [step(torch.bfloat16)], "float32": [step(torch.float32)]}


def tree(gradients: bool) -> dict[str, list[Callable[[], Any]]]:
    """Eight continuations of 64 tokens on a prefix of 2,048, 4 heads of 64."""
    prefix, each, count = 2048, 64, 8
    heads: dict[str, int] = {"H": 4, "HV": 4, "K": 64, "V": 64}
    lengths = (prefix, *(each for _ in range(count)))
    whole = make_inputs(RULE, Shape(**heads, lengths=lengths), torch.bfloat16, initial_state=False)
    leaves = {name: t.requires_grad_(gradients) for name, t in whole.items() if name in ("q", "k", "v", "g", "beta")}
    parents = [-1, *(0 for _ in range(count))]

    def piece(t: Tensor, i: int) -> Tensor:
        first = prefix + i * each
        return torch.cat([t[:, :prefix], t[:, first : first + each]], 1).detach().requires_grad_(gradients)

    texts = [{name: piece(t, i) for name, t in leaves.items()} for i in range(count)]

    def run(x: dict[str, Any], **options: Any) -> None:
        o, _ = sleepkern.gated_delta_rule(**x, **options, backend="cpu")
        if gradients:
            torch.autograd.grad(o, list(x.values()), torch.ones_like(o))

    return {
        "a tree": [lambda: run(leaves, cu_seqlens=whole["cu_seqlens"], parents=parents)],
        "eight texts": [lambda: [run(x) for x in texts]],
    }


PAIRS: dict[str, Callable[[], dict[str, list[Callable[[], Any]]]]] = {
    "states after every 64 tokens": state_every,
    "decode on pools": pools,
    "tree, forward": lambda: tree(False),
    "tree, forward and gradients": lambda: tree(True),
}

if __name__ == "__main__":
    main()
