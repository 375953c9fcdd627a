"""The convolutions and gated norms that a patch puts into modeling files, each beside the stock one."""

from __future__ import annotations

import importlib
import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.hf_models import FAMILIES

import sleepkern
from sleepkern.backends import triton
from sleepkern.integrations.transformers import gated_rms_norm, short_convolution
from sleepkern.testing import relative_error
from sleepkern.testing.tolerances import SAME_SUMS

BOUNDS = {torch.float32: 1e-6, torch.bfloat16: 8e-3}


def modeling(family: str) -> Any:
    return importlib.import_module(f"transformers.models.{family}.modeling_{family}")


def built(norm: type[torch.nn.Module], **options: Any) -> torch.nn.Module:
    made = norm(96, **options)
    torch.nn.init.normal_(made.weight)
    return made


def norms() -> list[tuple[type[torch.nn.Module], dict[str, Any]]]:
    found: list[tuple[type[torch.nn.Module], dict[str, Any]]] = []
    for family in FAMILIES:
        for name, x in vars(modeling(family)).items():
            if not name.endswith("RMSNormGated") or x.__module__ != modeling(family).__name__:
                continue
            if family == "falcon_h1":
                found += [(x, {"n_groups": 3, "norm_before_gate": before}) for before in (True, False)]
            elif "group_size" in inspect.signature(x).parameters:
                found += [(x, {"group_size": size}) for size in (32, 96)]
            else:
                found.append((x, {}))
    return found


@pytest.mark.parametrize("dtype", list(BOUNDS), ids=str)
@pytest.mark.parametrize(("norm", "options"), norms(), ids=lambda x: getattr(x, "__name__", str(x)))
def test_norm_is_the_stock_one(norm: type[torch.nn.Module], options: dict[str, Any], dtype: torch.dtype) -> None:
    module = built(norm, **options)
    x, gate = torch.randn(2, 7, 96).to(dtype), torch.randn(2, 7, 96).to(dtype)
    original, stock = norm.forward, module(x, gate)
    with sleepkern.patch(norm.__module__.split(".")[2]):
        assert norm.forward is not original
        assert module(x, gate).dtype == stock.dtype
        assert relative_error(module(x, gate), stock.double()) < BOUNDS[dtype]
        assert relative_error(module(x[0], gate[0]), stock[0].double()) < BOUNDS[dtype]
    assert norm.forward is original


def test_every_family_has_a_norm_and_convolutions_replaced() -> None:
    for family in FAMILIES:
        with sleepkern.patch(family) as patched:
            named = repr(patched)
        assert "causal_conv1d_fn" in named and "causal_conv1d_update" in named
        assert "RMSNormGated.forward" in named, family


@pytest.mark.parametrize("dtype", list(BOUNDS), ids=str)
@pytest.mark.parametrize("activation", ["silu", None])
def test_convolutions_are_the_stock_ones(activation: str | None, dtype: torch.dtype) -> None:
    module = modeling("qwen3_next")
    x, weight, bias = torch.randn(2, 9, 40).to(dtype).transpose(1, 2), torch.randn(40, 4).to(dtype), torch.randn(40)
    state, bias = torch.randn(2, 40, 4).to(dtype), bias.to(dtype)

    def run() -> tuple[torch.Tensor, ...]:
        own = state.clone()
        many = module.causal_conv1d_fn(x, weight, bias, activation=activation)
        one = module.causal_conv1d_update(x[..., :1], own, weight, bias, activation)
        contiguous = module.causal_conv1d_fn(x.contiguous(), weight, None, activation=activation)
        return many, one, own, contiguous

    stock = run()
    with sleepkern.patch("qwen3_next"):
        ours = run()
    for a, b in zip(ours, stock, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert relative_error(a, b.double()) < BOUNDS[dtype]


def test_packed_rows_of_a_batch_are_kept_apart() -> None:
    """seq_idx of a batch, with three columns of a cache before the first sequence of each row."""
    module = modeling("qwen3_next")
    x, weight = torch.randn(2, 6, 12), torch.randn(6, 4)
    index = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2, 2], [0, 1, 1, 1, 1, 1, 1, 1, 2]])
    with sleepkern.patch("qwen3_next"):
        y = module.causal_conv1d_fn(x, weight, None, activation="silu", seq_idx=index)
        for row, borders in ((0, [0, 6, 8, 12]), (1, [0, 4, 11, 12])):
            for a, b in zip(borders, borders[1:], strict=False):
                alone = module.causal_conv1d_fn(x[row : row + 1, :, a:b], weight, None, activation="silu")
                assert relative_error(y[row : row + 1, :, a:b], alone.double()) < SAME_SUMS


def test_a_gpu_takes_the_kernels_that_triton_has_there(monkeypatch: pytest.MonkeyPatch) -> None:
    x: Any = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16, shape=(1, 8, 1))
    many = short_convolution._Many(x, x, activation="silu")
    one = short_convolution._One(x, x, x, activation="silu")
    norm = SimpleNamespace(activation="silu")
    for refusal, expected in ((None, None), ("Triton is not installed", "no kernel for the device cuda")):
        monkeypatch.setattr(triton, "why_not_on", lambda device, refusal=refusal: refusal)
        assert short_convolution._why_not(many) == expected
        assert short_convolution._why_no_step(one) == expected
        assert gated_rms_norm._why_not(norm, x) == expected
