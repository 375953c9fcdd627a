"""A search for the inputs that the CPU kernels do worst on, against float64.

    python -m tests.hardening.worst_errors --seconds 600 --seed 1 --out worst.json

Each trial draws sizes, decay, write strengths and how much keys resemble each other from its seed, so that a seed says
all of it. An error is in norm, relative to the float64 reference on the same rounded inputs; that of a gradient to its
own size or to a thousandth of all gradients together (dg: two hundredths), whichever is more. What is allowed: the
promise of the type, or twice the error of the chunk form in torch on the same input, which has the same conditioning.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sleepkern.rules import RULES, Rule
from sleepkern.testing import TOLERANCE, Shape, call, make_inputs, rules_of, to_float64

TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
NAMES = ("q", "k", "v", "g", "beta", "initial_state")
LENGTHS = (1, 2, 3, 4, 5, 6, 7, 15, 16, 31, 32, 33, 40, 63, 64, 65, 97, 128, 200, 257, 500)
LONG = (1000, 2048, 4096)
WIDTHS = (1, 2, 3, 5, 8, 16, 17, 31, 32, 33, 48, 64, 65, 128)
DECAYS = ("zero", "slow", "mixed", "strong", "extreme")
SMALL = 1e-3
"""Share of all gradients together below which one of them is measured by them."""
SMALL_DECAY = 2e-2
"""The same of dg, which under strong decay is a small difference of large terms."""


@dataclass(frozen=True)
class Found:
    """One error, where it was found, and what was allowed."""

    rule: str
    type: str
    what: str
    seed: int
    error: float
    chunked: float
    allowed: float
    trial: str

    @property
    def share(self) -> float:
        """Of what was allowed."""
        return self.error / self.allowed


def draw(rule: Rule, dtype: torch.dtype, seed: int) -> tuple[dict[str, Any], bool, str]:
    """Inputs of a trial, whether q and k are normalised in the kernel, and the trial in words."""
    chance = random.Random(seed)
    T = chance.choice(LONG if chance.random() < 0.02 else LENGTHS)
    H = chance.choice((1, 1, 2))
    shape = Shape(T=T, H=H, HV=H * chance.choice((1, 1, 2)), K=chance.choice(WIDTHS), V=chance.choice(WIDTHS))
    options: dict[str, Any] = {
        "decay": chance.choice(DECAYS),
        "beta_max": chance.choice((1.0, 1.0, 1.9, 1.999, 2.0)),
        "correlation": chance.choice((0.0, 0.0, 0.5, 0.9, 0.99, 1.0)),
        "initial_state": chance.random() < 0.7,
    }
    x = make_inputs(rule, shape, dtype, seed=seed, **options)
    constant, size = chance.random() < 0.3, chance.choice((1.0, 1.0, 0.1, 10.0))
    if constant:
        x["beta"] = torch.full_like(x["beta"], options["beta_max"])
    if x["initial_state"] is not None:
        x["initial_state"] *= size
    normalize = chance.random() < 0.3
    return x, normalize, f"{shape} {options} constant={constant} state={size} normalize={normalize}"


def results(rule: Rule, x: dict[str, Any], backend: str, normalize: bool, gradients: bool) -> dict[str, Tensor]:
    """o, S, and the gradients of both together."""
    leaves = {n: t.detach().clone().requires_grad_(gradients) for n, t in x.items() if n in NAMES and t is not None}
    o, S = call(rule, {**x, **leaves}, backend, use_qk_l2norm_in_kernel=normalize)
    assert S is not None
    found = {"o": o.detach(), "S": S.detach()}
    if gradients:
        generator = torch.Generator().manual_seed(5)
        above = [torch.randn(t.shape, generator=generator).to(t) for t in (o, S)]
        torch.autograd.backward([o, S], above)
        found |= {"d" + n: t.grad for n, t in leaves.items() if t.grad is not None}
    return found


def errors(actual: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    """Of o, S and every gradient, as the module says."""
    all_gradients = sum(float(t.square().sum()) for n, t in truth.items() if n.startswith("d")) ** 0.5
    found = {}
    for name, true in truth.items():
        share = SMALL_DECAY if name == "dg" else SMALL if name.startswith("d") else 0.0
        size = max(float(true.norm()), share * all_gradients, 1e-30)
        error = float((actual[name].double() - true).norm()) / size
        found[name] = error if error == error else float("inf")
    return found


def run_trial(rule_name: str, type_name: str, seed: int, gradients: bool = True) -> list[Found]:
    """All errors of a trial on the CPU kernels."""
    rule, dtype = RULES[rule_name], TYPES[type_name]
    x, normalize, words = draw(rule, dtype, seed)
    truth = results(rule, to_float64(x), "reference", normalize, gradients)
    actual, chunked = (errors(results(rule, x, backend, normalize, gradients), truth) for backend in ("cpu", "chunked"))
    return [
        Found(
            rule_name, type_name, what, seed, error, chunked[what], max(TOLERANCE[dtype], 2 * chunked[what]), words
        )
        for what, error in actual.items()
    ]  # fmt: skip


def search(seconds: float, seed: int) -> tuple[dict[tuple[str, str, str], Found], int]:
    """The worst of each rule, type and result by its share of what is allowed, and how many trials were made."""
    worst: dict[tuple[str, str, str], Found] = {}
    until, made = time.monotonic() + seconds, 0
    while time.monotonic() < until:
        for rule in rules_of("cpu", "chunked"):
            for type_name in TYPES:
                for found in run_trial(rule, type_name, seed + made):
                    key = (found.rule, found.type, "gradients" if found.what.startswith("d") else found.what)
                    if key not in worst or found.share > worst[key].share:
                        worst[key] = found
                made += 1
    return worst, made


def main() -> int:
    """Search, print the table, write it as JSON; the exit status says whether all is within what is allowed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("out/worst_errors.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    worst, made = search(options.seconds, options.seed)
    print(f"{made} trials from seed {options.seed}\n")
    print("| rule | type | of | error | chunked | allowed | seed |\n|---|---|---|---|---|---|---|")
    for (rule, type_name, what), f in sorted(worst.items()):
        of = what if what == f.what else f"{what}: {f.what}"
        print(f"| {rule} | {type_name} | {of} | {f.error:.1e} | {f.chunked:.1e} | {f.allowed:.1e} | {f.seed} |")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"trials": made, "worst": [asdict(f) for f in worst.values()]}, indent=1))
    return int(any(f.share > 1 for f in worst.values()))


if __name__ == "__main__":
    sys.exit(main())
