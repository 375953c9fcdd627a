"""flash-linear-attention's functions, by its names and keyword arguments, over sleepkern's.

    from sleepkern.integrations.fla import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule

    import sleepkern.integrations.fla as kernels
    kernels.register()            # or let fla itself call them, where it lets others in

Importing this needs neither fla nor Triton, so code written for fla runs on a CPU. `chunk_`, `fused_chunk_`,
`parallel_` and `fused_recurrent_` are the same here: sleepkern chooses by shape. Arguments are those of fla 0.6.0; what
tunes its kernels (`calls.HARMLESS`: chunk_size, chunk_indices, cu_seqlens_cpu, safe_gate, ...) is taken and not needed.
What would change the result and is not done here raises a ValueError that names it: gv, reverse, cp_context,
output_attentions, beta for each value channel. Unknown keywords raise a TypeError. Log
decays above 0, which fla computes with, are refused as everywhere in sleepkern.

`register` reaches the functions that fla dispatches: chunk_gated_delta_rule, chunk_kda, fused_recurrent_simple_gla. One
registration serves fla's layers and all models built on them. `sleepkern.patch(model)` reaches all functions of fla
that the files of a model's layers import: of fla's own layers, and of remote code such as Jet-Nemotron's. Both hand
calls that sleepkern cannot compute back to fla; on a CPU, which fla's kernels do not run on, such a call raises as
above.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..fallback import unsupported_reason, use_original
from .calls import Result, why_not
from .delta import (
    chunk_delta_rule,
    chunk_gated_delta_rule,
    chunk_gdn,
    chunk_kda,
    fused_chunk_delta_rule,
    fused_recurrent_delta_rule,
    fused_recurrent_gated_delta_rule,
    fused_recurrent_gdn,
    fused_recurrent_kda,
    parallel_delta_rule,
)
from .gates import fused_gdn_gate, fused_kda_gate
from .linear import (
    chunk_gla,
    chunk_lightning_attn,
    chunk_linear_attn,
    chunk_retention,
    chunk_simple_gla,
    fused_chunk_gla,
    fused_chunk_linear_attn,
    fused_chunk_retention,
    fused_chunk_simple_gla,
    fused_recurrent_gla,
    fused_recurrent_lightning_attn,
    fused_recurrent_linear_attn,
    fused_recurrent_retention,
    fused_recurrent_simple_gla,
    parallel_retention,
    parallel_simple_gla,
)

__all__ = [
    "FUNCTIONS",
    "Result",
    "register",
    "replacement_of",
    "chunk_delta_rule",
    "chunk_gated_delta_rule",
    "chunk_gdn",
    "chunk_gla",
    "chunk_kda",
    "chunk_lightning_attn",
    "chunk_linear_attn",
    "chunk_retention",
    "chunk_simple_gla",
    "fused_chunk_delta_rule",
    "fused_chunk_gla",
    "fused_chunk_linear_attn",
    "fused_chunk_retention",
    "fused_chunk_simple_gla",
    "fused_gdn_gate",
    "fused_kda_gate",
    "fused_recurrent_delta_rule",
    "fused_recurrent_gated_delta_rule",
    "fused_recurrent_gdn",
    "fused_recurrent_gla",
    "fused_recurrent_kda",
    "fused_recurrent_lightning_attn",
    "fused_recurrent_linear_attn",
    "fused_recurrent_retention",
    "fused_recurrent_simple_gla",
    "parallel_delta_rule",
    "parallel_retention",
    "parallel_simple_gla",
]

FUNCTIONS: dict[str, Callable[..., Any]] = {
    name: globals()[name] for name in __all__ if name not in ("FUNCTIONS", "Result", "register", "replacement_of")
}
"""sleepkern's functions by fla's names."""


def register() -> None:
    """Register sleepkern's functions with fla's dispatcher.

    fla computes the calls that sleepkern cannot compute (a device without kernels, unsupported arguments).

    Raises:
        ImportError: fla 0.6 or newer is not installed.
    """
    from fla import backends
    from fla.ops.kda import chunk_kda as fla_chunk_kda
    from fla.ops.simple_gla import fused_recurrent_simple_gla as fla_fused_recurrent_simple_gla

    def backend(name: str, function: Callable[..., Result]) -> type:
        members = {
            "backend_type": "sleepkern",
            "priority": -1,
            name: staticmethod(function),
            f"{name}_verifier": staticmethod(functools.partial(_verifier, function)),
        }
        return type("SleepkernBackend", (backends.BaseBackend,), members)

    backends.register("gated_delta_rule")(backend("chunk_gated_delta_rule", chunk_gated_delta_rule))
    pairs = ((fla_chunk_kda, chunk_kda), (fla_fused_recurrent_simple_gla, fused_recurrent_simple_gla))
    for original, function in pairs:
        backends.register(original)(backend(function.__name__, function))


def replacement_of(original: Callable[..., Any]) -> Callable[..., Any] | None:
    """The replacement of a function of fla.ops, which calls the original where sleepkern cannot; None for others."""
    replacement = FUNCTIONS.get(getattr(original, "__name__", ""))
    if replacement is None or not getattr(original, "__module__", "").startswith("fla.ops"):
        return None

    @functools.wraps(original)
    def function(*args: Any, **kwargs: Any) -> Any:
        if use_original(_reason_for_fla(replacement, *args, **kwargs)):
            return original(*args, **kwargs)
        return replacement(*args, **kwargs)

    return function


def _reason_for_fla(replacement: Callable[..., Any], *args: Any, **kwargs: Any) -> str | None:
    """Why a call goes to fla. On the CPU arguments are no reason: fla cannot run there, so the replacement raises."""
    first = args[0] if args else kwargs.get("q", kwargs.get("g"))
    if isinstance(first, Tensor) and first.device.type == "cpu":
        return unsupported_reason(first)
    return why_not(replacement, *args, **kwargs)


def _verifier(function: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[bool, str | None]:
    """Tells whether sleepkern can compute a call, and why not, in the form that fla's dispatcher expects."""
    reason = why_not(function, *args, **kwargs)
    return reason is None, reason


def __getattr__(name: str) -> Any:
    """`stands_for`, the former name of `replacement_of`."""
    if name != "stands_for":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(f"{__name__}.stands_for is {__name__}.replacement_of", DeprecationWarning, stacklevel=2)
    return replacement_of
