"""The interpreter's own arithmetic, once corrected: bfloat16 and tf32 as a GPU rounds them."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def product_kernel(p_a, p_b, p_c, N: tl.constexpr, PRECISION: tl.constexpr):
    """c = a @ b."""
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(p_c + at, tl.dot(tl.load(p_a + at), tl.load(p_b + at), input_precision=PRECISION))


@triton.jit
def arithmetic_kernel(p_a, p_b, p_c, N: tl.constexpr):
    """c = a * b + a - b, each step in the operands' type."""
    at = tl.arange(0, N)
    a, b = tl.load(p_a + at), tl.load(p_b + at)
    tl.store(p_c + at, a * b + a - b)


@triton.jit
def cast_kernel(p_a, p_c, N: tl.constexpr):
    """c = a in the type of c."""
    at = tl.arange(0, N)
    tl.store(p_c + at, tl.load(p_a + at).to(p_c.dtype.element_ty))


@triton.jit
def choice_kernel(p_a, p_b, p_c, N: tl.constexpr):
    """c = -a where a < b, else |b|: one operand, and a comparison."""
    at = tl.arange(0, N)
    a, b = tl.load(p_a + at), tl.load(p_b + at)
    tl.store(p_c + at, tl.where(a < b, -a, tl.abs(b)))


@triton.jit
def device_sum(p, N: tl.constexpr):
    return tl.sum(tl.load(p + tl.arange(0, N)), 0)


@triton.jit
def nested_kernel(p_a, p_c, N: tl.constexpr):
    """c = (sum of a, sum of a): functions of the kernel's own and of Triton's library, called twice."""
    tl.store(p_c, device_sum(p_a, N))
    tl.store(p_c + 1, device_sum(p_a, N))


def multiply(a: Tensor, b: Tensor, precision: str) -> Tensor:
    c = torch.empty(a.shape)
    product_kernel[(1,)](a, b, c, N=a.shape[0], PRECISION=precision)
    return c


def error(c: Tensor, a: Tensor, b: Tensor) -> float:
    exact = a.double() @ b.double()
    return float((c - exact).norm() / exact.norm())


def test_products() -> None:
    a, b = torch.randn(64, 64), torch.randn(64, 64)
    assert error(multiply(a, b, "ieee"), a, b) < 1e-6
    assert 1e-4 < error(multiply(a, b, "tf32"), a, b) < 1e-3
    assert error(multiply(a, b, "tf32x3"), a, b) < 1e-6
    assert error(multiply(a.bfloat16(), b.bfloat16(), "tf32"), a.bfloat16(), b.bfloat16()) < 1e-6


def test_arithmetic_rounds_each_step() -> None:
    a, b = torch.randn(256).bfloat16(), torch.randn(256).bfloat16()
    c = torch.empty_like(a)
    arithmetic_kernel[(1,)](a, b, c, N=256)
    assert torch.equal(c, a * b + a - b)


def test_comparisons_and_signs() -> None:
    a, b = torch.randn(256).bfloat16(), torch.randn(256).bfloat16()
    c = torch.empty_like(a)
    choice_kernel[(1,)](a, b, c, N=256)
    assert torch.equal(c, torch.where(a < b, -a, b.abs()))


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float16),
        (torch.float16, torch.bfloat16),
        (torch.float32, torch.float16),
        (torch.int32, torch.bfloat16),
    ],
    ids=str,
)
def test_casts_round_to_nearest_even(source: torch.dtype, target: torch.dtype) -> None:
    a = torch.randn(1024).mul(300).to(source)
    c = torch.empty(1024, dtype=target)
    cast_kernel[(1,)](a, c, N=1024)
    assert torch.equal(c, a.to(target))


def test_casts_of_ties_and_of_what_is_no_number() -> None:
    """Halfway between two bfloat16 values the even one is taken, on both sides; random numbers are hardly ever ties."""
    ties = (torch.arange(0x3F80, 0x3F80 + 60, dtype=torch.int32) * 65536 + 0x8000).view(torch.float32)
    a = torch.cat([ties, torch.tensor([torch.inf, -torch.inf, 3.4e38, torch.nan])])
    c = torch.empty(64, dtype=torch.bfloat16)
    cast_kernel[(1,)](a, c, N=64)
    torch.testing.assert_close(c, a.bfloat16(), rtol=0, atol=0, equal_nan=True)


def test_functions_called_twice_in_a_launch_and_in_the_next_one() -> None:
    """patch_language leaves what is patched alone, also after a launch has undone its own."""
    a = torch.arange(16.0)
    for _ in range(2):
        c = torch.empty(2)
        nested_kernel[(1,)](a, c, N=16)
        assert c.tolist() == [120.0, 120.0]
