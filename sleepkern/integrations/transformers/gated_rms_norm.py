"""The gated RMS norm after a mixer's recurrence, as models of transformers call it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sleepkern.nn import gated_rms_norm

from ..fallback import unsupported_reason, use_original
from ..patching import Target


def targets(module: ModuleType) -> list[Target]:
    """The forwards of the gated norms that a modeling file defines; older files import norms, or None."""
    named = (x for name, x in sorted(vars(module).items()) if name.endswith("RMSNormGated"))
    return [Target(x, "forward", forward) for x in named if getattr(x, "__module__", None) == module.__name__]


def forward(original: Callable[..., Any]) -> Callable[..., Any]:
    """The replacement of the forward of a gated norm: one pass over memory.

    Mamba-2's norms come after the gate, over groups of channels; all others before it, over a head.
    """

    @functools.wraps(original)
    def forward_norm(self: Any, hidden_states: Tensor, gate: Tensor | None = None) -> Tensor:
        if gate is None or use_original(_why_not(self, hidden_states)):
            return original(self, hidden_states, gate)  # type: ignore[no-any-return]
        shape, width, grouped = hidden_states.shape, _group(self, hidden_states), hasattr(self, "group_size")
        x, gate = (t.reshape(1, -1, shape[-1] // width, width) for t in (hidden_states, gate))
        weight = self.weight.view(-1, width)
        y = gated_rms_norm(
            x,
            gate,
            weight[0] if len(weight) == 1 and x.shape[2] == 1 else weight,
            self.variance_epsilon,
            getattr(self, "activation", "silu"),
            grouped or not getattr(self, "norm_before_gate", True),
        )
        y = y.view(shape)
        return y.to(torch.promote_types(y.dtype, weight.dtype)) if grouped else y  # the original norms differ in this

    return forward_norm


def _why_not(norm: Any, x: Tensor) -> str | None:
    if (reason := unsupported_reason(x)) is not None:
        return reason
    if x.dtype == torch.float64:
        return f"no gated norm for {x.dtype}"
    if getattr(norm, "activation", "silu") not in ("silu", "sigmoid"):
        return f"no gated norm with {norm.activation}"
    return None


def _group(norm: Any, x: Tensor) -> int:
    """The number of channels that share a norm."""
    groups: int = getattr(norm, "n_groups", 1)
    return int(getattr(norm, "group_size", x.shape[-1] // groups))
