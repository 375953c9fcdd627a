"""flash-linear-attention's functions, by its names and keyword arguments, over sleepkern's.

    from sleepkern.integrations.fla import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule

    import sleepkern.integrations.fla as kernels
    kernels.register()            # or let fla itself call them, where it lets others in

Importing this needs neither fla nor Triton, so code written for fla runs on a CPU. `chunk_`, `fused_chunk_`,
`parallel_` and `fused_recurrent_` are the same here: sleepkern chooses by shape. Arguments are those of fla 0.6.0; what
tunes its kernels (`calls.HARMLESS`: chunk_size, chunk_indices, cu_seqlens_cpu, safe_gate, ...) is taken and not needed.
What would change the result and is not done here raises a ValueError that names it: gv, reverse, cp_context,
return_intermediate_states, output_attentions, beta for each value channel. Unknown keywords raise a TypeError. Log
decays above 0, which fla computes with, are refused as everywhere in sleepkern.

`register` reaches the functions that fla dispatches: chunk_gated_delta_rule, chunk_kda, fused_recurrent_simple_gla. One
registration serves fla's layers and all models built on them. `sleepkern.patch(model)` reaches all functions of fla
that the files of a model's layers import: of fla's own layers, and of remote code such as Jet-Nemotron's. Both hand
calls that are not done here back to fla; on a CPU, which fla's kernels do not run on, such a call raises as above.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..fallback import left_to_original, why_not_here
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

FUNCTIONS: dict[str, Callable[..., Any]] = {
    "chunk_delta_rule": chunk_delta_rule,
    "chunk_gated_delta_rule": chunk_gated_delta_rule,
    "chunk_gdn": chunk_gdn,
    "chunk_gla": chunk_gla,
    "chunk_kda": chunk_kda,
    "chunk_lightning_attn": chunk_lightning_attn,
    "chunk_linear_attn": chunk_linear_attn,
    "chunk_retention": chunk_retention,
    "chunk_simple_gla": chunk_simple_gla,
    "fused_chunk_delta_rule": fused_chunk_delta_rule,
    "fused_chunk_gla": fused_chunk_gla,
    "fused_chunk_linear_attn": fused_chunk_linear_attn,
    "fused_chunk_retention": fused_chunk_retention,
    "fused_chunk_simple_gla": fused_chunk_simple_gla,
    "fused_gdn_gate": fused_gdn_gate,
    "fused_kda_gate": fused_kda_gate,
    "fused_recurrent_delta_rule": fused_recurrent_delta_rule,
    "fused_recurrent_gated_delta_rule": fused_recurrent_gated_delta_rule,
    "fused_recurrent_gdn": fused_recurrent_gdn,
    "fused_recurrent_gla": fused_recurrent_gla,
    "fused_recurrent_kda": fused_recurrent_kda,
    "fused_recurrent_lightning_attn": fused_recurrent_lightning_attn,
    "fused_recurrent_linear_attn": fused_recurrent_linear_attn,
    "fused_recurrent_retention": fused_recurrent_retention,
    "fused_recurrent_simple_gla": fused_recurrent_simple_gla,
    "parallel_delta_rule": parallel_delta_rule,
    "parallel_retention": parallel_retention,
    "parallel_simple_gla": parallel_simple_gla,
}
"""Ours by fla's names."""

__all__ = ["FUNCTIONS", "Result", "register", "stands_for", *sorted(FUNCTIONS)]  # noqa: PLE0604


def register() -> None:
    """Let fla call these where it can.

    Calls that are not ours (a device without kernels, arguments not done here) stay fla's.

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
            f"{name}_verifier": staticmethod(functools.partial(_takes, function)),
        }
        return type("SleepkernBackend", (backends.BaseBackend,), members)

    backends.register("gated_delta_rule")(backend("chunk_gated_delta_rule", chunk_gated_delta_rule))
    for theirs, ours in ((fla_chunk_kda, chunk_kda), (fla_fused_recurrent_simple_gla, fused_recurrent_simple_gla)):
        backends.register(theirs)(backend(ours.__name__, ours))


def stands_for(original: Callable[..., Any]) -> Callable[..., Any] | None:
    """Ours for a function of fla.ops, which keeps the calls that are not ours; None where there is none."""
    ours = FUNCTIONS.get(getattr(original, "__name__", ""))
    if ours is None or not getattr(original, "__module__", "").startswith("fla.ops"):
        return None

    @functools.wraps(original)
    def function(*args: Any, **kwargs: Any) -> Any:
        if left_to_original(_left(ours, *args, **kwargs)):
            return original(*args, **kwargs)
        return ours(*args, **kwargs)

    return function


def _left(ours: Callable[..., Any], *args: Any, **kwargs: Any) -> str | None:
    """Why a call goes to fla; on the CPU arguments are no reason, for there ours says what is wrong with them."""
    first = args[0] if args else kwargs.get("q", kwargs.get("g"))
    if isinstance(first, Tensor) and first.device.type == "cpu":
        return why_not_here(first)
    return why_not(ours, *args, **kwargs)


def _takes(function: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[bool, str | None]:
    """Whether a call is ours, as fla asks."""
    reason = why_not(function, *args, **kwargs)
    return reason is None, reason
