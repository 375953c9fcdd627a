"""The shared part of all functions under fla's names: known keywords, and the call of sleepkern's own function."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sleepkern.ops import recurrence as ops
from sleepkern.rules import Rule

from ..fallback import unsupported_reason

Result = tuple[Tensor, Tensor | None]

CHANGING = ("gv", "reverse", "cp_context", "head_first", "output_attentions")
"""Keywords that change the result, and that sleepkern does not support."""

HARMLESS = frozenset({
    "chunk_size", "chunk_indices", "cu_seqlens_cpu", "safe_gate", "disable_recompute", "use_graph", "max_num_seqs",
    "autotune_interval",
})  # fmt: skip
"""Keywords that tune fla's kernels and change no result; autotune_interval is of Jet-Nemotron's copy."""

V_FIRST = "transpose_state_layout"
"""fla's old name of state_v_first."""


def why_not(function: Callable[..., Any], *args: Any, **kwargs: Any) -> str | None:
    """None, or a sentence why fla has to compute a call of one of sleepkern's functions."""
    try:
        given = _signature(function).bind(*args, **kwargs).arguments
    except TypeError as error:
        return str(error)
    options = given.pop("options", {})
    first = given["q"] if "q" in given else given["g"]
    reason = unsupported_reason(first)
    for name, value in (*given.items(), *options.items()):
        if name in CHANGING and _is_given(value):
            reason = reason or f"{name} is not done here"
        elif name in options and name not in (*CHANGING, *HARMLESS, V_FIRST):
            reason = reason or f"{name} is not known here"
    beta = given.get("beta")
    if isinstance(beta, Tensor) and beta.dim() == 4:
        reason = reason or "beta has an element for each value channel"
    return reason


@cache
def _signature(function: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(function)


def _is_given(value: Any) -> bool:
    return value is not None and value is not False


def check_options(options: dict[str, Any], chunk_sizes: Sequence[int] = ()) -> None:
    """Refuse keywords that would change the result, and unknown ones.

    Raises:
        ValueError: an unsupported keyword, or a chunk_size that fla refuses.
        TypeError: an unknown keyword.
    """
    for name, value in options.items():
        if name in CHANGING:
            if _is_given(value):
                got = f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
                raise ValueError(f"{name}: got {got}; sleepkern does not do it, expected None or False")
        elif name not in HARMLESS and name != V_FIRST:
            raise TypeError(f"{name}: got an unknown keyword argument; expected one of flash-linear-attention 0.6")
    size = options.get("chunk_size")
    if chunk_sizes and size is not None and size not in chunk_sizes:
        raise ValueError(f"chunk_size: got {size!r}; expected one of {', '.join(map(str, chunk_sizes))}")


def run(
    rule: Rule,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    scale: float | None,
    initial_state: Tensor | None,
    output_final_state: bool,
    normalize: bool,
    state_v_first: bool,
    cu_seqlens: Tensor | Sequence[int] | None,
    options: dict[str, Any],
    raw: dict[str, Any] | None = None,
    states_of_chunks: bool = False,
) -> Any:
    """A call of `rule` with the inputs that fla allows; with states_of_chunks also the states before each chunk.

    These are q, k, v of different types, a state without a batch, and offsets as a list or ending before T; outputs
    after the last offset are 0. raw: the options of sleepkern's function that say which gates are raw.
    """
    check_options(options)
    v_first = _values_first(state_v_first, options)
    if isinstance(beta, Tensor) and beta.dim() == 4:
        raise ValueError(f"beta: got shape {list(beta.shape)}; expected one number a head, [B, T, HV]")
    offsets, end = _offsets(cu_seqlens, v)
    tokens, out_type = v.shape[1], None
    if not q.dtype == k.dtype == v.dtype:
        out_type = v.dtype
        q, k, v = _same_type(q, k, v)
    if end is not None:
        q, k, v = (t[:, :end] for t in (q, k, v))
        g, beta = (None if t is None else t[:, :end] for t in (g, beta))
    state = _state(initial_state, v.dtype, v_first)
    gates = dict(raw or {}) if g is None else {"g": g, **(raw or {})}
    if rule.delta or beta is not None:
        gates["beta"] = torch.ones_like(v[..., 0]) if beta is None else beta
    every = _chunk_of(options) if states_of_chunks else None
    o, final, *along = getattr(ops, rule.name)(
        q, k, v, **gates, scale=scale, initial_state=state, output_final_state=output_final_state,
        use_qk_l2norm_in_kernel=normalize, cu_seqlens=offsets, state_every=every,
    )  # fmt: skip
    if end is not None:
        o = F.pad(o, (0, 0, 0, 0, 0, tokens - end))
    o, final = o if out_type is None else o.to(out_type), _as_stored(final, v_first)
    if every is None:
        return o, final
    return o, final, _as_stored(_states_before(along[0], state, offsets, every).to(k.dtype), v_first)


def _as_stored(state: Tensor | None, v_first: bool) -> Tensor | None:
    return state.transpose(-1, -2).contiguous() if state is not None and v_first else state


def _chunk_of(options: dict[str, Any]) -> int:
    size = options.get("chunk_size")
    return 64 if size is None else int(size)


def _states_before(after: Tensor, initial: Tensor | None, offsets: Tensor | None, every: int) -> Tensor:
    """The states before each chunk, as fla stores them, of those after each and the initial ones."""
    before = after.roll(1, 1)
    if offsets is None:
        first = torch.zeros(after.shape[1], dtype=torch.bool, device=after.device)
        first[:1] = True
        before[:, first] = 0 if initial is None else initial[:, None]
        return before
    starts = ops.state_offsets(offsets, every)
    present = starts.diff() > 0
    before[0, starts[:-1][present]] = 0 if initial is None else initial[present.to(initial.device)]
    return before


def _values_first(state_v_first: bool, options: dict[str, Any]) -> bool:
    if V_FIRST not in options:
        return state_v_first
    if state_v_first:
        raise ValueError(f"{V_FIRST}: got it beside state_v_first, which replaces it; expected one of the two")
    warnings.warn(f"{V_FIRST} is deprecated: use state_v_first", DeprecationWarning, stacklevel=4)
    return bool(options[V_FIRST])


def _offsets(cu_seqlens: Tensor | Sequence[int] | None, v: Tensor) -> tuple[Tensor | None, int | None]:
    """Offsets as a tensor, and the end of the last sequence if that is before T.

    The end is read on the CPU alone, where that costs nothing.
    """
    if cu_seqlens is None:
        return None, None
    if not isinstance(cu_seqlens, Tensor):
        cu_seqlens = torch.tensor(list(cu_seqlens), dtype=torch.int64, device=v.device)
    if torch.compiler.is_compiling() or cu_seqlens.device.type != "cpu" or not cu_seqlens.numel():
        return cu_seqlens, None
    end = int(cu_seqlens[-1])
    return cu_seqlens, end if 0 <= end < v.shape[1] else None


def _same_type(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the type that holds all of their types."""
    dtype = tensors[0].dtype
    for t in tensors[1:]:
        dtype = torch.promote_types(dtype, t.dtype)
    return tuple(t.to(dtype) for t in tensors)


def _state(state: Tensor | None, dtype: torch.dtype, v_first: bool) -> Tensor | None:
    if state is None:
        return None
    state = state.double() if dtype == torch.float64 else state.float()
    state = state.unsqueeze(0) if state.dim() == 3 else state
    return state.transpose(-1, -2) if v_first else state
