"""`sleep_blocks` remembers what the checks and the choice said: any other call gives what it gives without a memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from helpers.block_stacks import all_of, model
from torch import Tensor
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._python_dispatch import TorchDispatchMode

from sleepkern import backends, settings
from sleepkern.backends.native import witness
from sleepkern.ops import blocks as ops
from sleepkern.ops import known_blocks
from sleepkern.sleep.blocks import sleep_blocks
from sleepkern.state import KVState, RecurrentState

pytestmark = pytest.mark.skipif(not witness._usable, reason="this torch has no exchange table of tensors")
LM = model(24, 2, {})
BLOCKS = LM.blocks()
Given = dict[str, Any]
FIND = known_blocks.find


@pytest.fixture(autouse=True)
def nothing_remembered() -> None:
    witness._witnesses.clear()


def given(**more: Any) -> Given:
    torch.manual_seed(0)
    return {"h": torch.randn(2, 9, 24), "blocks": BLOCKS, "passes": 2, **more}


def states(tokens: int = 9) -> list[Any]:
    with torch.no_grad():
        return list(sleep_blocks(torch.randn(2, tokens, 24), BLOCKS).states)


def warm(**more: Any) -> None:
    with torch.no_grad():
        for _ in range(3):
            sleep_blocks(**given(**more))


def remembered(call: Given) -> bool:
    """Tells whether a call takes a remembered answer."""
    found: list[Any] = []

    def find(*arguments: Any) -> Any:
        found.append(FIND(*arguments))
        return found[-1]

    with mock.patch.object(known_blocks, "find", find):
        attempt(call)
    return found[0] is not None


def attempt(call: Given) -> Any:
    try:
        return all_of(sleep_blocks(**call))
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def equal(call: Given) -> bool:
    """Tells whether a call gives what it gives where nothing is remembered."""
    found = attempt(call)
    with (
        mock.patch.object(known_blocks, "find", return_value=None),
        mock.patch.object(ops, "known_layers", return_value=None),
    ):
        fresh = attempt(call)
    if isinstance(found, str) or isinstance(fresh, str):
        return bool(found == fresh)
    pairs = list(zip(found, fresh, strict=True))
    return all(a.dtype == b.dtype and a.requires_grad == b.requires_grad and torch.allclose(a, b) for a, b in pairs)


@torch.no_grad()
def test_an_equal_call_is_remembered() -> None:
    kept = states()
    for more in ({}, {"states": kept}, {"states": [None, kept[1], None]}, {"backend": "cpu"}, {"backend": "modules"}):
        warm(**more)
        assert remembered(given(**more)) and equal(given(**more))
        assert equal(given(**more) | {"h": torch.randn(2, 9, 24)})


CHANGES: dict[str, Callable[[Given], Given]] = {
    "passes": lambda c: c | {"passes": 3}, "feedback": lambda c: c | {"feedback": "reinject"},
    "conv_state": lambda c: c | {"conv_state": "carry"}, "backend": lambda c: c | {"backend": "modules"},
    "no such feedback": lambda c: c | {"feedback": "loud"}, "no such backend": lambda c: c | {"backend": "tpu"},
    "passes that are True": lambda c: c | {"passes": True}, "passes of a float": lambda c: c | {"passes": 2.0},
    "no passes": lambda c: c | {"passes": 0}, "feedback that is none": lambda c: c | {"feedback": ["raw"]},
    "more windows": lambda c: c | {"h": torch.randn(3, 9, 24)},
    "more tokens": lambda c: c | {"h": torch.randn(2, 10, 24)},
    "wider": lambda c: c | {"h": torch.randn(2, 9, 25)}, "another type": lambda c: c | {"h": c["h"].double()},
    "another device": lambda c: c | {"h": c["h"].to("meta")}, "sparse": lambda c: c | {"h": c["h"].to_sparse()},
    "negative": lambda c: c | {"h": torch._neg_view(-c["h"])}, "no tensor": lambda c: c | {"h": 3},
    "a parameter": lambda c: c | {"h": torch.nn.Parameter(c["h"])}, "freed": lambda c: c | {"h": freed(c["h"])},
    "not contiguous": lambda c: c | {"h": c["h"].transpose(0, 1).contiguous().transpose(0, 1)},
    "a tuple": lambda c: c | {"blocks": tuple(c["blocks"])}, "an iterator": lambda c: c | {"blocks": iter(c["blocks"])},
    "no blocks": lambda c: c | {"blocks": []}, "a block less": lambda c: c | {"blocks": c["blocks"][:2]},
    "another order": lambda c: c | {"blocks": [c["blocks"][0], *c["blocks"][:0:-1]]},
    "states": lambda c: c | {"states": states()}, "states of more tokens": lambda c: c | {"states": states(11)},
    "states of none": lambda c: c | {"states": [None] * 3}, "a state too few": lambda c: c | {"states": states()[:2]},
}  # fmt: skip
STATES: dict[str, Callable[[list[Any]], Any]] = {
    "more tokens": lambda s: states(11), "of none": lambda s: [None] * 3, "one of none": lambda s: [None, *s[1:]],
    "a state too few": lambda s: s[:2], "a tuple": tuple, "another order": lambda s: [s[1], s[0], s[2]],
    "another type": lambda s: [type(x)(*(t.double() for t in x)) for x in s],
    "another shape": lambda s: [s[0], RecurrentState(s[1].conv[:1], s[1].state), s[2]],
    "another shape of a state": lambda s: [s[0], RecurrentState(s[1].conv, s[1].state[:, :1]), s[2]],
    "another device": lambda s: [s[0], RecurrentState(s[1].conv, s[1].state.to("meta")), s[2]],
    "no tensor": lambda s: [s[0], RecurrentState(s[1].conv, 3), s[2]],
    "another kind": lambda s: [KVState(*s[1]), *s[1:]],
    "negative": lambda s: [KVState(torch._neg_view(-s[0].keys), s[0].values), *s[1:]],
    "freed": lambda s: [KVState(freed(s[0].keys), s[0].values), *s[1:]], "no list": lambda s: 3,
    "integers": lambda s: [s[0], RecurrentState(s[1].conv, s[1].state.long()), s[2]],
}  # fmt: skip


def freed(t: Tensor) -> Tensor:
    t = t.clone()
    t.untyped_storage().resize_(0)
    return t


@torch.no_grad()
@pytest.mark.parametrize("name", CHANGES)
def test_another_call(name: str) -> None:
    warm()
    call = CHANGES[name](given())
    if name == "an iterator":
        assert torch.equal(attempt(call)[0], attempt(given())[0])
        return
    assert name == "not contiguous" or not remembered(call)
    assert equal(call) and equal(call) and equal(given())
    warm()
    assert remembered(given())


@torch.no_grad()
@pytest.mark.parametrize("name", STATES)
def test_other_states(name: str) -> None:
    kept = states()
    warm(states=kept)
    assert remembered(given(states=kept))
    call = given(states=STATES[name](kept))
    assert not remembered(call)
    assert equal(call) and equal(call) and equal(given(states=kept))


class Watching(TorchDispatchMode):
    """A mode that sees every operator and changes nothing."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def test_what_is_around_the_call() -> None:
    warm()
    patches: list[Callable[[], Any]] = [
        torch.enable_grad, lambda: torch.autocast("cpu", torch.bfloat16), Watching,
        torch.autograd.forward_ad.dual_level, lambda: mock.patch.object(settings, "BACKEND", "reference"),
        lambda: mock.patch.object(backends, "BLOCK_BACKENDS", backends.BLOCK_BACKENDS[::-1]),
        lambda: mock.patch.object(known_blocks, "_compiling", return_value=True),
        lambda: mock.patch.object(known_blocks, "_precision", return_value="medium"),
        lambda: mock.patch.object(known_blocks, "_transforms", return_value=object()),
    ]  # fmt: skip
    for patch in patches:
        warm()
        assert remembered(given())
        call = given()
        with patch():
            assert not remembered(call)
    warm()
    hook = register_module_forward_hook(lambda module, *more: None)
    try:
        assert not remembered(given()) and equal(given())
    finally:
        hook.remove()
    assert remembered(given())


def test_gradients_are_recorded() -> None:
    warm()
    assert sleep_blocks(**given()).h.requires_grad
    with torch.no_grad():
        assert remembered(given()) and not sleep_blocks(**given()).h.requires_grad


@torch.no_grad()
def test_not_more_than_so_many_are_kept() -> None:
    warm()
    with mock.patch.object(known_blocks, "MOST", 4):
        for passes in range(1, 9):
            sleep_blocks(**given(passes=passes))
        found = witness._witnesses[BLOCKS[0]][len(BLOCKS)]
        assert len(found.answers) <= 64 and remembered(given(passes=8))
