"""The head-major float form of a call that the backends made of torch's operators compute on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import transforms
from ..problems.recurrence import Problem, RecurrenceResult, Tensors

NORM_EPS = 1e-6
"""Added to |x|^2 in the q/k normalisation x / sqrt(|x|^2 + eps), as transformers and flash-linear-attention do."""


class Heads(NamedTuple):
    """One or more sequences of equal length, head-major, in the type of the state, q and k per value head.

    q, k [n,HV,T,K]   v [n,HV,T,V]   g None, [n,HV,T] or [n,HV,T,K]   beta [n,HV,T] or None   state [n,HV,K,V]
    """

    q: Tensor | None
    k: Tensor
    v: Tensor
    g: Tensor | None
    beta: Tensor | None
    state: Tensor


def by_sequence(problem: Problem, x: Tensors, ingest: Callable[[Heads], RecurrenceResult]) -> RecurrenceResult:
    """Run `ingest` on head-major tensors: once for a batch, once per sequence when packed."""
    if not problem.packed:
        return _token_major(problem, [ingest(_heads(problem, x, slice(None), slice(None)))], [x.k.shape[1]])
    assert x.cu_seqlens is not None
    offsets = transforms.offsets_of(x.cu_seqlens)
    spans = list(zip(offsets, offsets[1:], strict=False))
    parts = [ingest(_heads(problem, x, slice(a, b), slice(i, i + 1))) for i, (a, b) in enumerate(spans)]
    return _token_major(problem, parts, [b - a for a, b in spans])


def step_by(problem: Problem, x: Tensors, forward: Callable[[Problem, Tensors], RecurrenceResult]) -> Tensor:
    """Readouts [B,T,HV,V] of a `forward`, whose final state goes to where the initial one lies."""
    out = forward(problem, x)
    assert out.o is not None and x.state is not None
    x.state.copy_(out.state)
    return out.o


def step_in_pool(problem: Problem, x: Tensors, places: Tensor, step: Callable[[Problem, Tensors], Tensor]) -> Tensor:
    """Outputs of a `step` on copies of the pool rows places [B] of x.state, written back; negative ones are skipped."""
    assert x.state is not None
    present = places >= 0
    state = read_rows(x.state, places)
    o = step(problem, x._replace(state=state))
    write_rows(x.state, state, places)
    return torch.where(present[:, None, None, None], o, 0)


def read_rows(pool: Tensor, indices: Tensor) -> Tensor:
    """Copies of the rows of a pool; what a negative index gets means nothing, and is 0 where the pool has no row."""
    if not pool.shape[0]:
        return pool.new_zeros((indices.shape[0], *pool.shape[1:]))
    return pool.index_select(0, indices.clamp_min(0))


def write_rows(pool: Tensor, values: Tensor, indices: Tensor) -> None:
    """Write values [n,...] to the rows indices [n] of a pool; a negative index writes nothing. No device is waited for.

    On a GPU a row that writes nothing does what the first other one does, a second time; where all write nothing, row 0
    is written with itself.
    """
    if not pool.shape[0] or not values.shape[0]:
        return
    present, values = indices >= 0, values.to(pool.dtype)
    if pool.device.type == "cpu":
        pool.index_copy_(0, indices[present].long(), values[present])
        return
    first = present.int().argmax().view(1)
    source = torch.where(present, torch.arange(len(indices), dtype=torch.int64, device=pool.device), first)
    rows = indices.index_select(0, source).clamp_min(0).long()
    anything = present.any().view(1, *(1 for _ in pool.shape[1:]))
    pool.index_copy_(0, rows, torch.where(anything, values.index_select(0, source), pool.index_select(0, rows)))


def states_by_steps(
    problem: Problem,
    x: Tensors,
    indices: Tensor | None,
    states_out: Tensor,
    out_indices: Tensor | None,
    step: Callable[[Problem, Tensors], Tensor],
) -> Tensor:
    """Outputs of `step`, called for one token after the other, on copies of the states; those after each are stored."""
    assert x.state is not None
    present = None if indices is None else indices >= 0
    start = x.state if indices is None else read_rows(x.state, indices)
    state = start.to(problem.state_dtype, copy=True)
    one, outputs = problem._replace(T=1, state_bf16=False), []
    for t in range(problem.T):
        token = [None if y is None else y[:, t : t + 1] for y in x[:5]]
        outputs.append(step(one, Tensors._make([*token, state, None])))
        store_states(state, states_out, out_indices, present, t)
    o = torch.cat(outputs, 1)
    return o if present is None else torch.where(present[:, None, None, None], o, 0)


def store_states(state: Tensor, states_out: Tensor, out_indices: Tensor | None, present: Tensor | None, t: int) -> None:
    """Store the states [B,...] after token t where states_out [B,T,...], or rows of a pool, take them.

    Sequences that are not `present` store nothing.
    """
    if out_indices is not None:
        rows = out_indices[:, t]
        write_rows(states_out, state, rows if present is None else torch.where(present, rows, -1))
    elif present is None:
        states_out[:, t] = state
    else:
        shape = (-1, *(1 for _ in state.shape[1:]))
        states_out[:, t] = torch.where(present.view(shape), state.to(states_out.dtype), states_out[:, t])


def gradients(
    problem: Problem,
    x: Tensors,
    do: Tensor | None,
    dstate: Tensor | None,
    dstates: Tensor | None,
    forward: Callable[[Problem, Tensors], RecurrenceResult],
) -> list[Tensor | None]:
    """Gradients of q, k, v, g, beta, state by autograd through a torch `forward`, run again here."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in x[:6]]
    with torch.enable_grad():
        out = forward(problem, Tensors._make([*leaves, x.cu_seqlens]))
        upstream = ((out.o, do), (out.state, dstate), (out.states, dstates))
        pairs = [(y, dy) for y, dy in upstream if y is not None and dy is not None]
        pairs = [(y, dy) for y, dy in pairs if y.requires_grad]  # without tokens a state is nobody's result
        wanted = [t for t in leaves if t is not None]
        outputs, above = [y for y, _ in pairs], [dy for _, dy in pairs]
        grads = iter(torch.autograd.grad(outputs, wanted, above, allow_unused=True) if pairs else [None] * len(wanted))
    filled = [None if t is None else next(grads) for t in leaves]
    return [torch.zeros_like(t) if t is not None and d is None else d for t, d in zip(leaves, filled, strict=True)]


def differentiable(
    by_torch: Callable[..., Sequence[Tensor | None]],
    tensors: Sequence[Tensor | None],
    upstream: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Gradients of tensors for create_graph=True: by torch's own operators, so that they have some."""
    # Views, because one tensor may come as two inputs, each with a gradient of its own.
    inputs = [None if t is None else t.view_as(t) for t in tensors]
    results = zip(by_torch(*inputs), upstream, strict=True)
    pairs = [(y, dy) for y, dy in results if y is not None and dy is not None and y.requires_grad]
    if not pairs:
        return [None] * len(inputs)
    wanted = [t for t in inputs if t is not None and t.requires_grad]
    outputs, above = [y for y, _ in pairs], [dy for _, dy in pairs]
    found = iter(torch.autograd.grad(outputs, wanted, above, create_graph=True, allow_unused=True))
    return [next(found) if t is not None and t.requires_grad else None for t in inputs]


def _heads(problem: Problem, x: Tensors, rows: slice, sequence: slice) -> Heads:
    dtype, groups = problem.state_dtype, problem.HV // problem.H

    def head_major(t: Tensor) -> Tensor:
        return t[:, rows].transpose(1, 2).to(dtype)

    def keys(t: Tensor) -> Tensor:
        t = head_major(t)
        if problem.normalize:
            t = _of_length_one(t)
        return t.repeat_interleave(groups, dim=1)

    if x.state is None:
        n = 1 if problem.packed else problem.B
        state = x.k.new_zeros((n, problem.HV, problem.K, problem.V), dtype=dtype)
    else:
        state = x.state[sequence].to(dtype)
    return Heads(
        q=None if x.q is None else keys(x.q),
        k=keys(x.k),
        v=head_major(x.v),
        g=None if x.g is None else head_major(x.g),
        beta=None if x.beta is None else head_major(x.beta),
        state=state,
    )


def _of_length_one(t: Tensor) -> Tensor:
    """t / |t|; numbers whose squares would leave the type are made small first, by a power of two, which is exact."""
    huge, small = (1e150, 2.0**-600) if t.dtype == torch.float64 else (1e15, 2.0**-70)
    largest = t.detach().abs().amax(-1, keepdim=True)
    shrink = torch.where(largest > huge, small, torch.ones_like(largest))
    t = t * shrink
    return t * torch.rsqrt(t.square().sum(-1, keepdim=True) + NORM_EPS * shrink.square())


def _token_major(problem: Problem, parts: list[RecurrenceResult], lengths: list[int]) -> RecurrenceResult:
    def join(tensors: list[Tensor | None], dim: int) -> Tensor | None:
        present = [t for t in tensors if t is not None]
        if not present:
            return None
        return present[0] if len(present) == 1 else torch.cat(present, dim)

    o = join([p.o for p, n in zip(parts, lengths, strict=True) if n] or [parts[0].o], 2)
    state = join([p.state for p in parts], 0)
    assert state is not None
    return RecurrenceResult(
        o=None if o is None else o.transpose(1, 2).to(problem.dtype).contiguous(),
        state=state,
        residual=join([p.residual for p in parts], 0),
        passes=join([p.passes for p in parts], 0),
        states=join([p.states for p in parts], 1),
    )
