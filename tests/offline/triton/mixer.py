"""The launches of the mixer's own operators, recorded on meta tensors for the gate."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from compiling import Compiled, Launch
from torch import Tensor

from sleepkern.backends.triton import mixer_launch
from sleepkern.backends.triton.mixer import LONGEST_ROW

CHANNELS = 8192
"""Channels of a convolution: 16 heads of 128 for q and k and 32 for v, as in Qwen3-Next."""
TYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
WIDEST_STACK = 64
"""Bytes that a thread may spill in a norm of LONGEST_ROW elements: its 512 threads have 128 registers each."""
CONVOLUTIONS = ("convolve_kernel", "convolve_backward_kernel", "convolve_step_kernel")
NORMS = ("gated_norm_kernel", "gated_norm_backward_kernel")


@dataclass(frozen=True)
class Operator:
    """A call of one kernel; capability is what it is compiled for.

    plain: no bias, past, offsets, activation or gradient of the last inputs. heads: a weight for each head.
    """

    kernel: str
    type: str
    capability: int
    T: int = 8192
    D: int = CHANNELS
    W: int = 4
    V: int = 128
    plain: bool = False
    heads: bool = False
    gate_first: bool = False

    @property
    def name(self) -> str:
        """What the gate prints."""
        if self.kernel in NORMS:
            return f"gated norm {self.type} V={self.V}{' a weight each' * self.heads}{' gate first' * self.gate_first}"
        return f"convolution {self.type} T={self.T} D={self.D} W={self.W}{' plain' * self.plain}"

    @property
    def architecture(self) -> int:
        """What it is compiled for."""
        return self.capability

    def launch(self) -> Launch:
        """The one launch that the product would make."""
        seen: list[Launch] = []

        def note(kernel: Any, programs: int, warps: int, *arguments: Any) -> None:
            seen.append(Launch(kernel, dict(zip(kernel.arg_names, arguments, strict=True)), warps, 3))

        with mock.patch.object(mixer_launch, "launch", note):
            self._norm() if self.kernel in NORMS else self._convolution()
        (one,) = seen
        return one

    def faults(self, made: Compiled) -> Iterator[str]:
        """What is wrong with the machine code: these kernels may not spill, but for a few values of the widest norm."""
        if made.stack > (WIDEST_STACK if self.V == LONGEST_ROW else 0):
            yield f"stack {made.stack}, {made.spills} spills"
        if made.instructions < 100:
            yield f"an empty body ({made.instructions} instructions)"

    def _convolution(self) -> None:
        T, D, W = self.T, self.D, self.W
        x, weight, bias = self._meta(1, T, D), meta(D, W), meta(D)
        past, offsets = self._meta(1, W - 1, D), meta(2, dtype=torch.int32)
        more: Any = (None, None, None, False) if self.plain else (bias, past, offsets, True)
        if self.kernel == "convolve_kernel":
            mixer_launch.convolve(x, weight, *more)
        elif self.kernel == "convolve_backward_kernel":
            mixer_launch.convolve_backward(x, weight, *more, x, None if self.plain else past)
        else:
            mixer_launch.convolve_step(x[0, :1], self._meta(1, D, W), weight, more[0], more[3])

    def _norm(self) -> None:
        x, weight = self._meta(1, 8192, 32, self.V), meta(*((32, self.V) if self.heads else (self.V,)))
        options: Any = (1e-6, True, self.gate_first)
        if self.kernel == "gated_norm_kernel":
            mixer_launch.gated_norm(x, x, weight, *options)
        else:
            mixer_launch.gated_norm_backward(x, x, weight, *options, x)

    def _meta(self, *size: int) -> Tensor:
        return meta(*size, dtype=TYPES[self.type])


def operators(quick: bool, capabilities: tuple[int, ...]) -> Iterator[Operator]:
    """Every kernel in every type with all switches on; then the sizes and switches that these do not show, on sm_90."""
    for kernel in (*CONVOLUTIONS, *NORMS):
        for dtype in ("bf16",) if quick else TYPES:
            for capability in (90,) if quick else capabilities:
                yield Operator(kernel, dtype, capability)
    if quick:
        return
    for kernel in CONVOLUTIONS:
        yield Operator(kernel, "bf16", 90, T=24, W=8)
        yield Operator(kernel, "bf16", 90, D=100, plain=True)
    for kernel in NORMS:
        yield Operator(kernel, "bf16", 90, V=LONGEST_ROW, gate_first=True)
        yield Operator(kernel, "bf16", 90, V=96, heads=True)


def meta(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor without memory."""
    return torch.empty(size, dtype=dtype, device="meta")
