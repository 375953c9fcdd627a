"""The native module refuses numbers that cannot be sizes, codes or addresses of a call, and can be interrupted."""

from __future__ import annotations

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
from sleepkern.backends.native.module import _C
from sleepkern.backends.replay.methods import closed
from sleepkern.nn import SleepLM
from sleepkern.rules import GATED_DELTA_RULE, SIMPLE_GLA
from sleepkern.sleep.blocks import sleep_blocks
from sleepkern.testing import Shape, make_inputs, relative_error

ROOM = torch.zeros(4096)
AT = ROOM.data_ptr()
VIEW = (AT, 8, 0)
ABSENT = (0, 0, 0)
# gate, delta, normalize, scale, sequences, T, H, HV, K, V, offsets, q, k, v, g, beta, state
PROBLEM = (1, True, False, 1.0, 1, 2, 1, 1, 8, 8, 0, VIEW, VIEW, VIEW, VIEW, VIEW, 0)


def changed(arguments: tuple[Any, ...], at: int, value: Any) -> tuple[Any, ...]:
    return (*arguments[:at], value, *arguments[at + 1 :])


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (0, 3, "gate: got 3; expected from 0 to 2"),
        (4, -1, "sequences: got -1; expected at least 0"),
        (5, -1, "T: got -1; expected at least 0"),
        (6, 0, "H: got 0; expected at least 1"),
        (7, 0, "HV: got 0; expected at least 1"),
        (8, 0, "K: got 0; expected from 1 to 256"),
        (9, 257, "V: got 257; expected from 1 to 256"),
        (4, 2**62, "sequences, T, HV, K, V: got a product beyond 2^60"),
        (12, ABSENT, "k: got address 0"),
        (13, (AT, 8, 7), "v: got 7; expected from 0 to 2"),
        (14, ABSENT, "g: got address 0"),
        (15, (AT, -8, 0), "beta: got -8; expected at least 0"),
    ],
)
def test_numbers_of_a_problem(at: int, value: Any, message: str) -> None:
    backward = (VIEW, 0, AT, AT, 0, AT, AT, AT, AT)
    for entry, rest in ((_C.forward, (AT, AT)), (_C.backward, backward), (_C.replay, (AT, False, 2, 0.0, 0, 0, 0))):
        with pytest.raises(ValueError, match=re.escape(message)):
            entry(*changed(PROBLEM, at, value), *rest)


@pytest.mark.parametrize("offsets", [(0, 3), (1, 2), (0, -1), (0, 2**40)])
def test_offsets_that_are_not_those_of_the_tokens(offsets: tuple[int, int]) -> None:
    at = np.array(offsets)
    with pytest.raises(ValueError, match="cu_seqlens: got .* expected offsets that rise from 0 to 2"):
        _C.forward(*changed(PROBLEM, 10, at.ctypes.data), AT, AT)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: _C.forward(*PROBLEM, 0, AT), "o: got address 0"),
        (lambda: _C.forward(*PROBLEM, AT, 0), "final_state: got address 0"),
        (lambda: _C.forward(*changed(PROBLEM, 7, 3)[:6], 2, *changed(PROBLEM, 7, 3)[7:], AT, AT), "HV: got 3"),
        (lambda: _C.backward(*PROBLEM, VIEW, 0, AT, AT, 5, AT, AT, AT, AT), "key_type: got 5"),
        (lambda: _C.backward(*PROBLEM, VIEW, 0, AT, 0, 0, AT, AT, AT, AT), "dk: got address 0"),
        (lambda: _C.replay(*PROBLEM, AT, False, 0, 0.0, 0, 0, 0), "passes: got 0; expected from 1 to 2147483647"),
        (lambda: _C.replay(*PROBLEM, AT, True, 2**62, 0.0, 0, 0, 0), "passes: got 4611686018427387904"),
        (lambda: _C.replay(*PROBLEM, AT, False, 2, 0.1, 0, 0, 0), "residual: got address 0"),
        (lambda: _C.replay(*changed(PROBLEM, 5, 70), AT, True, 2, 0.0, 0, 0, 0), "T: got 70; expected from 0 to 64"),
        (lambda: _C.convolve(1, 2, 0, 4, 0, True, VIEW, (AT, 0), (0, 0), 0, AT, AT), "D: got 0"),
        (lambda: _C.convolve(1, 2, 8, 9, 0, True, VIEW, (AT, 0), (0, 0), 0, AT, AT), "W: got 9; expected from 1 to 4"),
        (lambda: _C.convolve(1, 2, 8, 4, 0, True, VIEW, (0, 0), (0, 0), 0, AT, AT), "weight: got address 0"),
        (lambda: _C.convolve_step(1, 8, 4, True, VIEW, (AT, 0), (0, 0), 0, AT), "state: got address 0"),
        (lambda: _C.gated_norm(2, 1, 0, True, False, 1e-6, VIEW, VIEW, (AT, 0), False, AT), "V: got 0"),
        (lambda: _C.gated_norm(2, 1, 8, True, False, 1e-6, VIEW, ABSENT, (AT, 0), False, AT), "gate: got address 0"),
        (lambda: _C.sleep_blocks(0, 1, 8, 1, False, False, _C.Form.plain, [], AT, AT), "B: got 0; expected at least 1"),
        (lambda: _C.sleep_blocks(1, 1, 8, 0, False, False, _C.Form.plain, [], AT, AT), "passes: got 0"),
        (lambda: _C.pack_weight(AT, 0, 8, _C.Form.plain, AT), "n: got 0; expected at least 1"),
        (lambda: _C.packed_size(8, -1, _C.Form.plain), "depth: got -1; expected at least 1"),
        (lambda: _C.peak_gflops(float("inf")), "seconds: got inf; expected from 0 to 600"),
    ],
)
def test_other_numbers(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


def test_the_express_lane_leaves_what_is_no_call() -> None:
    x = torch.zeros(1, 2, 1, 8)
    assert not _C.express(1, True, False, 1.0, None, None, None, None, None, None, None, None)
    assert not _C.express(1, True, False, 1.0, x, x, x, x[..., 0], x[..., 0], None, x[0], torch.zeros(1))
    with pytest.raises(ValueError, match="gate: got 9"):
        _C.express(9, True, False, 1.0, x, x, x, None, x[..., 0], None, x, torch.zeros(1, 1, 8, 8))
    assert not _C.use_exchange_api(signal_capsule())
    for call, count in ((_C.express, 12), (_C.ordinary, 7)):
        with pytest.raises(TypeError, match=f"got 3 arguments; expected {count}"):
            call(1, 2, 3)
    with pytest.raises(TypeError):
        _C.express("head", True, False, 1.0, x, x, x, None, x[..., 0], None, x, torch.zeros(1, 1, 8, 8))


def test_the_express_lane_knows_what_torch_says_of_a_tensor() -> None:
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
    assert not _C.use_tensor_class(int) and _C.ordinary(True, *[x] * 6)


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
