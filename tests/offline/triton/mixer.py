"""The launches of the mixer's own operators, recorded on meta tensors for the gate."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from compiling import Launch
from torch import Tensor

from sleepkern.backends.triton import mixer_launch as launch

CHANNELS = 8192
"""Channels of a convolution: 16 heads of 128 for q and k and 32 for v, as in Qwen3-Next."""


@dataclass(frozen=True)
class Operator:
    """A call of one of the mixer's operators."""

    name: str
    run: Callable[[], Any]

    def launch(self) -> Launch:
        """The one launch that the product would make."""
        seen: list[Launch] = []

        def note(kernel: Any, programs: int, warps: int, *arguments: Any) -> None:
            seen.append(Launch(kernel, dict(zip(kernel.arg_names, arguments, strict=True)), warps, 3))

        with mock.patch.object(launch, "launch", note):
            self.run()
        (one,) = seen
        return one


def operators(quick: bool) -> Iterator[Operator]:
    """Every kernel in every type, with all switches on; then the switches and sizes that these do not show."""
    for dtype in (torch.bfloat16,) if quick else (torch.bfloat16, torch.float16, torch.float32):
        yield from _convolutions(dtype)
        yield from _norms(dtype)
    if not quick:
        yield from _convolutions(torch.bfloat16, W=8, T=24)
        yield from _convolutions(torch.bfloat16, D=100, plain=True)
        yield from _norms(torch.bfloat16, V=8192, gate_first=True)
        yield from _norms(torch.bfloat16, V=96, heads=True)


def meta(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor without memory."""
    return torch.empty(size, dtype=dtype, device="meta")


def _convolutions(
    dtype: torch.dtype, D: int = CHANNELS, W: int = 4, T: int = 8192, plain: bool = False
) -> Iterator[Operator]:
    name = f"{str(dtype).removeprefix('torch.')} T={T} D={D} W={W}{' plain' * plain}"
    x, weight, bias, past = meta(1, T, D, dtype=dtype), meta(D, W), meta(D), meta(1, W - 1, D, dtype=dtype)
    state, dlast, offsets = meta(1, D, W, dtype=dtype), meta(1, W - 1, D, dtype=dtype), meta(2, dtype=torch.int32)
    more: Any = (None, None, None, False) if plain else (bias, past, offsets, True)
    upstream = (x, None if plain else dlast)
    yield Operator(f"convolution {name}", lambda: launch.convolve(x, weight, *more))
    yield Operator(f"convolution backward {name}", lambda: launch.convolve_backward(x, weight, *more, *upstream))
    yield Operator(f"step {name}", lambda: launch.convolve_step(x[0, :1], state, weight, more[0], more[3]))


def _norms(dtype: torch.dtype, V: int = 128, heads: bool = False, gate_first: bool = False) -> Iterator[Operator]:
    name = f"{str(dtype).removeprefix('torch.')} V={V}{' gate first' * gate_first}"
    x, weight = meta(1, 8192, 32, V, dtype=dtype), meta(*((32, V) if heads else (V,)))
    options: Any = (1e-6, True, gate_first)
    yield Operator(f"norm {name}", lambda: launch.gated_norm(x, x, weight, *options))
    yield Operator(f"norm backward {name}", lambda: launch.gated_norm_backward(x, x, weight, *options, x))
