"""What Mamba-2 models of transformers call: the scan of many tokens over sleepkern's simple GLA, and the step of one.

    S_t = exp(dt_t A) S_{t-1} + dt_t B_t x_t^T      y_t = S_t^T C_t + D x_t

(Mamba-2, arXiv 2405.21060): key B, query C, value x, log decay dt A, write strength dt. The models keep S^T.

Before transformers 5.16 (4.57 to 5.10 were looked at) the torch path computes this inline in the mixer's forward: on a
CPU nothing can be replaced and the models stay stock. On a GPU with mamba_ssm they call its mamba_chunk_scan_combined
through their file, which is replaced; its step of one token is not.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

import sleepkern
from sleepkern.rules import SIMPLE_GLA

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
    cu_seqlens: Tensor | None
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
    cu_seqlens: Tensor | None = None,
    z: Tensor | None = None,
    **unused: Any,
) -> _Scan:
    options = (dt_softplus, dt_limit, return_final_states, seq_idx, cu_seqlens, z)
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


def fused_scan(original: Callable[..., Any]) -> Callable[..., Any]:
    """Stands for mamba_ssm's mamba_chunk_scan_combined as older files call it: readouts have the type of x."""

    @functools.wraps(original)
    def mamba_chunk_scan_combined(*args: Any, **kwargs: Any) -> Any:
        call = _scan_call(*args, **kwargs)
        if left_to_original(_why_not(call)):
            return original(*args, **kwargs)
        out = _ingest(call)
        return (out[0].to(call.x.dtype), out[1]) if isinstance(out, tuple) else out.to(call.x.dtype)

    return mamba_chunk_scan_combined


def one_step(original: Callable[..., Any]) -> Callable[..., Any]:
    """Stands for mamba2_selective_state_update, whose state [B,H,P,N] is updated where it lies; on the CPU.

    By recurrent_step where S rather than S^T lies in rows, which is how `scan` leaves it in a cache: 8 to 31 times as
    fast as stock, which copies the state (one token, six models' shapes, one thread). Else by torch's own operators in
    place, 2.5 to 24 times as fast; recurrent_step with x for key and B for value, so that S^T may stay, takes longer
    than those, and with a copy of the state longer still.
    """

    @functools.wraps(original)
    def selective_state_update(*args: Any, **kwargs: Any) -> Any:
        call = _step_call(*args, **kwargs)
        if left_to_original(_why_no_step(call)):
            return original(*args, **kwargs)
        return _step(call)

    return selective_state_update


class _Step(NamedTuple):
    """One call: state [B,H,P,N], x [B,H,P], dt [B,H,P], A [H,P,N], B and C [B,G,N], D and dt_bias [H,P], z as x."""

    state: Tensor
    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    dt_bias: Tensor | None
    softplus: bool
    z: Tensor | None


def _step_call(
    state: Tensor,
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    z: Tensor | None = None,
    **unused: Any,
) -> _Step:
    return _Step(state, hidden_states, dt, A, B, C, D, dt_bias, dt_softplus, z)


def _step(call: _Step) -> Tensor:
    dt = call.dt[..., 0].float()  # [B,H]: the same for a whole head, and so is A
    dt = dt if call.dt_bias is None else dt + call.dt_bias[:, 0].float()
    dt = F.softplus(dt) if call.softplus else dt
    g, x = dt * call.A[:, 0, 0].float(), call.x.float()
    if call.state.transpose(-1, -2).is_contiguous():
        q, k, v, g, beta = (t[:, None] for t in (call.C, call.B, call.x, g, dt))
        S = call.state.transpose(-1, -2)
        o, _ = sleepkern.recurrent_step(q, k, v, g, beta, S, rule=SIMPLE_GLA, scale=1.0)
        y = o[:, 0].float()
    else:
        y = _step_transposed(call, x, g, dt)
    y = y if call.D is None else torch.addcmul(y, x, call.D.float())
    y = y if call.z is None else y * F.silu(call.z.float())
    return y.to(call.x.dtype)


def _step_transposed(call: _Step, x: Tensor, g: Tensor, dt: Tensor) -> Tensor:
    """The same on S^T in rows."""
    rows, H, P, N = call.state.shape
    G = call.B.shape[1]
    written = call.B.float().repeat_interleave(H // G, dim=1)[:, :, None]
    call.state.mul_(g.exp()[..., None, None]).addcmul_((x * dt[..., None])[..., None], written)
    return (call.state.view(rows * G, H // G * P, N) @ call.C.float().reshape(rows * G, N, 1)).view(rows, H, P)


def _why_no_step(call: _Step) -> str | None:
    """None, or the sentence why a step is left to the function that was there before."""
    reason = why_not_here(call.x)
    if reason is not None:
        return reason
    if call.x.device.type != "cpu":
        return "the step of one token is replaced on the CPU only"
    if torch.compiler.is_compiling():
        return "a compiled graph, whose compiler plans the memory"
    in_rows = call.state.is_contiguous() or call.state.transpose(-1, -2).is_contiguous()
    if call.state.dtype != torch.float32 or not in_rows:
        return f"a state of {call.state.dtype} with strides {call.state.stride()}"
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in call if isinstance(t, Tensor)):
        return "gradients through a step that writes its state"
    whole = call.dt.stride(-1) == 0 and call.A.stride()[-2:] == (0, 0)
    if not whole or (call.dt_bias is not None and call.dt_bias.stride(-1) != 0):
        return "decay that differs within a head"
    return None


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
    if call.seq_idx is not None or call.cu_seqlens is not None:
        return "packed sequences"
    if call.z is not None:
        return "a gate z inside the scan"
    return None
