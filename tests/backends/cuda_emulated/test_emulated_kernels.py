"""Every CUDA kernel, run on the CPU, against the float64 reference: results and gradients, in several thread orders."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from conftest import A100, H100
from helpers.errors import errors

import sleepkern
from benchmarks import gpu_checks
from sleepkern.backends.cuda import recurrence as cuda
from sleepkern.backends.cuda.device import Device
from sleepkern.measure.cases import Case
from sleepkern.rules import DELTA_RULE, GATED_DELTA_RULE, GLA, KDA, RULES, SIMPLE_GLA
from sleepkern.testing import TOLERANCE, Shape, make_inputs, relative_error, to_float64

DELTA = (GATED_DELTA_RULE, DELTA_RULE, KDA)
ONE = {"H": 1, "HV": 1}
SHAPES = {
    "one token": Shape(T=1, **ONE, K=16, V=16),
    "T=15": Shape(T=15, K=32, V=48),
    "T=17 K=V=5": Shape(B=2, T=17, **ONE, K=5, V=5),
    "T=63": Shape(T=63),
    "T=64 grouped": Shape(T=64, H=2, HV=4, K=32, V=32),
    "T=65": Shape(T=65),
    "K=96 V=256": Shape(T=100, **ONE, K=96, V=256),
    "K=V=128": Shape(T=130, **ONE, K=128, V=128),
    "window K=128 V=100": Shape(T=50, **ONE, K=128, V=100),
    "T=1000": Shape(T=1000, **ONE, K=16, V=16),
    "packed": Shape(H=1, HV=2, K=32, V=32, lengths=(1, 64, 65, 17, 0, 3)),
}
THREADS_COPY = H100._replace(capability=(8, 0))
"""Copies by all threads, as before compute capability 9.0."""
ORDERS: tuple[dict[str, Any], ...] = (
    {"order": "forward", "early_copies": True},
    {"order": "backward", "device": THREADS_COPY},
    {"order": "random", "seed": 7},
)


@pytest.mark.parametrize("order", ORDERS, ids=lambda o: o["order"])
@pytest.mark.parametrize("rule", DELTA, ids=lambda r: r.name)
@pytest.mark.parametrize("shape", SHAPES)
def test_replay(on, shape: str, rule, order: dict[str, Any]) -> None:
    with on(**order):
        found = errors(rule, SHAPES[shape], passes=3, backend="cuda")
    assert max(found.values()) <= TOLERANCE[torch.float32], found


@pytest.mark.parametrize("method", ["wy", "affine"])
@pytest.mark.parametrize("order", ORDERS, ids=lambda o: o["order"])
def test_long_windows(on, order: dict[str, Any], method: str) -> None:
    """More chunks than have a place in shared memory: they stream through it."""
    order = {**order, "device": order.get("device", H100)._replace(shared_memory=230000)}
    with on(**order):
        found = errors(GATED_DELTA_RULE, Shape(T=330, **ONE, K=128, V=32), passes=3, method=method, backend="cuda",
                       gradients=False)  # fmt: skip
        problem = Case("ingest", GATED_DELTA_RULE, Shape(T=330, **ONE, K=128, V=32), passes=3).problem()
        assert cuda._plan(problem._replace(method=method)).slots < 6
    assert max(found.values()) <= TOLERANCE[torch.float32], found


def test_rank_only_where_keys_leave_most_of_a_state_alone(on) -> None:
    """By itself: elsewhere passes may forget all but a little of the first state, and what is left has lost digits."""
    with on(order="forward"):
        for T, K, method in ((64, 128, "rank"), (32, 64, "rank"), (64, 64, "wy"), (1, 1, "wy")):
            problem = Case("ingest", GATED_DELTA_RULE, Shape(T=T, **ONE, K=K, V=32), passes=8).problem()
            assert cuda.method_of(problem) == method, (T, K)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rule", DELTA, ids=lambda r: r.name)
@pytest.mark.parametrize("shape", ["T=63", "packed", "K=V=128", "window K=128 V=100"])
def test_replay_of_narrow_types(on, shape: str, rule, dtype: torch.dtype) -> None:
    with on(order="random"):
        found = errors(rule, SHAPES[shape], dtype, passes=4, backend="cuda")
    assert max(found.values()) <= TOLERANCE[dtype], found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("outputs", [True, False])
@pytest.mark.parametrize("method", ["wy", "affine", "rank"])
@pytest.mark.parametrize("passes", [1, 2, 7])
def test_methods(on, method: str, passes: int, outputs: bool, dtype: torch.dtype) -> None:
    """tol so small that no head stops makes even one pass a replay."""
    shape = Shape(T=40 if method == "rank" else 150, H=1, HV=2, K=48, V=40)
    tol = 1e-30 if passes == 1 and method != "rank" else None
    if passes == 1 and tol is None:
        pytest.skip("one pass by rank is not a replay")
    with on():
        found = errors(
            GATED_DELTA_RULE, shape, dtype, passes=passes, method=method, tol=tol, outputs=outputs, backend="cuda"
        )
    assert max(found.values()) <= TOLERANCE[dtype], found


@pytest.mark.parametrize("decay", ["zero", "strong", "extreme", "mixed"])
@pytest.mark.parametrize("rule", [GATED_DELTA_RULE, KDA], ids=lambda r: r.name)
@pytest.mark.parametrize("T", [60, 100])
def test_decays(on, rule, decay, T: int) -> None:
    with on():
        found = errors(rule, Shape(T=T, **ONE, K=32, V=32), decay=decay, passes=3, outputs=True, backend="cuda")
    assert max(found[n] for n in ("o", "state")) <= TOLERANCE[torch.float32], found


@pytest.mark.parametrize("T", [60, 100])
@pytest.mark.parametrize("rule", DELTA, ids=lambda r: r.name)
def test_hard_keys(on, rule, T: int) -> None:
    """beta = 2 with correlated keys; normalisation in the kernel; a token that forgets everything."""
    shape = Shape(T=T, **ONE, K=32, V=32)
    with on():
        found = [
            errors(rule, shape, beta_max=2.0, correlation=0.9, passes=3, backend="cuda"),
            errors(rule, shape, normalize=True, passes=3, backend="cuda"),
            errors(rule, shape, initial_state=False, passes=3, backend="cuda"),
        ]
        if rule.gate != "none":
            found.append(errors(rule, shape, forget=True, passes=3, backend="cuda"))
    assert max(max(f.values()) for f in found) <= TOLERANCE[torch.float32], found


@pytest.mark.parametrize("order", ORDERS, ids=lambda o: o["order"])
@pytest.mark.parametrize("outputs", [True, False])
@pytest.mark.parametrize("method", ["wy", "affine"])
@pytest.mark.parametrize("shape", ["T=63", "T=65", "packed"])
def test_tol_stops_each_head(on, shape: str, method: str, outputs: bool, order: dict[str, Any]) -> None:
    x = make_inputs(GATED_DELTA_RULE, SHAPES[shape])
    if not outputs:
        x["q"] = None
    options: dict[str, Any] = {"passes": 40, "tol": 1e-3}
    with on(**order):
        made = sleepkern.sleep_ingest(**x, **options, method=method, backend="cuda")
    expected = sleepkern.sleep_ingest(**to_float64(x), **options, backend="reference")
    assert torch.equal(made.passes, expected.passes)
    assert relative_error(made.final_state, expected.final_state) <= TOLERANCE[torch.float32]
    torch.testing.assert_close(made.residual, expected.residual.float(), rtol=1e-2, atol=1e-6)
    if outputs:
        assert relative_error(made.output, expected.output) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("T", [50, 65])
@pytest.mark.parametrize("method", ["wy", "affine"])
def test_a_tol_below_float32_still_reports(on, T: int, method: str) -> None:
    x = make_inputs(GATED_DELTA_RULE, Shape(T=T, **ONE, K=16, V=16))
    with on():
        made = sleepkern.sleep_ingest(**x, passes=3, tol=1e-50, method=method, backend="cuda")
    expected = sleepkern.sleep_ingest(**to_float64(x), passes=3, tol=1e-50, backend="reference")
    assert made.passes.unique().tolist() == [3]
    torch.testing.assert_close(made.residual, expected.residual.float(), rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("K", [16, 64, 100, 128])
@pytest.mark.parametrize("blocks", [1, 3])
def test_chain(on, K: int, blocks: int) -> None:
    """Powers and their adjoint, alone, against torch; heads that made passes of their own."""
    from sleepkern.backends.replay.backward import TORCH

    generator = torch.Generator().manual_seed(1)
    V, passes = 80 * blocks, 5

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator)

    A, start, after, last = (normal(1, 2, K, n) for n in (K, V, V, V))
    A /= 2 * K**0.5
    made = torch.tensor([[5, 2]], dtype=torch.int32)
    with on(order="backward"):
        states = cuda.powers(A, start, after, passes)
        mine = cuda.powers_backward(A, states, last, None), cuda.powers_backward(A, states, last, made)
    assert relative_error(states, TORCH.powers(A.double(), start.double(), after.double(), passes)) <= 1e-6
    for got, limit in zip(mine, (None, made), strict=True):
        expected = TORCH.adjoint(A.double(), states.double(), last.double(), limit)
        assert max(map(relative_error, got, expected)) <= 2e-6


@pytest.mark.computed_by("cuda")
@pytest.mark.parametrize("rule", RULES.values(), ids=lambda r: r.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "shape",
    [Shape(B=3, T=1), Shape(T=5, H=1, HV=3, K=200, V=37), Shape(T=8, K=96, V=256), Shape(T=2, K=128, V=128)],
    ids=["T=1", "K=200 V=37", "K=96 V=256", "K=V=128"],
)
def test_step(on, rule, dtype: torch.dtype, shape: Shape) -> None:
    x = make_inputs(rule, shape, dtype)
    x.pop("cu_seqlens")
    state = x.pop("initial_state")
    reference = to_float64(x)
    for normalize in (False, True):
        kept = state.clone()
        with on(order="random"):
            o, S = sleepkern.recurrent_step(
                **x, state=kept, rule=rule, use_qk_l2norm_in_kernel=normalize, backend="cuda"
            )
        assert S is kept
        o_expected, S_expected = sleepkern.recurrent_step(
            **reference, state=state.double(), rule=rule, use_qk_l2norm_in_kernel=normalize, backend="reference"
        )
        assert relative_error(o, o_expected) <= TOLERANCE[dtype]
        assert relative_error(S, S_expected) <= 2e-6


def test_states_as_they_lie(on) -> None:
    """A few tokens from a transposed state; in place too, but not into one memory for all rows."""
    x = make_inputs(GATED_DELTA_RULE, Shape(B=2, T=4, H=1, HV=2, K=32, V=32))
    x.pop("cu_seqlens")
    state = x.pop("initial_state").transpose(-1, -2)
    o_expected, S_expected = sleepkern.gated_delta_rule(
        **to_float64(x), initial_state=state.double(), output_final_state=True, backend="reference"
    )
    with on():
        o, S = sleepkern.gated_delta_rule(**x, initial_state=state, output_final_state=True, backend="cuda")
        assert S is not None and S.is_contiguous()
        kept = state.clone()
        assert not kept.is_contiguous()
        in_place, _ = sleepkern.recurrent_step(**x, state=kept, backend="cuda")
        with pytest.raises(ValueError, match="state: got strides .* by which its numbers overlap"):
            sleepkern.recurrent_step(**x, state=torch.zeros(1, 2, 32, 32).expand(2, -1, -1, -1), backend="cuda")
    for ours in (o, in_place):
        assert relative_error(ours, o_expected) <= 1e-6
    for final in (S, kept):
        assert relative_error(final, S_expected) <= 1e-6


def test_step_in_a_pool(on) -> None:
    """Rows go on from the states their indices name; the others, and those of padded rows, are left alone."""
    x = make_inputs(GATED_DELTA_RULE, Shape(B=3, T=2, H=1, HV=2, K=32, V=48))
    x.pop("cu_seqlens")
    x.pop("initial_state")
    storage = torch.randn(7, 3, 32, 48)
    pool = storage[1:, :2]  # states that lie apart, and a row before the first that index -1 must not reach
    before, places = storage.clone(), torch.tensor([4, -1, 1], dtype=torch.int32)
    with on():
        o, S = sleepkern.recurrent_step(**x, state=pool, state_indices=places, backend="cuda")
    picked = before[[5, 0, 2], :2].clone()
    o_expected, picked = sleepkern.recurrent_step(**x, state=picked, backend="reference")
    assert S is pool
    assert relative_error(o[[0, 2]], o_expected[[0, 2]]) <= 1e-6 and not o[1].any()
    assert relative_error(storage[[5, 2], :2], picked[[0, 2]]) <= 1e-6
    before[[5, 2], :2] = storage[[5, 2], :2]
    assert torch.equal(storage, before)


@pytest.mark.parametrize("device", [H100, A100, Device((8, 9), 101376, 8), Device((12, 0), 101376, 170)])
def test_plans_fit(on, device: Device) -> None:
    """Whatever is not refused fits the device's shared memory; what is refused says why."""
    cases = (
        (64, 64, 64, None, True), (128, 128, 4096, None, True), (128, 256, 48, None, False), (128, 128, 64, 1e-3, True),
        (96, 96, 500, 1e-3, True),
    )  # fmt: skip
    with on(device=device):
        for rule, dtype, (K, V, T, tol, reads) in itertools.product(DELTA, (torch.float32, torch.bfloat16), cases):
            case = Case("ingest", rule, Shape(T=T, H=16, HV=16, K=K, V=V), passes=4, dtype=dtype)
            problem = case.problem()._replace(tol=tol, output=reads)
            why, plan = cuda.why_not(problem), cuda._plan(problem)
            assert (plan is None) == (why is not None)
            if plan is None:
                assert "shared memory" in why
                continue
            mode, width = cuda._mode(problem), 64 if K <= 64 else 128
            need = cuda._SINGLE_CHUNK[mode, width, reads, rule.gate == "channel"]
            if not plan.single_chunk:
                fixed, each = cuda._MULTI_CHUNK[mode, width, reads, plan.v_tile]
                need = max(need, fixed + each * plan.slots)
            assert need <= device.shared_memory
            assert plan.v_tile % 16 == 0 and (tol is None or plan.v_tile >= V)


def test_refusals(on) -> None:
    def why(rule=GATED_DELTA_RULE, shape=None, **changes: Any) -> str | None:
        problem = Case("ingest", rule, shape or Shape(T=200), passes=4).problem()
        return cuda.why_not(problem._replace(**changes))

    with on():
        assert why() is None
        assert "closed form" in (why(SIMPLE_GLA) or "") and "closed form" in (why(GLA) or "")
        assert "K of at most 128" in (why(shape=Shape(K=192)) or "")
        assert "V of at most 128" in (why(shape=Shape(V=192), tol=1e-3) or "")
        assert "one chunk" in (why(method="rank") or "")
        assert "repeat" in (why(method="repeat") or "")
        assert "float64" in (why(dtype=torch.float64) or "")
        assert "wy with tol" in (why(shape=Shape(T=4000), method="wy", tol=1e-3) or "")
        assert "8 tokens" in (why(passes=1, output=True) or "")
        assert "heads of at most 256" in (why(passes=1, T=1, K=300, output=True) or "")


def test_what_a_gpu_machine_checks(on) -> None:
    """`make gpu-check` makes the same calls there."""
    with on():
        gpu_checks.cuda_launches("cpu")
        gpu_checks.cuda_backward_launches("cpu")
        found = dict(gpu_checks.replays("cpu", small=True))
    assert len(found) > 60 and not any(found.values()), {name: fault for name, fault in found.items() if fault}
