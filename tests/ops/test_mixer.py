"""Short convolution and gated norm in C++ against their formulas in float64, forward and every gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

from sleepkern.backends.native.module import TYPE_CODES
from sleepkern.nn import GatedDeltaNet, gated_rms_norm, short_convolution, short_convolution_step
from sleepkern.problems.blocks import KERNEL_TYPES
from sleepkern.testing import relative_error
from sleepkern.testing.tolerances import REORDERED_DOUBLE, SAME_SUMS

BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 6e-3, torch.float16: 8e-4}
TYPES = list(BOUNDS)
pytestmark = pytest.mark.usefixtures("isa")


def convolved(x: Tensor, weight: Tensor, bias: Tensor | None, past: Tensor, silu: bool) -> tuple[Tensor, Tensor]:
    """By torch's own depthwise convolution; one sequence a row."""
    full = torch.cat([past, x], dim=1)
    z = F.conv1d(full.transpose(1, 2), weight[:, None], bias, groups=x.shape[2]).transpose(1, 2)
    return F.silu(z) if silu else z, full[:, x.shape[1] :]


def normed(x: Tensor, gate: Tensor, weight: Tensor, eps: float, activation: str, gate_first: bool) -> Tensor:
    a = F.silu(gate) if activation == "silu" else torch.sigmoid(gate)
    u = x * a if gate_first else x
    n = F.rms_norm(u, u.shape[-1:], eps=eps) * weight
    return n if gate_first else n * a


def gradients(y: list[Tensor], leaves: list[Tensor | None]) -> list[Tensor | None]:
    """Of a sum of squares with weights that differ from number to number."""
    loss = sum((t * torch.linspace(-1, 2, t.numel()).view(t.shape).to(t)).double().sum() for t in y)
    present = [t for t in leaves if t is not None]
    grads = iter(torch.autograd.grad(loss, present))  # type: ignore[arg-type]
    return [None if t is None else next(grads) for t in leaves]


def compare(ours: list[Any], expected: list[Any], bound: float) -> None:
    for number, (a, b) in enumerate(zip(ours, expected, strict=True)):
        assert (a is None) == (b is None)
        if a is not None and b.numel():
            assert relative_error(a, b) < bound, number


def leaf(*size: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    return (torch.randn(*size) * scale).to(dtype).requires_grad_()


def doubled(leaves: list[Tensor | None]) -> list[Any]:
    return [None if t is None else t.detach().double().requires_grad_() for t in leaves]


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(
    ("B", "T", "D", "W"), [(2, 1, 5, 4), (1, 2, 515, 4), (3, 18, 96, 4), (2, 300, 37, 3), (2, 7, 64, 2), (1, 4, 9, 1)]
)
@pytest.mark.parametrize("silu", [True, False])
def test_convolution(B: int, T: int, D: int, W: int, silu: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(T)
    weights = torch.float32 if silu else dtype  # under autocast they differ from x
    x, weight, bias = leaf(B, T, D, dtype=dtype), leaf(D, W, dtype=weights), leaf(D, dtype=weights) if silu else None
    past = leaf(B, W - 1, D, dtype=dtype) if T != 4 else None
    leaves = [x, weight, bias, past]
    ours = short_convolution(x, weight, bias, past, "silu" if silu else None)
    true = doubled(leaves)
    zeros = torch.zeros(B, W - 1, D, dtype=torch.float64)
    expected = convolved(true[0], true[1], true[2], zeros if past is None else true[3], silu)
    assert ours[0].dtype == dtype
    compare(list(ours), list(expected), BOUNDS[dtype])
    compare(gradients(list(ours), leaves), gradients(list(expected), true), 2 * BOUNDS[dtype])


@pytest.mark.parametrize("threads", [1, 2])
def test_convolution_of_packed_sequences_in_place(threads: int) -> None:
    """Channels out of the middle of a projection, sequences of 0 to 100 tokens; every sequence as if alone."""
    torch.set_num_threads(threads)
    lengths, D = [5, 1, 0, 100, 2, 30], 40
    ends = torch.tensor([0, *torch.tensor(lengths).cumsum(0)])
    projection = torch.randn(1, int(ends[-1]), 3 * D)
    x = projection[..., D : 2 * D].requires_grad_()
    weight, bias, past = leaf(D, 4), leaf(D), leaf(len(lengths), 3, D)
    leaves: list[Tensor | None] = [x, weight, bias, past]
    ours = list(short_convolution(x, weight, bias, past, cu_seqlens=ends))
    true = doubled(leaves)
    parts = [
        convolved(true[0][:, ends[i] : ends[i + 1]], true[1], true[2], true[3][i : i + 1], True)
        for i in range(len(lengths))
        if lengths[i]
    ]
    last = [true[3][2:3] if i == 2 else parts[i - (i > 2)][1] for i in range(len(lengths))]
    expected = [torch.cat([y for y, _ in parts], dim=1), torch.cat(last)]
    compare(ours, expected, 2e-6)
    compare(gradients(ours, leaves), gradients(expected, true), 4e-6)


def test_convolution_in_parts_is_one_convolution() -> None:
    x, weight = torch.randn(2, 90, 24), torch.randn(24, 4)
    whole, end = short_convolution(x, weight)
    past, parts = None, []
    for part in x.split([1, 2, 50, 37], dim=1):
        y, past = short_convolution(part, weight, past=past)
        parts.append(y)
    assert past is not None
    assert torch.equal(torch.cat(parts, dim=1), whole)
    assert torch.equal(past, end)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("W", [2, 4])
def test_step_of_the_convolution(W: int, dtype: torch.dtype) -> None:
    B, T, D = 2, 6, 521
    x, weight, bias = torch.randn(B, T, D).to(dtype), torch.randn(D, W), torch.randn(D)
    state = torch.zeros(B, D, W, dtype=dtype)
    steps = [short_convolution_step(x[:, t], state, weight, bias) for t in range(T)]
    expected, _ = short_convolution(x, weight, bias)
    assert relative_error(torch.stack(steps, dim=1), expected.double()) < BOUNDS[dtype]
    assert torch.equal(state, x[:, -W:].transpose(1, 2))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("gate_first", [False, True])
@pytest.mark.parametrize("activation", ["silu", "sigmoid"])
@pytest.mark.parametrize(
    ("shape", "heads"), [((2, 17, 3, 37), False), ((1, 40, 2, 128), True), ((50, 64), False), ((2, 3, 1500), False)]
)
def test_norm(shape: tuple[int, ...], heads: bool, activation: str, gate_first: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    x, gate = leaf(*shape, dtype=dtype), leaf(*shape, dtype=dtype, scale=3.0)
    weight = leaf(*shape[2:]) if heads else leaf(shape[-1])
    leaves: list[Tensor | None] = [x, gate, weight]
    ours = gated_rms_norm(x, gate, weight, 1e-5, activation, gate_first)
    true = doubled(leaves)
    expected = normed(*true, 1e-5, activation, gate_first)
    assert ours.dtype == dtype
    compare([ours], [expected], BOUNDS[dtype])
    compare(gradients([ours], leaves), gradients([expected], true), 2 * BOUNDS[dtype])


def test_norm_reads_a_slice_and_does_not_depend_on_threads() -> None:
    projection, weight = torch.randn(2, 33, 3 * 4 * 16), leaf(16)
    x, gate = (t.unflatten(-1, (4, 16)) for t in projection.chunk(3, dim=-1)[:2])
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        y = gated_rms_norm(x, gate, weight)
        results.append((y, *torch.autograd.grad(y.square().sum(), weight)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert (
        relative_error(results[0][0], normed(x.double(), gate.double(), weight.double(), 1e-6, "silu", False))
        < BOUNDS[torch.float32]
    )


def test_extreme_gates() -> None:
    """silu far out on both sides, and a NaN that stays one."""
    gate = torch.tensor([[-200.0, -90.0, 0.0, 88.0, 3e38, float("nan")]])
    y = gated_rms_norm(torch.ones(1, 6), gate, torch.ones(6), 0.0, "sigmoid")
    expected = torch.tensor([[0.0, 0.0, 0.5, 1.0, 1.0, float("nan")]])
    assert torch.allclose(y, expected, atol=1e-7, equal_nan=True)
    z, _ = short_convolution(gate[..., None], torch.ones(1, 1))
    assert torch.allclose(z[..., 0], F.silu(gate), atol=1e-7, equal_nan=True)


def test_compiled_and_checked_operators() -> None:
    def mix(x: Tensor, weight: Tensor, gain: Tensor) -> Tensor:
        y, last = short_convolution(x, weight)
        return gated_rms_norm(y, x, gain).sum() + last.sum()

    arguments = leaf(2, 20, 16), leaf(16, 4), leaf(16)
    expected = torch.autograd.grad(mix(*arguments), arguments)
    compiled = torch.compile(mix, fullgraph=True, backend="aot_eager")
    compare(list(torch.autograd.grad(compiled(*arguments), arguments)), list(expected), 1e-6)
    past = leaf(2, 3, 16)
    for bias in (None, leaf(16)):
        torch.library.opcheck(torch.ops.sleepkern.convolve, (arguments[0], arguments[1], bias, past, None, True))
    gate = leaf(2, 20, 16)
    torch.library.opcheck(torch.ops.sleepkern.gated_norm, (arguments[0], gate, arguments[2], 1e-6, True, False))


def test_other_types_by_torch() -> None:
    x, weight = torch.randn(2, 9, 4, dtype=torch.float64), torch.randn(4, 6)
    y, last = short_convolution(x, weight.double())
    expected = convolved(x, weight.double(), None, torch.zeros(2, 5, 4).double(), True)
    compare([y, last], list(expected), 1e-14)
    narrow, _ = short_convolution(x.float(), weight)  # wider than the kernel's
    assert relative_error(narrow, expected[0]) < SAME_SUMS
    n = gated_rms_norm(x, x, torch.ones(4).double())
    assert relative_error(n, normed(x, x, torch.ones(4).double(), 1e-6, "silu", False)) < REORDERED_DOUBLE


BAD: list[tuple[str, Any]] = [
    ("x: got", lambda: short_convolution(torch.ones(2, 3), torch.ones(3, 4))),
    ("weight: got", lambda: short_convolution(torch.ones(1, 2, 3), torch.ones(4, 4))),
    ("bias: got", lambda: short_convolution(torch.ones(1, 2, 3), torch.ones(3, 4), torch.ones(4))),
    ("past: got", lambda: short_convolution(torch.ones(1, 2, 3), torch.ones(3, 4), past=torch.ones(1, 4, 3))),
    ("activation: got", lambda: short_convolution(torch.ones(1, 2, 3), torch.ones(3, 4), activation="gelu")),
    ("weight: got", lambda: short_convolution(torch.ones(1, 2, 3), torch.ones(3, 0))),
    ("expected B = 1", lambda: short_convolution(torch.ones(2, 2, 3), torch.ones(3, 4), cu_seqlens=torch.arange(2))),
    ("state: got", lambda: short_convolution_step(torch.ones(2, 3), torch.ones(2, 4, 3), torch.ones(3, 4))),
    ("gate: got", lambda: gated_rms_norm(torch.ones(1, 2, 3), torch.ones(1, 2, 4), torch.ones(3))),
    ("weight: got", lambda: gated_rms_norm(torch.ones(1, 2, 3), torch.ones(1, 2, 3), torch.ones(4))),
    ("activation: got", lambda: gated_rms_norm(torch.ones(2, 3), torch.ones(2, 3), torch.ones(3), activation="x")),
]  # fmt: skip


@pytest.mark.parametrize(("message", "call"), BAD)
def test_bad_input(message: str, call: Any) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("width", [4, 6])  # the kernel's, and torch's
@pytest.mark.parametrize("ends", [[0, 5, 2, 9], [0, 7], [0, 12], [1, 9], [0, -5, 9], [0, 1 << 40, 9]], ids=str)
def test_offsets_are_checked(ends: list[int], width: int) -> None:
    """Also in a compiled graph, and by the operators of forward and backward themselves."""
    x, weight, offsets = torch.randn(1, 9, 3), torch.randn(3, width), torch.tensor(ends)
    for leaf_of_x in (x, x.clone().requires_grad_()):
        with pytest.raises(ValueError, match="cu_seqlens: got .* end at T = 9"):
            short_convolution(leaf_of_x, weight, cu_seqlens=offsets)
    with pytest.raises(TypeError, match=r"cu_seqlens: got torch.float32; expected torch.int32 or torch.int64"):
        short_convolution(x, weight, cu_seqlens=offsets.float())
    if width > 4:
        return
    compiled = torch.compile(short_convolution, fullgraph=True, backend="aot_eager")
    compiled(x, weight, cu_seqlens=torch.tensor([0, *([4] * (len(ends) - 2)), 9]))
    with pytest.raises(ValueError, match="cu_seqlens: got"):
        compiled(x, weight, cu_seqlens=offsets)
    with pytest.raises(ValueError, match="cu_seqlens: got"):
        torch.ops.sleepkern.convolve_backward(x, weight, None, None, offsets, True, x, None)


@pytest.mark.parametrize("dtype", [*TYPES, torch.float64], ids=str)
@pytest.mark.parametrize("W", [1, 4])
@pytest.mark.parametrize("packed", [False, True])
def test_convolution_of_no_tokens(W: int, packed: bool, dtype: torch.dtype) -> None:
    x, weight, bias, past = (leaf(*size, dtype=dtype) for size in ((1, 0, 7), (7, W), (7,), (1, W - 1, 7)))
    offsets = torch.tensor([0, 0]) if packed else None
    leaves: list[Tensor | None] = [x, weight, bias, past]
    for before in (past, None):
        y, last = short_convolution(x, weight, bias, before, cu_seqlens=offsets)
        assert y.shape == x.shape and y.dtype == last.dtype == dtype
        assert torch.equal(last, torch.zeros_like(past) if before is None else past)
    y, last = short_convolution(x, weight, bias, past, cu_seqlens=offsets)
    grads = torch.autograd.grad(y.sum() + (2 * last).sum(), leaves, allow_unused=True)  # type: ignore[arg-type]
    for t, d in zip((x, weight, bias), grads, strict=False):
        assert d is None or torch.equal(d, torch.zeros_like(t))
    assert torch.equal(grads[3], torch.full_like(past, 2))
    with torch.no_grad():
        assert torch.equal(short_convolution(x, weight, bias, past, cu_seqlens=offsets)[1], past)


def test_norm_and_mixer_of_no_tokens() -> None:
    x, weight = leaf(2, 0, 3, 8), leaf(8)
    y = gated_rms_norm(x, x, weight)
    assert y.shape == x.shape and torch.equal(torch.autograd.grad(y.sum(), weight)[0], torch.zeros(8))
    mixer, h = GatedDeltaNet(64, 2), leaf(1, 0, 64)
    out, memory = mixer(h)
    assert out.shape == h.shape and not memory.conv.any() and not memory.state.any()
    (out.sum() + memory.state.sum() + memory.conv.sum()).backward()
    assert h.grad is not None and h.grad.shape == h.shape
    with torch.no_grad():
        assert mixer(h)[0].shape == h.shape


def test_gradients_of_gradients() -> None:
    """Of a loss with a penalty on its gradients, as if torch had recorded all."""

    def penalised(y: list[Tensor], leaves: list[Any]) -> list[Tensor]:
        loss = sum((t * torch.linspace(-1, 1, t.numel()).view(t.shape).to(t)).square().sum() for t in y)
        first = torch.autograd.grad(loss, leaves, create_graph=True)  # type: ignore[arg-type]
        return list(torch.autograd.grad(loss + sum(d.square().sum() for d in first), leaves))  # type: ignore[arg-type]

    leaves: list[Any] = [leaf(2, 9, 8), leaf(8, 4), leaf(8), leaf(2, 3, 8)]
    true = doubled(leaves)
    expected = list(convolved(true[0], true[1], true[2], true[3], True))
    compare(penalised(list(short_convolution(*leaves)), leaves), penalised(expected, true), 1e-5)
    leaves = [leaf(2, 9, 2, 8), leaf(2, 9, 2, 8), leaf(8)]
    true = doubled(leaves)
    for gate_first in (False, True):
        ours = gated_rms_norm(*leaves, 1e-6, "silu", gate_first)
        expected = [normed(true[0], true[1], true[2], 1e-6, "silu", gate_first)]
        compare(penalised([ours], leaves), penalised(expected, true), 1e-5)


def test_forward_mode_is_refused() -> None:
    x, weight, gain = torch.randn(1, 9, 8), torch.randn(8, 4), torch.randn(8)
    trained = leaf(8)
    calls: list[Any] = [
        lambda t: short_convolution(t, weight)[0],
        lambda t: short_convolution_step(t[:, 0], torch.zeros(1, 8, 4), weight),
        lambda t: gated_rms_norm(t, x, gain),
        lambda t: gated_rms_norm(x, t, trained),
    ]
    for call in calls:
        with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="reverse mode only"):
            call(forward_ad.make_dual(x, torch.randn_like(x)))
        with pytest.raises(NotImplementedError, match="reverse mode only"):
            torch.func.jvp(call, (x,), (x,))
        with forward_ad.dual_level():
            assert torch.equal(call(x), call(x))


def test_a_backend_by_name() -> None:
    x, weight, state = torch.randn(1, 5, 8), torch.randn(8, 4), torch.zeros(1, 8, 4)
    calls: list[Any] = [
        lambda backend: short_convolution(x, weight, backend=backend)[0],
        lambda backend: short_convolution_step(x[:, 0], state.clone(), weight, backend=backend),
        lambda backend: gated_rms_norm(x, x, weight[:, 0], backend=backend),
        lambda backend: gated_rms_norm(x[0], x[0], weight[:, 0], backend=backend),
    ]
    for call in calls:
        assert torch.equal(call(None), call("cpu"))
        assert relative_error(call("torch"), call("cpu")) < SAME_SUMS
        with pytest.raises(ValueError, match="^backend: got 'typo'; expected one of cpu, triton, torch"):
            call("typo")
    for name, call in {
        "no kernel for torch.float64": lambda: gated_rms_norm(x.double(), x.double(), weight[:, 0], backend="cpu"),
        "at most W = 4, got 5": lambda: short_convolution(x, torch.randn(8, 5), backend="cpu"),
        "not contiguous": lambda: short_convolution_step(
            x[:, 0], torch.zeros(1, 4, 8).transpose(1, 2), weight, backend="cpu"
        ),
    }.items():
        with pytest.raises(ValueError, match=f"^backend: got 'cpu', which cannot do this call: .*{name}"):
            call()


def test_types_of_the_kernels_have_codes() -> None:
    assert tuple(TYPE_CODES) == KERNEL_TYPES
