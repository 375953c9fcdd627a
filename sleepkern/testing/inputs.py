"""Random inputs of a call, its result by any backend, and how far two results are apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..dispatch import backend_named
from ..ops import recurrence as ops
from ..rules import RULES, Rule

Decay = Literal["slow", "zero", "strong", "extreme", "mixed"]


@dataclass(frozen=True)
class Shape:
    """Sizes of a call; `lengths` packs sequences of these lengths (then B is 1 and T their sum)."""

    B: int = 1
    T: int = 64
    H: int = 2
    HV: int = 2
    K: int = 64
    V: int = 64
    lengths: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.lengths is not None:
            object.__setattr__(self, "B", 1)
            object.__setattr__(self, "T", sum(self.lengths))

    @property
    def sequences(self) -> int:
        """Number of states."""
        return self.B if self.lengths is None else len(self.lengths)


AWKWARD_SHAPES: dict[str, Shape] = {
    "one token": Shape(B=2, T=1),
    "T=3 K=200 V=37": Shape(T=3, H=1, HV=1, K=200, V=37),
    "T=15": Shape(T=15, K=32, V=48),
    "T=17": Shape(T=17, K=48, V=32),
    "T=63": Shape(T=63),
    "T=65": Shape(T=65),
    "T=1000": Shape(T=1000, H=1, HV=1, K=32, V=32),
    "K=V=128": Shape(T=130, H=1, HV=1, K=128, V=128),
    "K=96 V=256": Shape(T=100, H=1, HV=1, K=96, V=256),
    "K=256 V=7": Shape(T=70, H=1, HV=1, K=256, V=7),
    "K=5 V=3": Shape(B=2, T=33, H=1, HV=1, K=5, V=3),
    "grouped": Shape(B=2, T=80, H=2, HV=6, K=32, V=32),
    "packed": Shape(H=1, HV=2, K=32, V=32, lengths=(1, 64, 65, 17, 0, 3)),
}
"""Shape classes: lengths around chunk and tile borders, K != V, odd head sizes, grouped heads, packed sequences."""

_LOG_DECAY: dict[str, tuple[float, float]] = {
    "slow": (-0.1, -0.01),
    "zero": (0.0, 0.0),
    "strong": (-20.0, -20.0),
    "extreme": (-200.0, -200.0),
    "mixed": (-20.0, 0.0),
}


def make_inputs(
    rule: Rule,
    shape: Shape,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    device: str = "cpu",
    decay: Decay = "slow",
    beta_max: float = 1.0,
    correlation: float = 0.0,
    initial_state: bool = True,
) -> dict[str, Any]:
    """Random arguments of the rule's public function (those that are tensors), drawn on the CPU from `seed`.

    Slow decay is the default because random gates forget within a token and hide faults of the state. q and k have
    length 1; `correlation` mixes one common direction into all keys. g and the state are float32 (float64 for
    float64), beta has the type of q.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = (shape.B, shape.T)
    precise = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    def unit(x: Tensor) -> Tensor:
        return torch.nn.functional.normalize(x, dim=-1)

    low, high = _LOG_DECAY[decay]
    k = normal(*rows, shape.H, shape.K)
    if correlation:
        k = (1 - correlation) ** 0.5 * k + correlation**0.5 * normal(shape.H, shape.K)
    tail = (shape.K,) if rule.gate == "channel" else ()
    g = low + (high - low) * torch.rand(*rows, shape.HV, *tail, generator=generator, dtype=torch.float64)
    beta = beta_max * torch.rand(*rows, shape.HV, generator=generator, dtype=torch.float64)
    state = normal(shape.sequences, shape.HV, shape.K, shape.V)
    offsets = None
    if shape.lengths is not None:
        offsets = torch.tensor([0, *shape.lengths]).cumsum(0).to(device)
    inputs: dict[str, Any] = {
        "q": unit(normal(*rows, shape.H, shape.K)).to(device, dtype),
        "k": unit(k).to(device, dtype),
        "v": normal(*rows, shape.HV, shape.V).to(device, dtype),
        "g": None if rule.gate == "none" else g.to(device, precise),
        "beta": beta.to(device, dtype),
        "initial_state": state.to(device, precise) if initial_state else None,
        "cu_seqlens": offsets,
    }
    return inputs


def call(
    rule: Rule, inputs: dict[str, Any], backend: str | None = None, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """The rule's public function on `make_inputs`'s arguments; returns the final state unless told otherwise."""
    arguments = {name: x for name, x in inputs.items() if not (name == "g" and rule.gate == "none")}
    options = {"output_final_state": True, **options}
    result: tuple[Tensor, Tensor | None] = getattr(ops, rule.name)(**arguments, backend=backend, **options)
    return result


def rules_of(*backends: str) -> dict[str, Rule]:
    """The rows of RULES that every one of these backends declares in its SUPPORTS, by name."""
    declared = [backend_named(name).SUPPORTS for name in backends]
    return {name: rule for name, rule in RULES.items() if all(rule in supports for supports in declared)}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """|actual - expected| / |expected| in norm, computed in float64; 0 for two empty tensors, inf for NaN."""
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    if expected.numel() == 0:
        return 0.0
    error = float((actual - expected).norm() / expected.norm().clamp_min(1e-300))
    return error if error == error else float("inf")


def to_float64(inputs: dict[str, Any]) -> dict[str, Any]:
    """The same numbers in float64, on the CPU, for the reference."""
    return {
        name: x.double().cpu() if isinstance(x, Tensor) and x.is_floating_point() else
        (x.cpu() if isinstance(x, Tensor) else x)
        for name, x in inputs.items()
    }  # fmt: skip


def type_name(dtype: torch.dtype) -> str:
    """ "float32" for torch.float32."""
    return str(dtype).removeprefix("torch.")
