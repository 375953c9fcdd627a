"""States along the way by the C++ kernels: forward and every gradient, cuts between chunks, threads, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sleepkern.backends.native.module import _C
from sleepkern.rules import GATED_DELTA_RULE, Rule
from sleepkern.testing import TOLERANCE, Shape, call, make_inputs, relative_error, to_float64

PACKED = Shape(H=1, HV=2, K=24, V=16, lengths=(0, 1, 64, 0, 65, 17, 3, 130))
CASES: dict[str, tuple[Shape, int, dict[str, Any]]] = {
    "no token": (Shape(B=2, T=0, K=8, V=8), 16, {}),
    "one token": (Shape(B=2, T=1, H=1, HV=2, K=24, V=16), 16, {}),
    "T=15": (Shape(T=15, H=1, HV=1, K=24, V=19), 16, {"decay": "zero"}),
    "T=17": (Shape(T=17, H=1, HV=1, K=24, V=19), 16, {"initial_state": False}),
    "T=63": (Shape(T=63, H=1, HV=1, K=48, V=32), 48, {"decay": "strong"}),
    "T=65": (Shape(T=65, H=1, HV=1, K=32, V=48), 64, {"decay": "extreme"}),
    "K=96 V=256": (Shape(T=100, H=1, HV=1, K=96, V=256), 80, {"decay": "mixed"}),
    "grouped": (Shape(B=2, T=150, H=2, HV=6, K=21, V=9), 48, {}),
    "equal keys": (Shape(T=90, H=1, HV=1, K=32, V=32), 32, {"beta_max": 2.0, "correlation": 1.0}),
    "T=130": (Shape(T=130, H=1, HV=1, K=40, V=24), 128, {}),
    "packed": (PACKED, 48, {}),
}
TWO_SEGMENTS = Shape(T=1100, H=1, HV=1, K=16, V=16)
"""A length that with n = 16 has 69 chunks, more than a segment of the backward."""


def results(rule: Rule, x: dict[str, Any], backend: str, n: int, upstream: str = "o S states") -> dict[str, Tensor]:
    """o, final state, states along the way, and the gradients of all inputs under random ones of those named."""
    leaves = {k: t.detach().clone().requires_grad_() for k, t in x.items() if t is not None and t.is_floating_point()}
    made = dict(zip(("o", "S", "states"), call(rule, {**x, **leaves}, backend, state_every=n), strict=True))
    generator = torch.Generator().manual_seed(5)
    above = {name: torch.randn(t.shape, generator=generator).to(t) for name, t in made.items() if t is not None}
    chosen = [name for name in above if name in upstream.split()]
    torch.autograd.backward([made[name] for name in chosen], [above[name] for name in chosen])
    gradients = {f"d{name}": t.grad for name, t in leaves.items() if t.grad is not None}
    return {**{name: t.detach() for name, t in made.items()}, **gradients}


def compare(actual: dict[str, Tensor], expected: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> None:
    """Compare with float64; what is too small for float32, such as gradients through exp(-200), is to be 0."""
    assert actual.keys() == expected.keys()
    for name, truth in expected.items():
        assert actual[name].shape == truth.shape
        if float(truth.norm()) < 1e-30:
            assert float(actual[name].norm()) <= 1e-30, name
        else:
            error = relative_error(actual[name], truth)
            assert error <= max(TOLERANCE[torch.float32], TOLERANCE[dtype]), (name, error)


@pytest.mark.computed_by("cpu")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_states_and_gradients(rule: Rule, case: tuple[Shape, int, dict[str, Any]]) -> None:
    shape, n, options = case
    x = make_inputs(rule, shape, seed=1, **options)
    actual = results(rule, x, "cpu", n)
    compare(actual, results(rule, to_float64(x), "reference", n))
    assert actual["states"].dtype == torch.float32
    if shape.lengths is None and shape.T > 0:
        assert torch.equal(actual["states"][:, -1], actual["S"])


@pytest.mark.computed_by("cpu")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_types(rule: Rule, dtype: torch.dtype) -> None:
    x = make_inputs(rule, PACKED, dtype, seed=2)
    compare(results(rule, x, "cpu", 48), results(rule, to_float64(x), "reference", 48), dtype)


@pytest.mark.computed_by("cpu")
def test_each_instruction_set(rule: Rule, isa: str) -> None:
    shape = Shape(B=2, T=70, H=1, HV=2, K=37, V=51)
    for n, upstream in ((16, "states"), (48, "S states")):
        x = make_inputs(rule, shape, seed=3)
        compare(results(rule, x, "cpu", n, upstream), results(rule, to_float64(x), "reference", n, upstream))


@pytest.mark.computed_by("cpu")
def test_several_segments_of_a_backward(rule: Rule) -> None:
    """chunked is the reference here, whose token loop would take a second for each rule."""
    x = make_inputs(rule, TWO_SEGMENTS, seed=4)
    compare(results(rule, x, "cpu", 16), results(rule, to_float64(x), "chunked", 16))


@pytest.mark.computed_by("cpu")
def test_two_threads_give_the_same_bits(rule: Rule) -> None:
    """One head and two threads: each computes half of the value columns."""
    for shape in (Shape(T=100, H=1, HV=1, K=32, V=64), PACKED):
        x, found = make_inputs(rule, shape, seed=5), []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(results(rule, x, "cpu", 48))
        assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_states_beyond_the_sequence_are_the_last_ones() -> None:
    x = make_inputs(GATED_DELTA_RULE, Shape(T=40, H=1, HV=1, K=16, V=16), seed=6)
    _, S, states = call(GATED_DELTA_RULE, x, "cpu", state_every=2**62)  # type: ignore[misc]
    assert states.shape == (1, 1, 1, 16, 16) and torch.equal(states[:, 0], S)


def test_every_number_of_tokens_is_right_below_python() -> None:
    """Python takes multiples of 16 alone; the kernels cut at any n, and keep states of the token by token path too."""
    for T, n in ((5, 2), (4, 1), (40, 7), (33, 33)):
        x = make_inputs(GATED_DELTA_RULE, Shape(T=T, H=1, HV=1, K=8, V=8), seed=7)
        *_, expected = call(GATED_DELTA_RULE, to_float64(x), "reference", state_every=n)
        states = torch.empty(expected.shape)
        o, S = torch.empty_like(x["v"]), torch.empty_like(x["initial_state"])
        views = {name: (x[name].data_ptr(), 8 if name in "qkv" else 1, 0) for name in ("q", "k", "v", "g", "beta")}
        sizes = {"sequences": 1, "T": T, "H": 1, "HV": 1, "K": 8, "V": 8}
        rule: dict[str, Any] = {"gate": 1, "delta": True, "normalize": False, "scale": 8**-0.5}
        _C.forward_keeping_states(
            **rule, **sizes, **views, offsets=0, state=x["initial_state"].data_ptr(), o=o.data_ptr(),
            final_state=S.data_ptr(), state_every=n, state_count=expected.shape[1], states=states.data_ptr(),
        )  # fmt: skip
        assert relative_error(states, expected) <= TOLERANCE[torch.float32]


def test_numbers_of_tokens_that_are_refused() -> None:
    x = make_inputs(GATED_DELTA_RULE, Shape(T=40, H=1, HV=1, K=16, V=16), seed=6)
    with pytest.raises(ValueError, match="multiple of 16 tokens, got state_every = 20"):
        call(GATED_DELTA_RULE, x, "cpu", state_every=20)
