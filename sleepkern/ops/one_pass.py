"""One pass of a rule: plain, with states along the way, from and into a pool of states, or over a tree of segments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import TypedDict

from ..addresses import check_memory, check_written
from ..backends.torch_common import read_rows, write_rows
from ..eager import untraced
from ..problems.branches import read_parents
from ..problems.gates import GateOptions, RawGates
from ..problems.pools import check_indices, check_pool, check_rows
from ..problems.recurrence import Problem, RecurrenceResult, Tensors, check, check_flag
from ..rules import Rule
from . import branches, fast_path
from .call import apply, cast, gradients_wanted, raw_gates


class Along(NamedTuple):
    """What a call wants of states beside the last: see the arguments of the rules."""

    state_every: int | None
    state_indices: Tensor | None
    output_state_indices: Tensor | None
    parents: Tensor | Sequence[int] | None


class RuleOptions(TypedDict, total=False):
    """The options of a rule without raw decays, as keywords of a call that also gives `state_every`."""

    scale: float | None
    initial_state: Tensor | None
    output_final_state: bool
    use_qk_l2norm_in_kernel: bool
    cu_seqlens: Tensor | None
    backend: str | None
    use_beta_sigmoid_in_kernel: bool
    allow_neg_eigval: bool
    state_indices: Tensor | None
    output_state_indices: Tensor | None
    parents: Tensor | Sequence[int] | None


class GatedRuleOptions(RuleOptions, total=False):
    """The options of a rule that decays, as keywords of a call that also gives `state_every`."""

    use_gate_in_kernel: bool
    A_log: Tensor | None
    dt_bias: Tensor | None
    lower_bound: float | None


def one_pass(
    rule: Rule,
    x: tuple[Tensor | None, ...],
    scale: float | None,
    normalize: bool,
    output_final_state: bool,
    backend: str | None,
    options: GateOptions,
    along: Along,
) -> Any:
    """The results of a rule: o and the final state or None, and with `state_every` the states along the way."""
    if type(output_final_state) is not bool:
        check_flag("output_final_state", output_final_state)
    gates = raw_gates(options)
    if along[0] is None and along[1] is None and along[2] is None and along[3] is None:
        plain = fast_path.forward(rule, x, scale, normalize, backend, gates)
        if plain is not None:
            return plain if output_final_state else (plain[0], None)
    state_every = along.state_every
    call = (rule, scale, normalize, backend, gates, state_every)
    if along.state_indices is None and along.output_state_indices is None:
        out = _ingest(call, Tensors._make(x), along.parents)
        state = out.state if output_final_state else None
    else:
        out, state = _in_pool(call, Tensors._make(x), along)
    assert out.o is not None
    return (out.o, state) if state_every is None else (out.o, state, out.states)


_Call = tuple[Rule, "float | None", bool, "str | None", "RawGates | None", "int | None"]
"""rule, scale, normalize, backend, gates, state_every"""


def _ingest(call: _Call, x: Tensors, parents: Tensor | Sequence[int] | None) -> RecurrenceResult:
    rule, scale, normalize, backend, gates, state_every = call

    def run(x: Tensors) -> RecurrenceResult:
        return apply(rule, x, scale, normalize, backend, gates=gates, state_every=state_every)[2]

    if parents is None:
        return run(x)
    x = cast(x)
    check(rule, x._replace(state=None), scale, normalize, state_every=state_every)  # before the tokens are split
    return branches.ingest(x, parents, state_every, run)


def _in_pool(call: _Call, x: Tensors, along: Along) -> tuple[RecurrenceResult, Tensor]:
    """The results of a call whose initial states are rows of a pool, and the pool with the final states.

    Nothing is written before all is read, and before the call is known to succeed.
    """
    x = cast(x)
    pool, read, written = _check_in_pool(call, x, along)
    state = read_rows(pool, read).to(torch.float64 if x.k.dtype == torch.float64 else torch.float32)
    state = torch.where((read >= 0)[:, None, None, None], state, 0)
    out = _ingest(call, x._replace(state=state), along.parents)
    write_rows(pool, out.state, written)
    return out, pool


def _check_in_pool(call: _Call, x: Tensors, along: Along) -> tuple[Tensor, Tensor, Tensor]:
    """The pool, and the rows that sequences read and write."""
    pool, read, written = x.state, along.state_indices, along.output_state_indices
    if pool is None:
        raise ValueError("initial_state: got None; expected a pool [n,HV,K,V], for state_indices name its states")
    if read is None:
        raise ValueError(
            "state_indices: got None; expected the states to start from, for output_state_indices is given"
        )
    problem = check_pool(check(call[0], x._replace(state=None), call[1], call[2]), pool, "initial_state")
    read_shape, written_shape = _sequences(problem, x, along.parents)
    check_indices(problem, read, (read_shape,))
    if written is None:
        if along.parents is not None:
            raise ValueError("output_state_indices: got None; expected an index for each segment, for parents is given")
        written = read
    check_indices(problem, written, (written_shape,), "output_state_indices")
    if gradients_wanted(x, call[4]):
        raise ValueError("initial_state: got a pool where gradients are wanted; expected a call under torch.no_grad()")
    names = ("state_indices", "output_state_indices", "cu_seqlens")
    if untraced(*x, read, written) and not pool.is_meta:
        check_memory(("initial_state", *names[:2]), (pool, read, written))
        check_written(
            "initial_state", pool, ("q", "k", "v", "g", "beta", *names), (*x[:5], read, written, x.cu_seqlens)
        )
        check_rows(pool.shape[0], read, "state_indices", repeats=True)
        check_rows(pool.shape[0], written, "state_indices" if written is read else "output_state_indices")
    return pool, read, written


def _sequences(problem: Problem, x: Tensors, parents: Tensor | Sequence[int] | None) -> tuple[int, int]:
    """The numbers of sequences that start from a given state, and of those that end in one."""
    if parents is None:
        return problem.sequences, problem.sequences
    found = read_parents(parents, x.cu_seqlens)
    return sum(parent < 0 for parent in found), len(found)
