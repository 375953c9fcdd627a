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
    """c = a * b + a - b / a, each step in the operands' type."""
    at = tl.arange(0, N)
    a, b = tl.load(p_a + at), tl.load(p_b + at)
    tl.store(p_c + at, a * b + a - b)


@triton.jit
def cast_kernel(p_a, p_c, N: tl.constexpr):
    """c = a in the type of c."""
    at = tl.arange(0, N)
    tl.store(p_c + at, tl.load(p_a + at).to(p_c.dtype.element_ty))


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


@pytest.mark.parametrize(("source", "target"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_casts_round_to_nearest_even(source: torch.dtype, target: torch.dtype) -> None:
    a = torch.randn(1024).to(source)
    c = torch.empty(1024, dtype=target)
    cast_kernel[(1,)](a, c, N=1024)
    assert torch.equal(c, a.to(target))
