"""The scan of many tokens that Mamba-2 models of transformers call, over sleepkern's simple GLA.

    S_t = exp(dt_t A) S_{t-1} + dt_t B_t x_t^T      y_t = S_t^T C_t + D x_t

(Mamba-2, arXiv 2405.21060): key B, query C, value x, log decay dt A, write strength dt. The models keep S^T. Their step
of one token, which updates S^T in place, stays their own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

import sleepkern

from ..falling_back import left_to_original, why_not_here

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class _Scan(NamedTuple):
    """One call: x [B,T,H,P], dt [B,T,H], A [H], B and C [B,T,G,N], state [B,H,P,N]."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    dt_bias: Tensor | None
    state: Tensor | None
    softplus: bool
    limit: tuple[float, float]
    returns_state: bool
    seq_idx: Tensor | None
    z: Tensor | None


def _scan_call(
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int = 256,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    seq_idx: Tensor | None = None,
    z: Tensor | None = None,
    **unused: Any,
) -> _Scan:
    options = (dt_softplus, dt_limit, return_final_states, seq_idx, z)
    return _Scan(hidden_states, dt, A, B, C, D, dt_bias, initial_states, *options)


def scan(original: Callable[..., Any]) -> Callable[..., Any]:
    """Stands for mamba2_chunk_scan."""

    @functools.wraps(original)
    def chunk_scan(*args: Any, **kwargs: Any) -> Any:
        call = _scan_call(*args, **kwargs)
        if left_to_original(_why_not(call)):
            return original(*args, **kwargs)
        return _ingest(call)

    return chunk_scan


def _ingest(call: _Scan) -> Tensor | tuple[Tensor, Tensor]:
    dt = call.dt if call.dt_bias is None else call.dt + call.dt_bias.to(call.dt.dtype)
    dt = F.softplus(dt) if call.softplus else dt
    dt = dt.clamp(*call.limit).float()
    state = None if call.state is None else call.state.float().transpose(-1, -2)
    o, final = sleepkern.simple_gla(
        call.C,
        call.B,
        call.x,
        call.A.float() * dt,
        dt,
        scale=1.0,
        initial_state=state,
        output_final_state=call.returns_state,
    )
    y = o.float()
    if call.D is not None:
        y = torch.addcmul(y, call.x.float(), call.D.float()[:, None])
    if not call.returns_state:
        return y
    assert final is not None
    return y, final.transpose(-1, -2)


def _why_not(call: _Scan) -> str | None:
    """None, or the sentence why a call is left to the function that was there before."""
    reason = why_not_here(call.x)
    if reason is not None:
        return reason
    if call.x.dtype not in _DTYPES or not call.x.dtype == call.B.dtype == call.C.dtype:
        return f"x, B and C have the types {call.x.dtype}, {call.B.dtype}, {call.C.dtype}"
    if call.x.numel() == 0:
        return "no tokens"
    if call.seq_idx is not None:
        return "packed sequences by seq_idx"
    if call.z is not None:
        return "a gate z inside the scan"
    return None
