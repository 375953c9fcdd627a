"""What is remembered of a call is taken by equal calls only: the key has all that the checks or the choice look at."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from sleepkern import backends, settings
from sleepkern.ops import known_calls
from sleepkern.problems.recurrence import Tensors
from sleepkern.rules import DELTA_RULE, GATED_DELTA_RULE, Rule
from sleepkern.testing import Shape, make_inputs

NAMES = ("q", "k", "v", "g", "beta", "initial_state", "cu_seqlens")


@pytest.fixture(autouse=True)
def remembered() -> Iterator[None]:
    """Calls on the CPU are remembered as those on a GPU are."""
    known_calls._known.clear()
    with mock.patch.object(known_calls, "DEVICES", ("cpu",)):
        yield
    known_calls._known.clear()


def base(rule: Rule = GATED_DELTA_RULE) -> Tensors:
    x = make_inputs(rule, Shape(B=2, T=9, H=1, HV=2, K=8, V=4), torch.float32, seed=1)
    return Tensors(*(x.get(name) for name in NAMES))


def checked(call: Callable[[], Any]) -> bool:
    """Tells whether a call is checked, or takes a remembered answer."""
    refusals = contextlib.suppress(TypeError, ValueError, NotImplementedError)
    with mock.patch.object(known_calls, "check", wraps=known_calls.check) as check, refusals:
        call()
    return bool(check.call_count)


def asked(
    x: Tensors,
    rule: Rule = GATED_DELTA_RULE,
    scale: Any = None,
    normalize: Any = False,
    backend: Any = None,
    *replay: Any,
) -> Any:
    return known_calls.check_and_choose(rule, x, scale, normalize, backend, *replay)


def test_an_equal_call_is_remembered() -> None:
    x = base()
    assert checked(lambda: asked(x)) and not checked(lambda: asked(x))
    assert not checked(lambda: asked(x._replace(k=torch.zeros_like(x.k)))), "values and addresses are no part of it"
    problem, engine = asked(x)
    assert problem.T == 9 and engine is asked(x)[1]


CHANGES: dict[str, Callable[[Tensor], Any]] = {
    "shape": lambda t: t[:, :1], "another dimension": lambda t: t[None], "type": lambda t: t.bfloat16(),
    "device": lambda t: t.to("meta"), "layout": lambda t: t.to_sparse(), "none": lambda t: None, "number": lambda t: 3,
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", Tensors._fields[:6])
def test_a_tensor_that_differs(name: str, change: str) -> None:
    x = base()
    asked(x)
    other = x._replace(**{name: CHANGES[change](getattr(x, name))})
    if name == "k" and change in ("none", "number", "device"):
        assert checked(lambda: asked(other))  # it says the device
        return
    assert checked(lambda: asked(other))
    assert not checked(lambda: asked(x))


def test_packed_sequences_of_another_number() -> None:
    x = base()
    row = Tensors(*(None if t is None else t[:1] for t in x))._replace(state=torch.zeros(2, 2, 8, 4))
    two = row._replace(cu_seqlens=torch.tensor([0, 4, 9]))
    asked(two)
    assert not checked(lambda: asked(two._replace(cu_seqlens=torch.tensor([0, 5, 9])))), "where they begin is a value"
    assert checked(lambda: asked(two._replace(cu_seqlens=torch.tensor([0, 9]))))
    assert checked(lambda: asked(two._replace(cu_seqlens=torch.tensor([0, 4, 9], dtype=torch.int32))))
    assert checked(lambda: asked(row))


def test_an_option_that_differs() -> None:
    x = base()
    asked(x, GATED_DELTA_RULE, 1.0, False, None, 2, 0.5, "auto", True)
    same: tuple[Any, ...] = (GATED_DELTA_RULE, 1.0, False, None, 2, 0.5, "auto", True)
    assert not checked(lambda: asked(x, *same))
    others = (
        (DELTA_RULE,), (2.0, None), (True,), ("reference",), (3, 1), (0.25, None), ("wy",), (False,),
    )  # fmt: skip
    for position, values in enumerate(others):
        for value in values:
            assert checked(lambda: asked(x, *same[:position], value, *same[position + 1 :])), (position, value)  # noqa: B023


def test_an_option_that_equals_another_of_the_usual_type() -> None:
    """1 == True == 1.0, and not all of them are accepted."""
    x = base()
    asked(x, GATED_DELTA_RULE, 1.0, False, None, 1)
    asked(x, GATED_DELTA_RULE, 1.0, True, None, 2, 1.0)
    for options in ((1, False, None, 1), (True, False, None, 1), (1.0, 0, None, 1), (1.0, False, None, True),
                    (1.0, False, None, 1.0), (1.0, 1, None, 2, 1.0), (1.0, True, None, 2, 1)):  # fmt: skip
        assert checked(lambda: asked(x, GATED_DELTA_RULE, *options)), options  # noqa: B023
        assert checked(lambda: asked(x, GATED_DELTA_RULE, *options)), "it is not remembered either"  # noqa: B023


def test_what_the_choice_looks_at_beside_the_call() -> None:
    x = base()
    asked(x)
    with mock.patch.object(settings, "BACKEND", "reference"):
        assert checked(lambda: asked(x)) and asked(x)[1].NAME == "reference"
    with mock.patch.object(backends, "BACKENDS", backends.BACKENDS[::-1]):
        assert checked(lambda: asked(x)) and asked(x)[1].NAME == "reference"
    assert asked(x)[1].NAME == "cpu"
    precision = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium" if precision != "medium" else "high")
        assert checked(lambda: asked(x))
    finally:
        torch.set_float32_matmul_precision(precision)
    assert not checked(lambda: asked(x))


def test_a_transform_is_asked_anew() -> None:
    x = base()
    asked(x)

    def loss(k: Tensor) -> Tensor:
        assert checked(lambda: asked(x._replace(k=k)))
        assert asked(x)[1].NAME == "chunked", "the one whose operators a transform can differentiate"
        return k.sum()

    torch.func.grad(loss)(x.k)
    assert not checked(lambda: asked(x)) and asked(x)[1].NAME == "cpu"


def test_not_more_than_so_many_are_kept() -> None:
    with mock.patch.object(known_calls, "MOST", 3):
        for T in range(1, 7):
            x = make_inputs(GATED_DELTA_RULE, Shape(T=T, K=8, V=4), torch.float32)
            asked(Tensors(*(x.get(name) for name in NAMES)))
    assert len(known_calls._known) == 3
