"""Step 4 of a call whose gates are raw: by the backend that was chosen, where it makes gates itself, else by torch."""

from __future__ import annotations

from ..backends.interface import RecurrenceBackend
from ..backends.torch_gates import with_gates
from ..problems.gates import RawGates, check_gates
from ..problems.recurrence import Problem, RecurrenceResult, Tensors
from . import recurrence


def ingest(problem: Problem, engine: RecurrenceBackend, x: Tensors, gates: RawGates) -> RecurrenceResult:
    """Outputs and final state, recorded by autograd in every tensor, A_log and dt_bias among them."""
    return recurrence.ingest(problem, engine, made(problem, x, gates))


def made(problem: Problem, x: Tensors, gates: RawGates) -> Tensors:
    """The tensors of the same call with gates that torch's operators make.

    Raises:
        TypeError, ValueError: gates that do not fit the call.
    """
    check_gates(problem, x, gates)
    return with_gates(problem, x, gates)
