"""What the recurrences of a patched model hand to a cache that can roll back.

While a base model runs with such a cache, a `Recorder` is current in its thread. Each replaced recurrence then records
the inputs of its tokens, and the states after the tokens that the recorder names. `rollback_layers.py` gives them to
the layers of the cache when the base model is done.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sleepkern.ops import recurrence as ops
from sleepkern.ops.replay import sleep_ingest
from sleepkern.rules import Rule


class Inputs(NamedTuple):
    """What a recurrence reads of some tokens, without queries.

    rule       the rule, by which state and inputs make the next state
    k          [B,T,H,K], v [B,T,HV,V], g and beta as the rule takes them
    normalize  whether the rule uses k / |k|
    transposed whether the model holds S^T, as Mamba-2 does
    """

    rule: Rule
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor
    normalize: bool = False
    transposed: bool = False

    @property
    def tokens(self) -> int:
        """T."""
        return self.k.shape[1]

    def part(self, first: int, end: int, copy: bool = False) -> Inputs:
        """The inputs of tokens first to end; a copy frees the memory of the other tokens."""
        parts = [x[:, first:end] for x in self.tensors]
        return self.with_tensors([x.clone() for x in parts] if copy else parts)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """k, v, g and beta."""
        return self.k, self.v, self.g, self.beta

    def with_tensors(self, tensors: Sequence[Tensor]) -> Inputs:
        """The same with another k, v, g and beta."""
        k, v, g, beta = tensors
        return self._replace(k=k, v=v, g=g, beta=beta)

    def state_after(self, held: Tensor | None) -> Tensor:
        """The state after these tokens; `held` is the state before them as the model holds it, None for zero."""
        with torch.no_grad():
            S = None if held is None else (held.transpose(-1, -2) if self.transposed else held)
            k, v, g, beta = self.tensors
            found = sleep_ingest(
                k, v, g, beta, initial_state=S, rule=self.rule, use_qk_l2norm_in_kernel=self.normalize
            ).final_state
        return found.transpose(-1, -2) if self.transposed else found


def joined(pieces: list[Inputs]) -> Inputs:
    """Inputs of consecutive tokens as one."""
    if len(pieces) == 1:
        return pieces[0]
    return pieces[0].with_tensors([torch.cat(x, dim=1) for x in zip(*(p.tensors for p in pieces), strict=True)])


class Record(NamedTuple):
    """One call of a recurrence.

    inputs   of all its tokens
    at_cuts  the states after the cuts
    held     the state after the call; both as the model holds them
    """

    inputs: Inputs
    at_cuts: tuple[Tensor, ...]
    held: Tensor


class Recorder:
    """What the layers of one call of a base model record.

    Args:
        cuts: the numbers of tokens of this call after which a state is kept, rising.
    """

    def __init__(self, cuts: tuple[int, ...] = ()) -> None:
        self.cuts = cuts
        self.records: list[Record] = []
        self.convolved: list[tuple[Tensor, Tensor]] = []

    def run(self, q: Tensor, inputs: Inputs, state: Tensor | None, scale: float | None = None) -> tuple[Tensor, Tensor]:
        """The rule over many tokens from S `state`: outputs [B,T,HV,V], and S as the model holds it."""
        outputs, states, first = [], [], 0
        for end in (*self.cuts, inputs.tokens):
            part = inputs.part(first, end)
            o, state = getattr(ops, inputs.rule.name)(
                q[:, first:end],
                *part.tensors,
                scale=scale,
                initial_state=state,
                output_final_state=True,
                use_qk_l2norm_in_kernel=inputs.normalize,
            )
            assert state is not None
            outputs.append(o)
            states.append(state.transpose(-1, -2) if inputs.transposed else state)
            first = end
        self.add(inputs, states[-1], tuple(states[:-1]))
        return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)), states[-1]

    def add(self, inputs: Inputs, held: Tensor, at_cuts: tuple[Tensor, ...] = ()) -> None:
        """Record a call whose last state the model holds as the tensor `held`."""
        if torch.is_grad_enabled():
            inputs = inputs.with_tensors([x.detach() for x in inputs.tensors])
        self.records.append(Record(inputs, tuple(x.detach() for x in at_cuts), held))


class _Current(threading.local):
    recorder: Recorder | None = None


_current = _Current()


def current() -> Recorder | None:
    """The recorder of the base model that runs in this thread; None outside of one."""
    return _current.recorder


@contextlib.contextmanager
def recorded_by(recorder: Recorder) -> Iterator[None]:
    """Make a recorder the current one of this thread."""
    before = _current.recorder
    _current.recorder = recorder
    try:
        yield
    finally:
        _current.recorder = before


def record_convolution_step(conv_state: Tensor, x: Tensor) -> None:
    """Record the input x [B,D,1] of a short convolution that shifts `conv_state` in place, if a recorder is current."""
    recorder = _current.recorder
    if recorder is not None:
        recorder.convolved.append((conv_state, x.detach()))


def record_step(inputs: Callable[[], Inputs], held: Tensor) -> None:
    """Record a step that wrote its state in place, if a recorder is current; `inputs` makes the Inputs."""
    recorder = _current.recorder
    if recorder is not None:
        recorder.add(inputs(), held)
