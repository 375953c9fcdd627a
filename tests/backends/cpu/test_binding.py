"""The native module refuses numbers that cannot be sizes, codes or addresses of a call, and can be interrupted."""

from __future__ import annotations

import math
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import sleepkern
from sleepkern.backends import chunked, torch_common
from sleepkern.backends.native import module
from sleepkern.backends.native.module import _C
from sleepkern.backends.replay.methods import closed
from sleepkern.nn import SleepLM
from sleepkern.rules import GATED_DELTA_RULE, SIMPLE_GLA
from sleepkern.sleep.blocks import sleep_blocks
from sleepkern.testing import Shape, make_inputs, relative_error

ROOM = torch.zeros(4096)
AT = ROOM.data_ptr()
VIEW, ARRAY = (AT, 8, 0), (AT, 0)
ABSENT = (0, 0, 0)
PROBLEM: dict[str, Any] = {
    "gate": 1, "delta": True, "normalize": False, "scale": 1.0, "sequences": 1, "T": 2, "H": 1, "HV": 1, "K": 8, "V": 8,
    "offsets": 0, "q": VIEW, "k": VIEW, "v": VIEW, "g": VIEW, "beta": VIEW, "state": 0,
}  # fmt: skip
FORWARD = PROBLEM | {"o": AT, "final_state": AT}
BACKWARD = PROBLEM | {
    "do": VIEW, "dfinal": 0, "dq": AT, "dk": AT, "key_type": 0, "dv": AT, "dg": AT, "dbeta": AT, "dstate": AT,
}  # fmt: skip
REPLAY = PROBLEM | {
    "final_state": AT, "rank": False, "passes": 2, "tol": 0.0, "before": 0, "residual": 0, "passes_done": 0,
}  # fmt: skip
KEEPING = FORWARD | {"state_every": 16, "state_count": 1, "states": AT}
KEEPING_BACKWARD = BACKWARD | {"state_every": 16, "state_count": 1, "dstates": AT}
NO_STATES, STATES = (0, 0, 0, 0, 0), (AT, 64, 64, 2, 0)
INDICES = np.array([1, 2])
DECODE = {name: value for name, value in PROBLEM.items() if name != "state"} | {
    "raw_decay": False, "lower_bound": 0.0, "beta_scale": 0.0, "A_log": (0, 0), "dt_bias": (0, 0), "o": AT,
    "state_type": 0, "states": STATES, "each_token": False, "states_out": NO_STATES,
}  # fmt: skip
CONVOLUTION = {
    "sequences": 1, "T": 2, "D": 8, "W": 4, "offsets": 0, "silu": True, "x": VIEW, "weight": ARRAY, "bias": (0, 0),
    "past": 0,
}  # fmt: skip
CONVOLVE = CONVOLUTION | {"y": AT, "last": AT}
STEP = {
    "B": 1, "D": 8, "W": 4, "silu": True, "x": VIEW, "weight": ARRAY, "bias": (0, 0), "state": AT, "y": AT,
}  # fmt: skip
NORM = {
    "tokens": 2, "heads": 1, "V": 8, "silu": True, "gate_first": False, "eps": 1e-6, "x": VIEW, "gate": VIEW,
    "weight": ARRAY, "weight_heads": False, "y": AT,
}  # fmt: skip
BLOCKS = {
    "B": 1, "L": 1, "d": 8, "passes": 1, "reinject": False, "carry": False, "form": _C.Form.plain, "layers": [],
    "h": AT, "changes": AT,
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("gate", 3, "gate: got 3; expected from 0 to 2"),
        ("sequences", -1, "sequences: got -1; expected at least 0"),
        ("T", -1, "T: got -1; expected at least 0"),
        ("H", 0, "H: got 0; expected at least 1"),
        ("HV", 0, "HV: got 0; expected at least 1"),
        ("K", 0, "K: got 0; expected from 1 to 256"),
        ("V", 257, "V: got 257; expected from 1 to 256"),
        ("sequences", 2**62, "sequences, T, HV, K, V: got a product beyond 2^60"),
        ("k", ABSENT, "k: got address 0"),
        ("v", (AT, 8, 7), "v: got 7; expected from 0 to 2"),
        ("g", ABSENT, "g: got address 0"),
        ("beta", (AT, -8, 0), "beta: got -8; expected at least 0"),
    ],
)
def test_numbers_of_a_problem(name: str, value: Any, message: str) -> None:
    for entry, fields in ((_C.forward, FORWARD), (_C.backward, BACKWARD), (_C.replay, REPLAY)):
        with pytest.raises(ValueError, match=re.escape(message)):
            entry(**fields | {name: value})


@pytest.mark.parametrize("offsets", [(0, 3), (1, 2), (0, -1), (0, 2**40)])
def test_offsets_that_are_not_those_of_the_tokens(offsets: tuple[int, int]) -> None:
    at = np.array(offsets)
    with pytest.raises(ValueError, match="cu_seqlens: got .* expected offsets that rise from 0 to 2"):
        _C.forward(**FORWARD | {"offsets": at.ctypes.data})


@pytest.mark.parametrize(
    ("entry", "fields", "message"),
    [
        ("forward", FORWARD | {"o": 0}, "o: got address 0"),
        ("forward", FORWARD | {"final_state": 0}, "final_state: got address 0"),
        ("forward", FORWARD | {"H": 2, "HV": 3}, "HV: got 3"),
        ("backward", BACKWARD | {"key_type": 5}, "key_type: got 5"),
        ("backward", BACKWARD | {"HV": 2, "key_type": 1}, "key_type: got 1; expected 0 where H < HV"),
        ("backward", BACKWARD | {"dk": 0}, "dk: got address 0"),
        ("backward", BACKWARD | {"do": ABSENT}, "do: got address 0"),
        ("forward_keeping_states", KEEPING | {"state_every": 0}, "state_every: got 0; expected at least 1"),
        ("forward_keeping_states", KEEPING | {"state_count": 2}, "state_count: got 2; expected 1, the states that"),
        ("forward_keeping_states", KEEPING | {"states": 0}, "states: got address 0"),
        ("backward_keeping_states", KEEPING_BACKWARD | {"state_every": -16}, "state_every: got -16"),
        ("backward_keeping_states", KEEPING_BACKWARD | {"state_count": 0}, "state_count: got 0; expected 1"),
        ("backward_keeping_states", KEEPING_BACKWARD | {"dstates": 0}, "dstates: got address 0"),
        ("decode", DECODE | {"o": 0}, "o: got address 0"),
        ("decode", DECODE | {"state_type": 2}, "state_type: got 2; expected 0 or 1, float32 or bfloat16"),
        ("decode", DECODE | {"states": (0, 64, 64, 2, 0)}, "states: got address 0"),
        ("decode", DECODE | {"states": (AT, -64, 64, 2, 0)}, "states: got -64; expected at least 0"),
        ("decode", DECODE | {"states": (AT, 64, -1, 2, 0)}, "states: got -1; expected at least 0"),
        ("decode", DECODE | {"states": (AT, 2**61, 64, 2, 0)}, "states: got a product beyond 2^60"),
        ("decode", DECODE | {"states": (AT, 64, 64, 0, 0)}, "states: got 0 rows; expected at least 1"),
        (
            "decode",
            DECODE | {"states": (AT, 64, 64, 1, INDICES.ctypes.data)},
            "states: got index 1; expected less than",
        ),
        ("decode", DECODE | {"each_token": True}, "states_out: got 0 rows; expected at least 2"),
        ("decode", DECODE | {"each_token": True, "states_out": (AT, 64, 64, 2, INDICES.ctypes.data)}, "got index 2"),
        ("decode", DECODE | {"beta": ABSENT, "beta_scale": 1.0}, "beta: got address 0"),
        ("replay", REPLAY | {"passes": 0}, "passes: got 0; expected from 1 to 2147483647"),
        ("replay", REPLAY | {"rank": True, "passes": 2**62}, "passes: got 4611686018427387904"),
        ("replay", REPLAY | {"tol": 0.1}, "residual: got address 0"),
        ("replay", REPLAY | {"tol": 0.1, "residual": AT}, "passes_done: got address 0"),
        ("replay", REPLAY | {"tol": math.nan}, "tol: got nan"),
        ("replay", REPLAY | {"rank": True, "T": 70}, "T: got 70; expected from 0 to 64"),
        ("convolve", CONVOLVE | {"D": 0}, "D: got 0"),
        ("convolve", CONVOLVE | {"W": 9}, "W: got 9; expected from 1 to 4"),
        ("convolve", CONVOLVE | {"weight": (0, 0)}, "weight: got address 0"),
        ("convolve", CONVOLVE | {"weight": (AT, 3)}, "weight: got 3; expected from 0 to 2"),
        ("convolve_step", STEP | {"state": 0}, "state: got address 0"),
        ("gated_norm", NORM | {"V": 0}, "V: got 0"),
        ("gated_norm", NORM | {"gate": ABSENT}, "gate: got address 0"),
        ("sleep_blocks", BLOCKS | {"B": 0}, "B: got 0; expected at least 1"),
        ("sleep_blocks", BLOCKS | {"passes": 0}, "passes: got 0"),
        ("sleep_blocks", BLOCKS | {"layers": [_C.Layer()]}, "hidden: got 0; expected at least 1"),
        ("pack_weight", {"matrix": AT, "n": 0, "depth": 8, "form": _C.Form.plain, "packed": AT}, "n: got 0; expected"),
        ("packed_size", {"n": 8, "depth": -1, "form": _C.Form.plain}, "depth: got -1; expected at least 1"),
        ("peak_gflops", {"seconds": math.inf}, "seconds: got inf; expected from 0 to 600"),
    ],
)
def test_other_numbers(entry: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        getattr(_C, entry)(**fields)


@pytest.mark.parametrize(
    ("entry", "fields"),
    [
        ("forward", FORWARD),
        ("backward", BACKWARD),
        ("forward_keeping_states", KEEPING),
        ("decode", DECODE),
        ("replay", REPLAY),
        ("convolve", CONVOLVE),
        ("gated_norm", NORM),
    ],  # fmt: skip
)
def test_a_call_names_every_field_and_no_other(entry: str, fields: dict[str, Any]) -> None:
    call = getattr(_C, entry)
    for name in fields:
        rest = {n: value for n, value in fields.items() if n != name}
        with pytest.raises(TypeError, match=f"{entry}: no argument '{name}'"):
            call(**rest)
        with pytest.raises(TypeError, match=f"{entry}: got the unknown argument 'typo'"):
            call(**rest, typo=0)
        with pytest.raises(TypeError, match=f"{name}: got str; expected"):
            call(**fields | {name: "head"})
    with pytest.raises(TypeError, match=f"{entry}: takes keywords only"):
        call(1, **fields)


def test_a_layer_has_no_other_attributes() -> None:
    layer = _C.Layer()
    layer.into = (AT, 2.0)
    assert layer.copy().into == (AT, 2.0) and layer.copy() is not layer
    with pytest.raises(AttributeError):
        layer.intoo = (AT, 2.0)  # type: ignore[attr-defined]
    with pytest.raises(TypeError):
        layer.hidden = "wide"  # type: ignore[assignment]


def test_facts_are_the_same_in_python_and_in_cpp() -> None:
    assert module._WITHOUT_MODULE == (_C.type_codes, _C.gate_codes)
    assert {torch.float32, torch.bfloat16, torch.float16} == set(module.TYPE_CODES)
    assert torch_common.NORM_EPS == _C.norm_eps
    assert chunked.MIN_LOG_DECAY == _C.min_log_decay


def test_the_fast_path_leaves_what_is_no_call() -> None:
    x = torch.zeros(1, 2, 1, 8)
    assert not _C.try_fast_path(1, True, False, 1.0, None, None, None, None, None, None, None, None)
    assert not _C.try_fast_path(1, True, False, 1.0, x, x, x, x[..., 0], x[..., 0], None, x[0], torch.zeros(1))
    with pytest.raises(ValueError, match="gate: got 9"):
        _C.try_fast_path(9, True, False, 1.0, x, x, x, None, x[..., 0], None, x, torch.zeros(1, 1, 8, 8))
    assert not _C.use_exchange_api(signal_capsule())
    for call, count in ((_C.try_fast_path, 17), (_C.ordinary, 9)):
        with pytest.raises(TypeError, match=f"got 3 arguments; expected {count}"):
            call(1, 2, 3)
    with pytest.raises(TypeError):
        _C.try_fast_path("head", True, False, 1.0, x, x, x, None, x[..., 0], None, x, torch.zeros(1, 1, 8, 8))


def test_the_fast_path_knows_what_torch_says_of_a_tensor() -> None:
    """At each of the six places: what is no plain tensor, needs a gradient, or holds the opposites of its numbers."""
    x = torch.zeros(2)
    assert _C.ordinary(True, *[x] * 6) and _C.ordinary(True, x, x, x, None, None, None)
    for place in range(6):

        def at(given: object, grad: bool = False, place: int = place) -> bool:
            answer: bool = _C.ordinary(grad, *[x] * place, given, *[x] * (5 - place))
            return answer

        assert at(None) == (place > 2)
        assert not at(torch.nn.Parameter(x, requires_grad=False)) and not at(3) and not at(np.zeros(2))
        assert not at(torch._neg_view(x)) and not at(x.cfloat().conj().imag)
        assert not at(x.clone().requires_grad_(), grad=True) and at(x.clone().requires_grad_(), grad=False)
    parameter = torch.nn.Parameter(x)
    assert _C.ordinary(False, *[x] * 6, parameter, None) and not _C.ordinary(True, *[x] * 6, None, parameter)
    assert not _C.ordinary(False, *[x] * 6, 3, None) and not _C.ordinary(False, *[x] * 6, None, torch._neg_view(x))
    assert not _C.use_tensor_class(int, int) and _C.ordinary(True, *[x] * 6)


def signal_capsule() -> Any:
    """Somebody else's capsule."""
    return np.zeros(1).__array_struct__


@pytest.mark.parametrize("passes", [1, 2, 3, 7, 64, 1000, 2**31 - 1])
@pytest.mark.parametrize("log_decay", [0.0, -1e-3, -0.5, -80.0])
def test_the_closed_form_takes_no_room_for_its_passes(passes: int, log_decay: float) -> None:
    G = torch.full((1, 1, 1, 1), log_decay, dtype=torch.float64, requires_grad=True)
    B, state = torch.ones(1, 1, 2, 2, dtype=torch.float64), torch.full((1, 1, 2, 2), 3.0, dtype=torch.float64)
    after = closed(G, B, state, passes)
    a = G.detach().exp()
    whole = torch.full_like(a, float(passes)) if log_decay == 0 else -torch.expm1(passes * G.detach()) / (1 - a)
    assert relative_error(after, (passes * G.detach()).exp() * state + whole * B) <= 1e-9
    if passes <= 1000:
        n = torch.arange(passes, dtype=torch.float64)
        slope = passes * (passes * G.detach()).exp() * 3 + (n * (n * G.detach()).exp()).sum()
        (found,) = torch.autograd.grad(after.sum(), G)
        assert relative_error(found, 4 * slope) <= 1e-12


def test_many_passes_without_delta() -> None:
    x = make_inputs(SIMPLE_GLA, Shape(T=9, K=8, V=8), seed=1)
    x["g"] = x["g"] * 1e-3
    r = sleepkern.sleep_ingest(**x, passes=2**31 - 1, rule=SIMPLE_GLA, backend="cpu")
    assert r.final_state.isfinite().all()


def interrupted(call: Callable[[], object]) -> float:
    """Seconds from a signal during a call to the exception of its handler.

    Python's own handler is put there first: a process that a shell started in the background ignores the signal.
    """
    sent: list[float] = []

    def later() -> None:
        time.sleep(0.3)
        sent.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    thread = threading.Thread(target=later)
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            call()
    finally:
        thread.join()
        signal.signal(signal.SIGINT, before)
    return time.monotonic() - sent[0]


def test_passes_are_interrupted() -> None:
    """The caller's state stays as it was."""
    x = make_inputs(GATED_DELTA_RULE, Shape(T=64, H=1, HV=2, K=64, V=64), seed=2)
    state = x["initial_state"].clone()
    for method in ("wy", "rank"):
        passes = 2_000_000_000 if method == "wy" else 2_147_483_647
        rule = GATED_DELTA_RULE if method == "wy" else SIMPLE_GLA
        took = interrupted(
            lambda m=method, n=passes, r=rule: sleepkern.sleep_ingest(
                **x, passes=n, method=m, rule=r, backend="cpu", use_qk_l2norm_in_kernel=True
            )
        )
        assert took < 2
    assert torch.equal(x["initial_state"], state)


def test_passes_of_blocks_are_interrupted() -> None:
    blocks, h = SleepLM(8, 16, 2).blocks(), torch.randn(1, 4, 16)
    with torch.no_grad():
        states = sleep_blocks(h, blocks).states
        before = [t.clone() for state in states for t in state]
        kept = h.clone()
        assert interrupted(lambda: sleep_blocks(h, blocks, states, passes=1_000_000)) < 2
    assert torch.equal(h, kept)
    assert all(torch.equal(t, b) for t, b in zip((t for state in states for t in state), before, strict=True))
