"""A plain decode goes to the CUDA kernel past the checks in Python; every other call takes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import sleepkern
from sleepkern import settings
from sleepkern.backends.cuda import recurrence as cuda
from sleepkern.ops import fast_path
from sleepkern.rules import Rule
from sleepkern.testing import TOLERANCE, Shape, call, make_inputs, relative_error, rules_of, to_float64

RULES = rules_of("cuda")
SHAPES = (
    Shape(B=2, T=1, H=1, HV=2, K=24, V=37),
    Shape(T=8, H=2, HV=2, K=96, V=40),
    Shape(B=3, T=3, H=1, HV=1, K=5, V=3),
)
pytestmark = pytest.mark.skipif(not fast_path._usable, reason="this torch has no exchange table of tensors")


@pytest.fixture
def decode(module: ModuleType, on: Callable[..., Any]) -> Iterator[mock.Mock]:
    """The C++ function, which takes CPU tensors for a GPU's; the CPU's own fast path refuses all calls."""
    assert module.use_exchange_api(Tensor.__dlpack_c_exchange_api__)
    watched = mock.Mock(wraps=module.try_fast_decode)
    with on():
        cuda._C.try_fast_decode = watched
        with mock.patch.multiple(
            fast_path, _run=lambda *_: False, _decoding_gpu=lambda t: 0, _raw_stream=lambda index: 0, _cuda_first=True
        ):
            yield watched


def stepped(rule: Rule, x: dict[str, Any], **options: Any) -> tuple[Tensor, Tensor]:
    arguments = {n: t for n, t in x.items() if n not in ("initial_state", "cu_seqlens")}
    return sleepkern.recurrent_step(**arguments, state=x["initial_state"], rule=rule, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_against_the_reference(rule: Rule, shape: Shape, dtype: torch.dtype, decode: mock.Mock) -> None:
    x = make_inputs(rule, shape, dtype, seed=5)
    expected_o, expected = call(rule, to_float64(x), "reference")
    before = x["initial_state"]._version
    o, state = stepped(rule, x)
    assert decode.call_count == 1 and state is x["initial_state"] and state._version > before
    assert relative_error(o, expected_o) < TOLERANCE[dtype]
    assert relative_error(state, expected) < TOLERANCE[torch.float32]


def test_slices_of_a_projection_are_read_in_place(decode: mock.Mock) -> None:
    """Rows of a wider tensor, as a model's projection has them."""
    rule, shape = RULES["gated_delta_rule"], Shape(B=2, T=1, H=2, HV=2, K=16, V=16)
    x = make_inputs(rule, shape, torch.bfloat16, seed=6)
    wide = torch.cat([x[n].flatten(2) for n in ("q", "k", "v")], dim=-1)
    expected_o, expected = call(rule, to_float64(x), "reference")
    for n, part in zip(("q", "k", "v"), wide.split(32, dim=-1), strict=True):
        x[n] = part.unflatten(-1, (2, 16))
    o, state = stepped(rule, x)
    assert relative_error(o, expected_o) < TOLERANCE[torch.bfloat16]
    assert relative_error(state, expected) < TOLERANCE[torch.float32]


def test_other_calls_are_left_to_the_checks(decode: mock.Mock) -> None:
    """They launch nothing here, and leave the state as it is."""
    rule = RULES["gated_delta_rule"]

    def taken(change: Callable[[dict[str, Any]], None], T: int = 1, **options: Any) -> bool:
        x = make_inputs(rule, Shape(B=2, T=T, H=1, HV=2, K=16, V=16), torch.bfloat16, seed=7)
        change(x)
        before = x["initial_state"].clone()
        arguments = [x[n] for n in ("q", "k", "v", "g", "beta", "initial_state")]
        o = fast_path.step(rule, *arguments, None, False, options.get("backend"))
        assert o is not None or torch.equal(x["initial_state"], before)
        return o is not None

    def put(name: str, value: Callable[[Tensor], Any]) -> Callable[[dict[str, Any]], None]:
        return lambda x: x.update({name: value(x[name])})

    assert taken(lambda x: None)
    assert not taken(lambda x: None, T=9)  # more tokens than the kernel takes
    assert not taken(lambda x: None, backend="cpu")
    assert not taken(put("q", lambda t: t.float()))  # another type than k's
    assert not taken(put("beta", lambda t: t[..., :1]))  # another shape
    assert not taken(put("g", lambda t: None))
    assert not taken(put("initial_state", lambda t: t.double()))
    assert not taken(put("initial_state", lambda t: t.bfloat16()))  # the checks describe it, then the kernel reads it
    assert not taken(put("initial_state", lambda t: t.transpose(2, 3)))  # not contiguous
    assert not taken(put("k", lambda t: t.requires_grad_()))
    assert not taken(put("v", lambda t: t.to("meta")))  # another device
    assert not taken(
        lambda x: x.update(q=x["initial_state"].view(torch.bfloat16)[:, :, :1, :16].transpose(1, 2)[:, :, :1])
    )
    with mock.patch.object(settings, "DEBUG", True):
        assert not taken(lambda x: None)
    with mock.patch.object(fast_path, "_cuda_first", False):
        assert not taken(lambda x: None)
    with mock.patch.object(settings, "BACKEND", "triton"):
        assert not taken(lambda x: None)


def test_a_gpu_that_is_not_the_current_device_takes_the_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast_path, "_current_device", lambda: 1)
    monkeypatch.setattr(cuda, "why_not_on", lambda device: None)
    monkeypatch.setattr(fast_path, "_decoding", {})
    here, there = mock.Mock(**{"get_device.return_value": 1}), mock.Mock(**{"get_device.return_value": 0})
    assert fast_path._decoding_gpu(here) == 1 and fast_path._decoding_gpu(there) is None
    assert fast_path._decoding_gpu(torch.zeros(1)) is None
    monkeypatch.setattr(cuda, "why_not_on", lambda device: "needs compute capability 8.0")
    monkeypatch.setattr(fast_path, "_decoding", {})
    assert fast_path._decoding_gpu(here) is None
