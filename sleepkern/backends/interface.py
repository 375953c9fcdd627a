"""What a backend is to the rest of the package, and the one question that is asked of it before it computes."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from ..problems.blocks import BlockProblem, Slept
from ..problems.gates import RawGates
from ..problems.mixer import MixerProblem
from ..problems.recurrence import Problem, RecurrenceResult, Tensors
from ..rules import Rule
from ..state import State
from .replay.backward import OneBackward, OnePass

REPLAY = frozenset({"passes", "tol", "method"})
"""The options of a replay, as a backend's OPTIONS name them."""
STATES = frozenset({"state_every", "state_bf16"})
"""The options that say which states are wanted along the way, and the type of those that are updated in place."""
_PLAIN = tuple(Problem._field_defaults.items())
"""Each option of Problem and the value that changes nothing."""


class RecurrenceBackend(Protocol):
    """What computes a recurrence: the words that every such backend has."""

    @property
    def NAME(self) -> str:
        """What `backend=` and SLEEPKERN_BACKEND call it."""

    @property
    def SUPPORTS(self) -> frozenset[Rule]:
        """The rules it computes."""

    @property
    def OPTIONS(self) -> frozenset[str]:
        """The fields of Problem with a default that it heeds."""

    def why_not(self, problem: Problem, /) -> str | None:
        """None, or the sentence why it cannot do a problem of its rules and options."""

    def kernel(self, problem: Problem, /) -> str:
        """One line on the code it would run."""

    def method_of(self, problem: Problem, /) -> str:
        """The replay method it would take."""

    def forward(self, problem: Problem, x: Tensors, /) -> RecurrenceResult:
        """Readouts, final state, and how a replay ended."""

    def backward(
        self, problem: Problem, x: Tensors, do: Tensor | None, dstate: Tensor | None, dstates: Tensor | None = None, /
    ) -> list[Tensor | None]:
        """Gradients of q, k, v, g, beta and the initial state; dstates is that of the states along the way."""

    def step(self, problem: Problem, x: Tensors, /) -> Tensor:
        """Readouts of a few tokens, x.state updated in place."""


@runtime_checkable
class StepsInPool(Protocol):
    """A backend that also decodes on states of a pool; for any other, the states are copied out and back."""

    def step_in_pool(self, problem: Problem, x: Tensors, indices: Tensor, /) -> Tensor:
        """Outputs of a few tokens; x.state is the pool [n,HV,K,V], and row b updates x.state[indices[b]]."""


@runtime_checkable
class StepsInStates(Protocol):
    """A backend that also decodes without an update, and stores the state after each token of the call."""

    def step_states(
        self,
        problem: Problem,
        x: Tensors,
        indices: Tensor | None,
        states_out: Tensor,
        out_indices: Tensor | None,
        /,
    ) -> Tensor:
        """Outputs [B,T,HV,V]; x.state is read, from the rows indices [B] of a pool where they are given.

        The state after token t of row b goes to states_out[b, t], or to states_out[out_indices[b, t]]; a negative index
        is not written.
        """


@runtime_checkable
class MakesGates(Protocol):
    """A backend whose kernels make the gates of raw projections; for any other, torch makes them before the call."""

    def why_not_gates(self, problem: Problem, /) -> str | None:
        """None, or the sentence why its kernels take made gates for this problem."""

    def forward_of_raw(self, problem: Problem, x: Tensors, gates: RawGates, /) -> RecurrenceResult:
        """The same as `forward`, x.g and x.beta raw as `gates` says."""

    def backward_of_raw(
        self, problem: Problem, x: Tensors, gates: RawGates, do: Tensor | None, dstate: Tensor | None, /
    ) -> list[Tensor | None]:
        """Gradients of q, k, v, g, beta, the initial state, A_log and dt_bias."""

    def step_of_raw(self, problem: Problem, x: Tensors, gates: RawGates, /) -> Tensor:
        """The same as `step`, x.g and x.beta raw as `gates` says."""


@runtime_checkable
class NamesDevices(Protocol):
    """A backend that can say for a type of device alone that it refuses every call there."""

    def why_not_on(self, device: str, /) -> str | None:
        """None, or the sentence why nothing can run on this type of device ("cpu", "cuda")."""


class Ordinary(RecurrenceBackend, Protocol):
    """A backend whose passes other backends put the gradients of a replay together from."""

    def pieces(self, problem: Problem, /) -> tuple[OnePass, OneBackward]:
        """One pass and its gradients."""


class BlocksBackend(Protocol):
    """What runs the passes of a stack of blocks."""

    @property
    def NAME(self) -> str:
        """What `backend=` and SLEEPKERN_BACKEND call it."""

    @property
    def SUPPORTS(self) -> frozenset[Any] | None:
        """The mixers of LayerWeights it computes; None: whatever the blocks do, which it calls."""

    @property
    def RECORDED(self) -> bool:
        """Tells whether torch records what it does, so that gradients need nothing else."""

    def why_not(self, problem: BlockProblem, /) -> str | None:
        """None, or the sentence why it cannot run layers that it supports."""

    def kernel(self, problem: BlockProblem, /) -> str:
        """One line on the code it would run."""

    def run(self, problem: BlockProblem, h: Tensor, blocks: Sequence[Any], states: Sequence[State], /) -> Slept:
        """All passes over h [B,L,d] from these states, none of which it writes to."""


class MixerBackend(Protocol):
    """What runs the operators of a mixer around its recurrence. The tensors of a call say all sizes."""

    @property
    def NAME(self) -> str:
        """What `backend=` and SLEEPKERN_BACKEND call it."""

    @property
    def SUPPORTS(self) -> frozenset[type]:
        """The kinds of MixerProblem it runs."""

    @property
    def RECORDED(self) -> bool:
        """Tells whether torch records what it does, so that gradients need nothing else."""

    def why_not(self, problem: MixerProblem, /) -> str | None:
        """None, or the sentence why it cannot run a problem of a kind that it supports."""

    def kernel(self, problem: MixerProblem, /) -> str:
        """One line on the code it would run."""

    def convolve(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        past: Tensor | None,
        cu_seqlens: Tensor | None,
        silu: bool,
        /,
    ) -> tuple[Tensor, Tensor]:
        """y [B,T,D] and the last W - 1 inputs [n,W-1,D]."""

    def convolve_step(self, x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, /) -> Tensor:
        """y [B,D]; the state [B,D,W] is updated in place."""

    def gated_norm(
        self, x: Tensor, gate: Tensor, weight: Tensor, eps: float, silu: bool, gate_first: bool, /
    ) -> Tensor:
        """y of the shape [B,T,H,V] or [B,T,V] of x."""


def refusal(backend: RecurrenceBackend, problem: Problem) -> str | None:
    """None where the backend does the problem, else the sentence why not.

    What the backend never heard of, a rule or an option, is not left to its own judgement.
    """
    if not _has(backend.SUPPORTS, problem.rule):
        return f"does not know the rule {problem.rule}"
    for option, plain in _PLAIN:
        if option not in backend.OPTIONS and getattr(problem, option) != plain:
            return f"does not know the option {option} = {getattr(problem, option)!r}"
    return backend.why_not(problem)


def refuse_states(problem: Problem) -> str | None:
    """None, or the sentence why kernels that go through chunks of 16 tokens or more do not find the wanted states."""
    if problem.state_every is None or problem.state_every % 16 == 0:
        return None
    return f"finds states after every multiple of 16 tokens, got state_every = {problem.state_every}"


def blocks_refusal(backend: BlocksBackend, problem: BlockProblem) -> str | None:
    """None where the backend runs these blocks, else the sentence why not; a mixer it never heard of is one."""
    if backend.SUPPORTS is not None:
        for layer in problem.layers:
            if type(layer.mixer) not in backend.SUPPORTS:
                return f"does not know {type(layer.mixer).__name__}"
    return backend.why_not(problem)


def mixer_refusal(backend: MixerBackend, problem: MixerProblem) -> str | None:
    """None where the backend runs the operator, else the sentence why not."""
    if type(problem) not in backend.SUPPORTS:
        return f"does not know {type(problem).__name__}"
    return backend.why_not(problem)


def _has(rules: frozenset[Rule], rule: Rule) -> bool:
    return rule in rules


_has._dynamo_marked_constant = True  # type: ignore[attr-defined]  # Dynamo compares objects in sets by identity


def __getattr__(name: str) -> Any:
    """The former name of RecurrenceBackend."""
    if name != "Backend":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(f"{__name__}.Backend is {__name__}.RecurrenceBackend", DeprecationWarning, stacklevel=2)
    return RecurrenceBackend
