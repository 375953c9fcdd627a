"""The mixer's own operators in Triton against torch's operators in float64, forward and every gradient."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import triton.language as tl
from torch import Tensor

from sleepkern import settings
from sleepkern.backends.triton import mixer, mixer_launch
from sleepkern.dispatch import choose_mixer
from sleepkern.nn import gated_rms_norm, short_convolution, short_convolution_step
from sleepkern.problems.mixer import check_convolution, check_gated_norm
from sleepkern.testing import relative_error
from sleepkern.testing.tolerances import SAME_SUMS

BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 6e-3, torch.float16: 8e-4}
TYPES = list(BOUNDS)
# An exponential may overflow: exp(200) is infinite, and its sigmoid is 0. One test has infinite inputs.
pytestmark = [
    pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered in multiply:RuntimeWarning"),
]


@pytest.fixture(autouse=True)
def requested() -> Iterator[None]:
    """The process requests Triton, so that operators on CPU tensors go to its interpreter."""
    torch.manual_seed(0)
    with settings.backend("triton"):
        yield


def leaf(*size: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    return (torch.randn(*size) * scale).to(dtype).requires_grad_()


def doubled(leaves: list[Tensor | None]) -> list[Any]:
    return [None if t is None else t.detach().double().requires_grad_() for t in leaves]


def gradients(results: list[Tensor], leaves: list[Tensor | None]) -> list[Tensor]:
    """Gradients of a sum of the results with weights that differ from element to element."""
    present = [t for t in leaves if t is not None]
    upstream = [torch.linspace(-1, 2, t.numel()).view(t.shape).to(t) for t in results]
    return list(torch.autograd.grad(results, present, upstream))


def compare(found: list[Tensor], expected: list[Tensor], bound: float) -> None:
    for number, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert a.shape == b.shape
        if b.numel():
            assert relative_error(a, b) < bound, number


def compare_convolution(leaves: list[Any], dtype: torch.dtype, activation: str | None = "silu", **more: Any) -> None:
    true = doubled(leaves)
    found = list(short_convolution(*leaves, activation=activation, **more, backend="triton"))
    expected = list(short_convolution(*true, activation=activation, **more, backend="torch"))
    assert found[0].dtype == dtype
    compare(found, expected, BOUNDS[dtype])
    compare(gradients(found, leaves), gradients(expected, true), 2 * BOUNDS[dtype])


@pytest.mark.parametrize(
    ("B", "T", "D", "W", "dtype"),
    [
        (2, 0, 5, 4, torch.float32),
        (2, 1, 96, 4, torch.bfloat16),
        (3, 2, 1, 3, torch.float32),
        (1, 3, 257, 4, torch.float16),
        (2, 15, 5, 2, torch.float32),
        (1, 17, 130, 4, torch.bfloat16),
        (2, 63, 33, 4, torch.float32),
        (1, 65, 96, 3, torch.float16),
        (1, 1000, 5, 4, torch.bfloat16),
        (1, 40, 17, 1, torch.float32),
        (1, 20, 20, 8, torch.float32),
    ],
)
@pytest.mark.parametrize("plain", [False, True], ids=["bias-past-silu", "plain"])
def test_convolution(B: int, T: int, D: int, W: int, dtype: torch.dtype, plain: bool) -> None:
    weights = dtype if plain else torch.float32  # under autocast they differ from x
    leaves = [leaf(B, T, D, dtype=dtype), leaf(D, W, dtype=weights), None, None]
    if not plain:
        leaves[2:] = leaf(D), leaf(B, W - 1, D, dtype=dtype)
    compare_convolution(leaves, dtype, None if plain else "silu")


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("has_past", [True, False], ids=["past", "zeros"])
def test_packed_sequences_out_of_the_middle_of_a_projection(has_past: bool, dtype: torch.dtype) -> None:
    """Sequences of 0 to 100 tokens, the first and the last of none; each is convolved as if it were alone."""
    lengths, D = [0, 5, 1, 0, 0, 100, 2, 30, 3, 0], 40
    offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    x = torch.randn(1, int(offsets[-1]), 3 * D).to(dtype)[..., D : 2 * D].requires_grad_()
    past = leaf(len(lengths), 3, D, dtype=dtype) if has_past else None
    compare_convolution([x, leaf(D, 4), leaf(D), past], dtype, cu_seqlens=offsets)


def test_more_packed_sequences_than_one_step_of_the_search_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sleepkern.backends.triton.short_convolution.SEARCH", tl.constexpr(4))
    offsets = torch.tensor([0, *torch.tensor([2, 0, 1] * 3).cumsum(0)])
    leaves = [leaf(1, int(offsets[-1]), 3), leaf(3, 4), None, leaf(9, 3, 3)]
    compare_convolution(leaves, torch.float32, cu_seqlens=offsets)


def test_rows_at_other_strides() -> None:
    wide = torch.randn(2, 30, 24)
    for x in (wide[:, 3:20], wide.expand(2, 30, 24)[:1].expand(3, 30, 24), torch.randn(2, 24, 9).transpose(1, 2)):
        compare_convolution([x.detach().requires_grad_(), leaf(24, 4), None, None], torch.float32)


def test_gradients_of_one_result_alone() -> None:
    leaves: list[Any] = [leaf(1, 9, 4), leaf(4, 4), leaf(4), leaf(1, 3, 4)]
    true = doubled(leaves)
    found, expected = short_convolution(*leaves, backend="triton"), short_convolution(*true, backend="torch")
    for a, b in zip(found, expected, strict=True):
        for ours, exact in zip(
            torch.autograd.grad(a.sum(), leaves, retain_graph=True, materialize_grads=True),
            torch.autograd.grad(b.sum(), true, retain_graph=True, materialize_grads=True),
            strict=True,
        ):
            assert torch.allclose(ours.double(), exact, rtol=1e-5, atol=1e-6)


def test_infinite_inputs_stay_in_their_sequence() -> None:
    x = torch.randn(1, 12, 3)
    x[0, 5] = torch.inf
    y, _ = short_convolution(x, torch.randn(3, 4), cu_seqlens=torch.tensor([0, 6, 12]), backend="triton")
    assert torch.isfinite(y[0, :5]).all() and torch.isfinite(y[0, 6:]).all()


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("W", [1, 2, 4])
def test_step(W: int, dtype: torch.dtype) -> None:
    B, T, D = 2, 6, 321
    x, weight, bias = torch.randn(B, T, 2 * D).to(dtype)[..., D:], torch.randn(D, W), torch.randn(D)
    state = torch.zeros(B, D, W, dtype=dtype)
    memory, version = state.data_ptr(), state._version
    for silu in ("silu", None):
        steps = [short_convolution_step(x[:, t], state, weight, bias, silu, backend="triton") for t in range(T)]
        expected, _ = short_convolution(x.double(), weight.double(), bias.double(), activation=silu, backend="torch")
        assert relative_error(torch.stack(steps, dim=1), expected) < BOUNDS[dtype]
        assert torch.equal(state, x[:, -W:].transpose(1, 2))
        state.zero_()
    assert state.data_ptr() == memory and state._version > version


@pytest.mark.parametrize(
    ("shape", "heads", "dtype"),
    [
        ((2, 17, 3, 37), False, torch.float32),
        ((1, 40, 2, 128), True, torch.bfloat16),
        ((50, 64), False, torch.float16),
        ((2, 3, 1500), False, torch.bfloat16),
        ((1, 3, 8192), False, torch.float32),
        ((1, 1, 5, 3), True, torch.float32),
        ((2, 0, 3, 8), True, torch.float32),
    ],
)
@pytest.mark.parametrize("activation", ["silu", "sigmoid"])
@pytest.mark.parametrize("gate_first", [False, True])
def test_norm(shape: tuple[int, ...], heads: bool, activation: str, gate_first: bool, dtype: torch.dtype) -> None:
    leaves: list[Any] = [leaf(*shape, dtype=dtype), leaf(*shape, dtype=dtype, scale=3.0)]
    leaves.append(leaf(*shape[2:]) if heads else leaf(shape[-1]))
    compare_norm(leaves, dtype, activation, gate_first)


def compare_norm(leaves: list[Any], dtype: torch.dtype, activation: str, gate_first: bool) -> None:
    true = doubled(leaves)
    found = gated_rms_norm(*leaves, 1e-5, activation, gate_first, backend="triton")
    expected = gated_rms_norm(*true, 1e-5, activation, gate_first, backend="torch")
    assert found.dtype == dtype
    compare([found], [expected], BOUNDS[dtype])
    compare(gradients([found], leaves), gradients([expected], true), 2 * BOUNDS[dtype])


@pytest.mark.parametrize("activation", ["silu", "sigmoid"])
@pytest.mark.parametrize("gate_first", [False, True])
def test_gates_that_are_closed_or_open(activation: str, gate_first: bool) -> None:
    gate = torch.tensor([-200.0, -20.0, 0.0, 20.0, 200.0]).repeat_interleave(16).view(1, 5, 16).requires_grad_()
    x, weight = leaf(1, 5, 16), leaf(16)
    y = gated_rms_norm(x, gate, weight, 1e-6, activation, gate_first, backend="triton")
    grads = torch.autograd.grad(y.sum(), [x, gate, weight])
    true = doubled([x, gate, weight])
    expected = gated_rms_norm(*true, 1e-6, activation, gate_first, backend="torch")
    exact = torch.autograd.grad(expected.sum(), true)
    for a, b in zip((y, *grads), (expected, *exact), strict=True):
        assert torch.allclose(a.double(), b, rtol=2e-5, atol=1e-6)


def test_heads_of_a_projection_are_read_in_place() -> None:
    projection = torch.randn(2, 9, 3 * 4 * 16)
    x, gate = (projection[..., 64 * i : 64 * i + 64].view(2, 9, 4, 16) for i in (0, 2))
    for weight in (leaf(16), leaf(4, 16)):
        leaves = [x.detach().requires_grad_(), gate.detach().requires_grad_(), weight]
        assert not leaves[0].is_contiguous()
        compare_norm(leaves, torch.float32, "silu", False)


def test_two_runs_of_a_mixer_are_equal_bit_for_bit() -> None:
    x, weight, bias, past = leaf(1, 150, 24), leaf(24, 4), leaf(24), leaf(2, 3, 24)
    gain, offsets = leaf(24), torch.tensor([0, 40, 150])

    def run() -> list[Tensor]:
        y, last = short_convolution(x, weight, bias, past, cu_seqlens=offsets, backend="triton")
        z = gated_rms_norm(y, x, gain, backend="triton")
        return [y, last, z, *torch.autograd.grad(z.sum() + last.sum(), [x, weight, bias, past, gain])]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_compiled_without_graph_breaks() -> None:
    x, weight, gain = leaf(1, 12, 8), leaf(8, 4), leaf(8)
    offsets = torch.tensor([0, 5, 12])

    def run(x: Tensor, weight: Tensor, gain: Tensor) -> Tensor:
        y, _ = short_convolution(x, weight, cu_seqlens=offsets, backend="triton")
        return gated_rms_norm(y, x, gain, backend="triton")

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    leaves: list[Tensor | None] = [x, weight, gain]
    a, b = compiled(x, weight, gain), run(x, weight, gain)
    compare([a, *gradients([a], leaves)], [b, *gradients([b], leaves)], SAME_SUMS)


def test_operators_are_well_behaved() -> None:
    x, weight, bias, past = leaf(1, 5, 3), leaf(3, 4), leaf(3), leaf(1, 3, 3)
    torch.library.opcheck(torch.ops.sleepkern.convolve.default, (x, weight, bias, past, None, True))
    torch.library.opcheck(torch.ops.sleepkern.gated_norm.default, (x, x, leaf(3), 1e-6, True, False))


def test_refusals_are_sentences() -> None:
    x = torch.randn(1, 5, 8)
    for reason, call in {
        "at most W = 8, got 9": lambda: short_convolution(x, torch.randn(8, 9), backend="triton"),
        "at most V = 8192, got 8193": lambda: gated_rms_norm(
            torch.randn(1, 1, 8193), torch.randn(1, 1, 8193), torch.ones(8193), backend="triton"
        ),
        "no kernel for torch.float64": lambda: gated_rms_norm(x.double(), x.double(), x[0, 0], backend="triton"),
        "not contiguous": lambda: short_convolution_step(
            x[:, 0], torch.zeros(1, 4, 8).transpose(1, 2), torch.randn(8, 4), backend="triton"
        ),
    }.items():
        with pytest.raises(ValueError, match=reason):
            call()
    with settings.backend(None), pytest.raises(ValueError, match="where SLEEPKERN_BACKEND=triton requests it"):
        short_convolution(x, torch.randn(8, 4), backend="triton")
    with pytest.raises(ValueError, match="cu_seqlens: "):
        short_convolution(x, torch.randn(8, 4), cu_seqlens=torch.tensor([0, 4]), backend="triton")


def test_a_gpu_takes_these_kernels() -> None:
    """The choice by a problem on a device that need not be there."""
    x = torch.randn(1, 5, 8)
    with settings.backend(None):
        for problem in (
            check_convolution(x, torch.randn(8, 4), None, None, "silu", None),
            check_gated_norm(x, x, torch.ones(8), 1e-6, "silu", False),
        ):
            chosen = choose_mixer(problem._replace(device="cuda"))
            assert chosen is mixer and chosen.kernel(problem) == "Triton, one launch"


@pytest.mark.parametrize("size", [2, 4])
def test_tiles_fit_their_threads(size: int) -> None:
    for T in (1, 32, 33, 8192):
        for backward in (False, True):
            dims = mixer_launch.convolution_tile(8192, 4, T, size, backward)
            assert dims.N * dims.BD % 128 == 0 and dims.N * dims.BD * size <= 128 * 16
            assert dims.N * dims.R <= (32 if T <= 32 else 64)
