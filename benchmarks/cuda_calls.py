"""Calls that together reach every CUDA kernel in every mode (docs/kernels/cuda_replay.md), and their check."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import sleepkern
from sleepkern.rules import DELTA_RULE, GATED_DELTA_RULE, KDA, Rule
from sleepkern.testing import TOLERANCE, Shape, make_inputs, relative_error, rules_of, to_float64

WINDOWS = (
    Shape(B=2, T=1, H=1, HV=1, K=16, V=16),
    Shape(T=24, H=1, HV=2, K=32, V=48),
    Shape(T=64, H=2, HV=2, K=128, V=128),
    Shape(T=40, H=1, HV=1, K=96, V=256),
)
LONG = (
    Shape(T=150, H=2, HV=4, K=64, V=64),
    Shape(T=330, H=1, HV=1, K=128, V=128),
    Shape(T=1500, H=1, HV=1, K=128, V=32),  # more chunks than shared memory holds
    Shape(H=1, HV=2, K=32, V=32, lengths=(1, 64, 65, 17, 0, 3)),
)
SMALL = (WINDOWS[1], Shape(T=70, H=1, HV=1, K=64, V=32), Shape(T=66, H=1, HV=1, K=128, V=16), LONG[3])
STEPS = (
    Shape(B=3, T=1, H=1, HV=2, K=64, V=64),
    Shape(T=3, H=1, HV=1, K=128, V=128),
    Shape(T=8, H=1, HV=1, K=200, V=37),
)
TYPES = (torch.bfloat16, torch.float32, torch.float16)


@dataclass(frozen=True)
class Call:
    """A replay, or with passes None a step on states of a pool."""

    rule: Rule
    shape: Shape
    dtype: torch.dtype
    passes: int | None = 3
    method: str = "auto"
    tol: float | None = None
    outputs: bool = True

    @property
    def name(self) -> str:
        """One line on it."""
        s, kind = self.shape, str(self.dtype).removeprefix("torch.")
        what = "step" if self.passes is None else f"N={self.passes} {self.method}"
        rest = " tol" * (self.tol is not None) + " state only" * (not self.outputs) + " packed" * bool(s.lengths)
        return f"{self.rule.name} {kind} T={s.T} K={s.K} V={s.V} {what}{rest}"

    def inputs(self, device: str, seed: int = 0) -> dict[str, Any]:
        """Tensors of the call."""
        x = make_inputs(self.rule, self.shape, self.dtype, seed=seed, device=device)
        if self.passes is None:
            state = x.pop("initial_state")
            del x["cu_seqlens"]
            x["state"] = torch.cat([state.flip(0), state])
            x["state_indices"] = torch.arange(len(state), device=device).flip(0)
        elif not self.outputs:
            x["q"] = None
        return x

    def run(self, x: dict[str, Any], backend: str = "cuda") -> tuple[Tensor | None, Tensor]:
        """(outputs, state)."""
        if self.passes is None:
            return sleepkern.recurrent_step(**x, rule=self.rule, backend=backend)
        method = self.method if backend == "cuda" else "auto"
        slept = sleepkern.sleep_ingest(
            **x, passes=self.passes, rule=self.rule, method=method, tol=self.tol, backend=backend
        )
        return slept.output, slept.final_state

    def error(self, device: str) -> float:
        """Larger relative error against the float64 reference, which walks over tokens faster on the CPU."""
        x = self.inputs(device)
        on_cpu = {name: t.cpu() if isinstance(t, Tensor) else t for name, t in x.items()}
        expected = self.run(to_float64(on_cpu), "reference")
        pairs = [(a, e) for a, e in zip(self.run(x), expected, strict=True) if a is not None and e is not None]
        return max(relative_error(a, e) for a, e in pairs)

    @property
    def tolerance(self) -> float:
        """Of the error."""
        return TOLERANCE[self.dtype]


def calls(small: bool = False) -> Iterator[Call]:
    """All of them, or a few on small shapes, for tools that make a GPU a hundred times slower."""
    rules = (GATED_DELTA_RULE, KDA) if small else (GATED_DELTA_RULE, DELTA_RULE, KDA)
    for rule in rules:
        for dtype in TYPES[:2] if small else TYPES:
            for shape in SMALL if small else WINDOWS + LONG:
                window = shape.lengths is None and shape.T <= 64
                for method in ("wy", "affine", "rank") if window and rule.gate != "channel" else ("wy", "affine"):
                    yield Call(rule, shape, dtype, method=method)
            yield Call(rule, SMALL[1], dtype, outputs=False)
        for shape in (SMALL[0], SMALL[1], SMALL[3]):
            for method in ("wy", "affine"):
                yield Call(rule, shape, torch.float32, passes=30, method=method, tol=1e-3)
    for rule in rules_of("cuda").values():
        for shape in STEPS:
            yield Call(rule, shape, torch.bfloat16, passes=None)
