"""What Mamba-2 models of transformers call: the scan of many tokens over sleepkern's simple GLA, and the step of one.

    S_t = exp(dt_t A) S_{t-1} + dt_t B_t x_t^T      y_t = S_t^T C_t + D x_t

(Mamba-2, arXiv 2405.21060): key B, query C, value x, log decay dt A, beta dt. The models keep S^T.

Before transformers 5.16 (4.57 to 5.10 were looked at) the torch path computes this inline in the mixer's forward: on a
CPU nothing can be replaced and the models stay stock. On a GPU with mamba_ssm they call its mamba_chunk_scan_combined
through their file, which is replaced; the step of one token is not.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from sleepkern.ops import recurrence as ops
from sleepkern.rules import SIMPLE_GLA

from ..call_mapping import replacement
from ..fallback import unsupported_reason
from . import recording
from .packing import NAMES, SegmentTree, offsets_of, one_row, packed_by

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class _Scan(NamedTuple):
    """A call for many tokens: x [B,T,H,P], dt [B,T,H], A [H], B and C [B,T,G,N], D [H], states [B,H,P,N].

    The fields are the arguments of the original, in its order; z of mamba_ssm; and the names of packed sequences.
    """

    hidden_states: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    chunk_size: int
    D: Tensor | None = None
    dt_bias: Tensor | None = None
    initial_states: Tensor | None = None
    dt_softplus: bool = False
    dt_limit: tuple[float, float] = (0.0, float("inf"))
    return_final_states: bool = False
    z: Tensor | None = None
    cu_seqlens: Tensor | None = None
    cu_seq_lens_q: Tensor | None = None
    seq_idx: Tensor | None = None


class _OlderScan(NamedTuple):
    """The same call in the order of mamba_ssm's mamba_chunk_scan_combined."""

    hidden_states: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    chunk_size: int
    D: Tensor | None = None
    z: Tensor | None = None
    dt_bias: Tensor | None = None
    initial_states: Tensor | None = None
    seq_idx: Tensor | None = None
    cu_seqlens: Tensor | None = None
    dt_softplus: bool = False
    dt_limit: tuple[float, float] = (0.0, float("inf"))
    return_final_states: bool = False
    cu_seq_lens_q: Tensor | None = None


def scan(original: Callable[..., Any]) -> Callable[..., Any]:
    """The replacement of mamba2_chunk_scan."""
    return replacement(original, _Scan, _why_not, _run_scan, packed_by("seq_idx", _size))


def fused_scan(original: Callable[..., Any]) -> Callable[..., Any]:
    """The replacement of mamba_ssm's mamba_chunk_scan_combined for older files: y has the type of x."""

    def run(call: _OlderScan) -> Any:
        out, dtype = _run_scan(call), call.hidden_states.dtype
        return (out[0].to(dtype), out[1]) if isinstance(out, tuple) else out.to(dtype)

    return replacement(original, _OlderScan, _why_not, run)


def fused_mixer(original: Callable[..., Any]) -> Callable[..., Any]:
    """The replacement of mamba2_split_conv1d_scan_combined, a training mixer in one call.

    For packed sequences it returns None. Then the mixer goes on step by step, and its convolution and scan, which are
    replaced too, keep the sequences apart.
    """

    @functools.wraps(original)
    def split_conv1d_scan(*args: Any, **kwargs: Any) -> Any:
        if any(kwargs.get(name) is not None for name in NAMES):
            return None
        return original(*args, **kwargs)

    return split_conv1d_scan


def one_step(original: Callable[..., Any]) -> Callable[..., Any]:
    """The replacement of mamba2_selective_state_update on the CPU; it updates the state [B,H,P,N] in place.

    Where the rows of S are contiguous, as `scan` leaves them in a cache, recurrent_step runs: 8 to 31 times as fast as
    the original, which copies the state (one token, six models' shapes, one thread). Where the rows of S^T are,
    torch's own operators run in place, 2.5 to 24 times as fast. There recurrent_step with x for key and B for value
    takes longer, and with a copy of the state longer still.
    """
    run = replacement(original, _Step, _why_no_step, _step)
    names = frozenset(_Step._fields)

    @functools.wraps(original)
    def step(*args: Any, **kwargs: Any) -> Any:
        out = run(*args, **kwargs)
        if recording.current() is not None:  # whichever function computed it
            call = _Step(*args, **{name: kwargs[name] for name in kwargs if name in names})
            recording.record_step(functools.partial(_step_inputs, call), call.state)
        return out

    return step


class _Step(NamedTuple):
    """A call for one token: state [B,H,P,N], x, dt and z [B,H,P], A [H,P,N], B and C [B,G,N], D and dt_bias [H,P]."""

    state: Tensor
    hidden_states: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None = None
    dt_bias: Tensor | None = None
    dt_softplus: bool = False
    z: Tensor | None = None


def _step_gates(call: _Step) -> tuple[Tensor, Tensor]:
    """The log decay and dt, both [B,H]: dt and A are the same for a whole head."""
    dt = call.dt[..., 0].float()
    dt = dt if call.dt_bias is None else dt + call.dt_bias[:, 0].float()
    dt = F.softplus(dt) if call.dt_softplus else dt
    return dt * call.A[:, 0, 0].float(), dt


def _step_inputs(call: _Step) -> recording.Inputs:
    g, dt = _step_gates(call)
    k, v, g, beta = (t[:, None] for t in (call.B, call.hidden_states, g, dt))
    return recording.Inputs(SIMPLE_GLA, k, v, g, beta, transposed=True)


def _step(call: _Step) -> Tensor:
    (g, dt), x = _step_gates(call), call.hidden_states.float()
    if call.state.transpose(-1, -2).is_contiguous():
        q, k, v, g, beta = (t[:, None] for t in (call.C, call.B, call.hidden_states, g, dt))
        S = call.state.transpose(-1, -2)
        o, _ = ops.recurrent_step(q, k, v, g, beta, S, rule=SIMPLE_GLA, scale=1.0)
        y = o[:, 0].float()
    else:
        y = _step_transposed(call, x, g, dt)
    y = y if call.D is None else torch.addcmul(y, x, call.D.float())
    y = y if call.z is None else y * F.silu(call.z.float())
    return y.to(call.hidden_states.dtype)


def _step_transposed(call: _Step, x: Tensor, g: Tensor, dt: Tensor) -> Tensor:
    """One step on a state whose rows of S^T are contiguous."""
    rows, H, P, N = call.state.shape
    G = call.B.shape[1]
    keys = call.B.float().repeat_interleave(H // G, dim=1)[:, :, None]
    call.state.mul_(g.exp()[..., None, None]).addcmul_((x * dt[..., None])[..., None], keys)
    return (call.state.view(rows * G, H // G * P, N) @ call.C.float().reshape(rows * G, N, 1)).view(rows, H, P)


def _why_no_step(call: _Step) -> str | None:
    """None, or a sentence why a step goes to the original."""
    reason = unsupported_reason(call.hidden_states)
    if reason is not None:
        return reason
    if call.hidden_states.device.type != "cpu":
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


def _run_scan(call: _Scan | _OlderScan) -> Tensor | tuple[Tensor, Tensor]:
    dt = call.dt if call.dt_bias is None else call.dt + call.dt_bias.to(call.dt.dtype)
    dt = F.softplus(dt) if call.dt_softplus else dt
    dt = dt.clamp(*call.dt_limit).float()
    state = None if call.initial_states is None else call.initial_states.float().transpose(-1, -2)
    inputs, offsets = (call.C, call.B, call.hidden_states, call.A.float() * dt, dt), _offsets(call)
    if (recorder := recording.current()) is not None and call.return_final_states:
        o, held = recorder.run(inputs[0], recording.Inputs(SIMPLE_GLA, *inputs[1:], transposed=True), state, scale=1.0)
        return _skipped(call, o.float()), held
    if isinstance(offsets, SegmentTree):
        return _skipped(call, ops.simple_gla(*inputs, scale=1.0, **offsets.options)[0].float())
    q, k, v, g, beta = inputs if offsets is None else [one_row(x) for x in inputs]
    o, final = ops.simple_gla(
        q,
        k,
        v,
        g,
        beta,
        scale=1.0,
        initial_state=state,
        output_final_state=call.return_final_states,
        cu_seqlens=offsets,
    )
    y = o.float() if offsets is None else o.float().view(call.hidden_states.shape)
    y = _skipped(call, y)
    if not call.return_final_states:
        return y
    assert final is not None
    return y, final.transpose(-1, -2)


def _skipped(call: _Scan | _OlderScan, y: Tensor) -> Tensor:
    """y [B,T,H,P] with the skip connection D x."""
    return y if call.D is None else torch.addcmul(y, call.hidden_states.float(), call.D.float()[:, None])


def _why_not(call: _Scan | _OlderScan) -> str | None:
    """None, or a sentence why a call goes to the original."""
    x = call.hidden_states
    reason = unsupported_reason(x)
    if reason is not None:
        return reason
    if x.dtype not in _DTYPES or not x.dtype == call.B.dtype == call.C.dtype:
        return f"x, B and C have the types {x.dtype}, {call.B.dtype}, {call.C.dtype}"
    if x.numel() == 0:
        return "no tokens"
    if call.z is not None:
        return "a gate z inside the scan"
    if call.D is not None and call.D.dim() != 1:
        return "a skip connection D for each channel"
    if isinstance(call, _OlderScan) and call.cu_seqlens is not None:
        return "offsets, for which mamba_ssm returns the states of each sequence"
    packed = any(t is not None for t in (call.cu_seqlens, call.cu_seq_lens_q, call.seq_idx))
    if packed and (call.initial_states is not None or call.return_final_states):
        return "states of packed sequences"
    return None


def _size(x: Tensor) -> tuple[int, int]:
    return x.shape[0], x.shape[1]


def _offsets(call: _Scan | _OlderScan) -> Tensor | SegmentTree | None:
    return offsets_of(*_size(call.hidden_states), call.cu_seqlens, call.cu_seq_lens_q, call.seq_idx)
