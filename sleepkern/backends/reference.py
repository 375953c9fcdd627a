"""The definition: the recurrence of rules.py, token by token, in plain torch. Any device, float64 for truth."""

from __future__ import annotations

import torch
from torch import Tensor

from ..problems.recurrence import Problem, RecurrenceResult, Tensors
from ..rules import FAMILY, Rule
from .interface import REPLAY, STATES
from .replay.methods import repeat
from .torch_common import Heads, by_sequence, gradients, step_by

NAME = "reference"
SUPPORTS = FAMILY
OPTIONS = REPLAY | STATES


def why_not(problem: Problem) -> str | None:
    """None for every problem that asks for plain repetition."""
    if problem.method not in ("auto", "repeat"):
        return f"replays by plain repetition only, not by method {problem.method!r}"
    return None


def kernel(problem: Problem) -> str:
    """One line on the code that runs."""
    return "token by token in torch"


def method_of(problem: Problem) -> str:
    """Always plain repetition."""
    return "repeat"


def forward(problem: Problem, x: Tensors) -> RecurrenceResult:
    """Readouts and final state of `problem.passes` passes; differentiable by torch."""

    def ingest(h: Heads) -> RecurrenceResult:
        if problem.state_every is not None:
            return _with_states(problem, h, problem.state_every)

        def one_pass(state: Tensor, output: bool) -> tuple[Tensor | None, Tensor]:
            return token_loop(problem.rule, h, state, problem.scale, output)

        return repeat(one_pass, h.state, problem.passes, problem.tol, problem.output)

    return by_sequence(problem, x, ingest)


def backward(
    problem: Problem, x: Tensors, do: Tensor | None, dstate: Tensor | None, dstates: Tensor | None = None
) -> list[Tensor | None]:
    """Gradients of q, k, v, g, beta, state: autograd through the loop."""
    return gradients(problem, x, do, dstate, dstates, forward)


def step(problem: Problem, x: Tensors) -> Tensor:
    """Readouts [B,T,HV,V]; the state is updated in place."""
    return step_by(problem, x, forward)


def token_loop(rule: Rule, h: Heads, state: Tensor, scale: float, output: bool) -> tuple[Tensor | None, Tensor]:
    """S <- a S;  S <- S + b k (v - [delta] S^T k)^T;  o = scale S^T q, for each token."""
    outputs = []
    if h.k.shape[2] == 0:
        state = state.clone()  # the result never is the caller's tensor
    for t in range(h.k.shape[2]):
        if h.g is not None:
            a = h.g[:, :, t].exp()
            state = state * (a[..., None, None] if rule.gate == "head" else a[..., None])
        k, v = h.k[:, :, t], h.v[:, :, t]
        write = v - torch.einsum("nhk,nhkv->nhv", k, state) if rule.delta else v
        if h.beta is not None:
            write = h.beta[:, :, t, None] * write
        state = state + k[..., None] * write[..., None, :]
        if output and h.q is not None:
            outputs.append(scale * torch.einsum("nhk,nhkv->nhv", h.q[:, :, t], state))
    if not output:
        return None, state
    return (torch.stack(outputs, 2) if outputs else h.v.clone()), state


def _with_states(problem: Problem, h: Heads, every: int) -> RecurrenceResult:
    """One pass in pieces of `every` tokens, and the state after each."""
    outputs, states, state, T = [], [], h.state, h.k.shape[2]
    for start in range(0, T, every):
        q, k, v, g, beta = (None if t is None else t[:, :, start : start + every] for t in h[:5])
        assert k is not None and v is not None
        o, state = token_loop(problem.rule, Heads(q, k, v, g, beta, state), state, problem.scale, problem.output)
        if o is not None:
            outputs.append(o)
        states.append(state)
    if not states:
        none = state.new_empty((state.shape[0], 0, *state.shape[1:]))
        return RecurrenceResult(h.v.clone() if problem.output else None, state.clone(), states=none)
    o = torch.cat(outputs, 2) if problem.output else None
    return RecurrenceResult(o, state, states=torch.stack(states, 1))
