"""Random public calls on small tensors of odd sizes, layouts and addresses; a part of them against the reference.

    python -m tests.hardening.fuzz_calls --calls 20000 --seed 1

Every call draws from a seed of its own, which is printed where it fails: `--first SEED --calls 1` makes it again. The
exit status is 0 if no call failed: a refusal is an exception that names what was wrong, a failure any other exception
or a result that is not the reference's.

With --sanitize the native module is built anew, and the process ends at the first access outside of an array and the
first undefined behaviour; tests of the kernels follow the calls. That takes some minutes more.
"""

from __future__ import annotations

import argparse
import faulthandler
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sleepkern
from sleepkern.backends.native.module import _C
from sleepkern.nn import SleepLM, gated_rms_norm, short_convolution
from sleepkern.nn.short_convolution import short_convolution_step
from sleepkern.ops import recurrence as ops
from sleepkern.rules import RULES, Rule
from sleepkern.sleep.blocks import one_by_one, sleep_blocks
from sleepkern.testing import TOLERANCE, Shape, call, make_inputs, rules_of, to_float64
from tests.helpers import build as native
from tests.helpers.raw_gates import raw_inputs

KERNEL_TESTS = [
    "tests/backends/cpu/test_binding.py",
    "tests/ops/test_mixer.py",
    "tests/backends/cpu/test_instruction_sets.py::test_instruction_sets_and_threads_agree",
    "tests/backends/cpu/test_instruction_sets.py::test_instruction_sets_and_threads_agree_on_gradients_and_replay",
    "tests/backends/cpu/test_instruction_sets.py::test_two_threads_give_the_same_bits",
]
REFUSED = (ValueError, TypeError, NotImplementedError)
TYPES = (torch.float32, torch.float32, torch.bfloat16, torch.float16)
LENGTHS = (0, 1, 1, 2, 3, 5, 6, 7, 8, 9, 15, 16, 17, 31, 32, 33, 40, 64, 65, 80)
WIDTHS = (1, 2, 3, 4, 5, 7, 8, 12, 15, 16, 17, 24, 31, 32, 33, 40)
SLACK = 10
"""Of the tolerance: few numbers of a coarse type, or a gradient that is small beside the others, can lose a digit."""


class Mismatch(Exception):
    """A result that is not the reference's."""


class Draw:
    """What one call is made of."""

    def __init__(self, seed: int) -> None:
        self.seed, self.of = seed, random.Random(seed)
        self.dtype = self.of.choice(TYPES)
        self.compares = self.of.random() < 0.15
        torch.manual_seed(seed)

    def maybe(self, share: float) -> bool:
        return self.of.random() < share

    def shape(self) -> Shape:
        H, of = self.of.choice((1, 1, 2, 3)), self.of
        sizes = {"H": H, "HV": H * of.choice((1, 1, 2, 3)), "K": of.choice(WIDTHS), "V": of.choice(WIDTHS)}
        if self.maybe(0.3):
            return Shape(**sizes, lengths=tuple(of.choice(LENGTHS) for _ in range(of.choice((1, 2, 3, 4)))))
        return Shape(**sizes, B=of.choice((1, 1, 2, 3)), T=of.choice(LENGTHS))

    def inputs(self, rule: Rule, shape: Shape) -> dict[str, Any]:
        decay = self.of.choice(("slow", "slow", "zero", "mixed", "strong", "extreme"))
        if self.maybe(0.25):
            made = self.raw(rule, shape)
        else:
            made = make_inputs(rule, shape, self.dtype, self.seed, decay=decay, initial_state=self.maybe(0.7))
        return {name: t if name == "cu_seqlens" and self.maybe(0.5) else self.placed(t) for name, t in made.items()}

    def raw(self, rule: Rule, shape: Shape) -> dict[str, Any]:
        """A call with raw gates, of any float type, with or without bounds, biases and states."""
        of = self.of
        made = raw_inputs(
            rule, shape, self.dtype, self.seed, of.choice((None, None, -5.0)), self.maybe(0.3),
            of.choice(((0.01, 1.0), (1.0, 16.0))), of.choice(TYPES), of.choice((2.0, 2.0, 40.0)),
        )  # fmt: skip
        for name, share in (("dt_bias", 0.2), ("initial_state", 0.3)):
            if name in made and self.maybe(share):
                made[name] = None
        return made

    def placed(self, t: Any) -> Any:
        """The same values: as they are, at an odd address, in wider rows, transposed, or all alike in a row."""
        how = self.of.choice(("plain", "odd", "odd", "part", "transposed", "later"))
        if not isinstance(t, Tensor) or how == "plain" or t.numel() == 0:
            return t
        if how == "odd":
            return at_odd_address(t, self.of.choice((1, 2, 3)))
        if how == "part" and t.ndim > 1:
            room = torch.full((*t.shape[:-1], t.shape[-1] + 3), float("nan")).to(t.dtype)
            room[..., 1:-2] = t
            return room[..., 1:-2]
        if how == "transposed" and t.ndim > 2:
            return t.transpose(1, 2).contiguous().transpose(1, 2)
        if how == "later":
            return torch.cat([t[:1], t])[1:]
        return t


def at_odd_address(t: Tensor, offset: int) -> Tensor:
    """A copy of t that starts `offset` bytes behind what its type asks for."""
    bytes_of = bytearray(t.numel() * t.element_size() + 64)
    made = torch.frombuffer(bytes_of, dtype=t.dtype, offset=offset, count=t.numel()).view(t.shape)
    return made.copy_(t)


def compare(actual: dict[str, Any], expected: dict[str, Any], dtype: torch.dtype) -> None:
    """Errors relative to the result, or to a hundredth of the largest one beside it."""
    found = {n: (a, expected[n]) for n, a in actual.items() if isinstance(a, Tensor) and expected[n] is not None}
    largest = max((float(e.detach().double().norm()) for _, e in found.values()), default=0.0)
    for name, (a, e) in found.items():
        error = float((a.detach().double() - e.detach().double()).norm())
        scale = max(float(e.detach().double().norm()), 1e-2 * largest, 1e-6)
        if not error <= SLACK * max(TOLERANCE[dtype], TOLERANCE[a.dtype]) * scale:
            raise Mismatch(f"{name}: off by {error / scale:.1e}")


def with_gradients(x: dict[str, Any], run: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
    """Results of a call, and the gradients of the sum of their sines in all its tensors of numbers."""
    wanted = {n: t for n, t in x.items() if isinstance(t, Tensor) and t.is_floating_point()}
    leaves = {n: t.detach().requires_grad_() for n, t in wanted.items()}
    made = run({**x, **leaves})
    total = sum(t.double().sin().sum() for t in made.values() if isinstance(t, Tensor) and t.requires_grad)
    if not isinstance(total, Tensor):
        return made
    grads = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    return made | {f"d{n}": d for n, d in zip(leaves, grads, strict=True)}


def results(x: dict[str, Any], gradients: bool, run: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
    if gradients:
        return with_gradients(x, run)
    with torch.no_grad():
        return run(x)


def rules(d: Draw) -> None:
    rule, shape = d.of.choice(list(RULES.values())), d.shape()
    x, gradients = d.inputs(rule, shape), d.maybe(0.5)
    options: dict[str, Any] = {"use_qk_l2norm_in_kernel": d.maybe(0.3), "output_final_state": d.maybe(0.9)}

    def run(x: dict[str, Any], backend: str | None = None) -> dict[str, Any]:
        o, S = call(rule, x, backend, **options)
        return {"o": o, "S": S}

    actual = results(x, gradients, run)
    if d.compares:
        compare(actual, results(to_float64(x), gradients, lambda x: run(x, "reference")), d.dtype)


def spoilt(d: Draw) -> None:
    """A call with one tensor of the wrong size, type or rank, which is refused."""
    rule = d.of.choice(list(RULES.values()))
    x = d.inputs(rule, d.shape())
    name = d.of.choice([n for n, t in x.items() if isinstance(t, Tensor)])
    t = x[name]
    how = d.of.choice(("longer", "flat", "integers"))
    worse = {"longer": lambda: torch.cat([t, t], -1), "flat": t.flatten, "integers": lambda: t.to(torch.int16)}
    x[name] = worse[how]()
    call(rule, x)


def steps(d: Draw) -> None:
    rule, of = d.of.choice(list(RULES.values())), d.of
    shape = Shape(B=of.choice((1, 2, 3)), T=of.choice((1, 1, 2, 5, 6, 9)), K=of.choice(WIDTHS), V=of.choice(WIDTHS))
    x = d.inputs(rule, shape)
    del x["cu_seqlens"], x["initial_state"]
    pool = torch.randn(5, shape.HV, shape.K, shape.V)
    places = torch.tensor(of.sample(range(-1, 5), shape.B)) if d.maybe(0.5) else None
    state = d.placed(pool if places is not None else pool[: shape.B].clone())
    assert state is not None
    expected = ops.recurrent_step(
        **to_float64(x), state=state.double(), rule=rule, state_indices=places, backend="reference"
    )
    o, S = ops.recurrent_step(**x, state=state, rule=rule, state_indices=places, inplace=d.maybe(0.8))
    if d.compares:
        compare({"o": o, "S": S}, dict(zip(("o", "S"), expected, strict=True)), d.dtype)


def ingestions(d: Draw) -> None:
    rule, shape = d.of.choice(list(rules_of("cpu").values())), d.shape()
    x, gradients = d.inputs(rule, shape), d.maybe(0.3)
    if d.maybe(0.3):
        x["q"] = None
    method = d.of.choice(("auto", "auto", "wy", "affine", "rank", "repeat"))
    tol = 0.1 if d.maybe(0.15) else None

    def run(x: dict[str, Any], method: str = method, backend: str | None = "cpu") -> dict[str, Any]:
        r = sleepkern.sleep_ingest(**x, passes=passes, rule=rule, method=method, tol=tol, backend=backend)
        return {"o": r.output, "S": r.final_state}

    passes = d.of.choice((1, 2, 3, 4, 5, 7, 16, 33))
    actual = results(x, gradients, run)
    if d.compares and tol is None:
        compare(actual, results(to_float64(x), gradients, lambda x: run(x, "repeat", "reference")), d.dtype)


def stacks(d: Draw) -> None:
    of, heads = d.of, d.of.choice((1, 2, 3))
    mixer = {
        "key_width": of.choice((3, 8, 16)),
        "value_heads": heads * of.choice((1, 2)),
        "convolution": of.choice((1, 2, 4)),
    }
    width = heads * of.choice((2, 4, 6, 8))
    model = SleepLM(4, width, heads, of.choice((2, 3)), pattern=of.choice(("AG", "G", "GA")), mixer=mixer)
    blocks = model.blocks()
    h = d.placed(torch.randn(of.choice((1, 2, 3)), of.choice((1, 2, 5, 17, 33)), width))
    assert h is not None
    options = {"passes": of.choice((1, 2, 3)), "feedback": of.choice(("raw", "reinject"))}
    if d.maybe(0.2):
        h.requires_grad_()
        sleep_blocks(h, blocks, **options).h.sum().backward()
        return
    with torch.no_grad():
        states = sleep_blocks(torch.randn(h.shape[0], 3, width), blocks).states if d.maybe(0.5) else None
        actual = sleep_blocks(h, blocks, states, **options)
        if d.compares:
            compare({"h": actual.h}, {"h": one_by_one(h, blocks, states=states, **options).h}, torch.float32)


def convolutions(d: Draw) -> None:
    of, D, W = d.of, d.of.choice(WIDTHS), d.of.choice((1, 2, 3, 4, 5))
    x: dict[str, Any] = {"weight": d.placed(torch.randn(D, W).to(of.choice((d.dtype, torch.float32))))}
    x["bias"] = d.placed(torch.randn(D)) if d.maybe(0.5) else None
    silu = of.choice(("silu", None))
    if d.maybe(0.3):
        B = of.choice((1, 2, 3))
        u, state = torch.randn(B, D).to(d.dtype), torch.randn(B, D, W).to(d.dtype)
        placed = d.placed(state.clone())
        assert placed is not None
        with torch.no_grad():
            y = short_convolution_step(d.placed(u), placed, **x, activation=silu)  # type: ignore[arg-type]
            y64 = short_convolution_step(u.double(), state.double(), **to_float64(x), activation=silu)
        return compare({"y": y}, {"y": y64}, d.dtype)
    shape = d.shape()
    x["x"] = d.placed(torch.randn(shape.B, shape.T, D).to(d.dtype))
    x["past"] = d.placed(torch.randn(shape.sequences, W - 1, D).to(d.dtype)) if d.maybe(0.5) else None
    lengths = None if shape.lengths is None else torch.tensor([0, *shape.lengths]).cumsum(0)
    x["cu_seqlens"] = None if lengths is None else at_odd_address(lengths, of.choice((0, 1, 4)))

    def run(x: dict[str, Any]) -> dict[str, Any]:
        return dict(zip(("y", "last"), short_convolution(**x, activation=silu), strict=True))

    gradients = d.maybe(0.5)
    actual = results(x, gradients, run)
    if d.compares:
        compare(actual, results(to_float64(x), gradients, run), d.dtype)
    return None


def norms(d: Draw) -> None:
    of, V = d.of, d.of.choice(WIDTHS)
    size = (of.choice((1, 2)), of.choice(LENGTHS), of.choice((1, 2, 3)), V)
    x = {n: d.placed(torch.randn(size).to(d.dtype)) for n in ("x", "gate")}
    x["weight"] = d.placed(torch.rand(V).to(of.choice((d.dtype, torch.float32))))
    gradients, activation = d.maybe(0.5), of.choice(("silu", "sigmoid"))

    def run(x: dict[str, Any]) -> dict[str, Any]:
        return {"y": gated_rms_norm(**x, eps=1e-5, activation=activation)}

    actual = results(x, gradients, run)
    if d.compares:
        compare(actual, results(to_float64(x), gradients, run), d.dtype)


KINDS: dict[Callable[[Draw], None], int] = {
    rules: 8, spoilt: 1, steps: 3, ingestions: 4, stacks: 1, convolutions: 3, norms: 2,
}  # fmt: skip


def one(seed: int) -> tuple[str, str]:
    """(kind, "" or why it was refused); raises what is a failure."""
    d = Draw(seed)
    kind = d.of.choices(list(KINDS), list(KINDS.values()))[0]
    try:
        kind(d)
    except REFUSED as error:
        return kind.__name__, str(error) or repr(error)
    return kind.__name__, ""


def run(calls: int, first: int) -> int:
    """How many calls fail of those with seeds from `first` on; prints a line for each, and how many there were."""
    made, refused, failures = Counter[str](), Counter[str](), 0
    began = time.monotonic()
    for seed in range(first, first + calls):
        try:
            kind, refusal = one(seed)
        except Exception as error:
            failures += 1
            print(f"seed {seed}: {type(error).__name__}: {str(error).splitlines()[0]}", flush=True)
            continue
        made[kind] += 1
        refused[kind] += bool(refusal)
    kinds = ", ".join(f"{kind} {n} ({refused[kind]} refused)" for kind, n in sorted(made.items()))
    print(f"isa {_C.isa()}: {calls} calls, {sum(refused.values())} refusals, {failures} failures; "
          f"{time.monotonic() - began:.0f} s; {kinds}")  # fmt: skip
    return failures


def under_sanitizers(arguments: list[str]) -> int:
    """Exit status of this program with these arguments, then of the tests of the kernels, on a module of its own."""
    with tempfile.TemporaryDirectory() as folder:
        load = native.loading(native.build(Path(folder), "-DSLEEPKERN_SANITIZE=ON"))
        fuzz = f"from tests.hardening import fuzz_calls\nsys.argv[1:] = {arguments}\nsys.exit(fuzz_calls.main())"
        tests = f"import pytest\nsys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', *{KERNEL_TESTS}]))"
        environment = native.sanitized()
        commands = ([sys.executable, "-c", load + code] for code in (fuzz, tests))
        return max(abs(subprocess.run(c, check=False, cwd=native.ROOT, env=environment).returncode) for c in commands)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="seeds from here times a million on")
    parser.add_argument("--first", type=int, help="the first seed itself")
    parser.add_argument("--isa", help="instruction set, the best one unless given")
    parser.add_argument("--sanitize", action="store_true", help="on a module with sanitizers, and tests of the kernels")
    chosen = parser.parse_args()
    if chosen.sanitize:
        return under_sanitizers([argument for argument in sys.argv[1:] if argument != "--sanitize"])
    faulthandler.enable()
    torch.set_num_threads(1)
    if chosen.isa:
        _C.set_isa(chosen.isa)
    return run(chosen.calls, chosen.first if chosen.first is not None else chosen.seed * 1_000_000) > 0


if __name__ == "__main__":
    sys.exit(main())
