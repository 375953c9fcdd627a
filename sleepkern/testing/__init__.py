"""Inputs, the error measure and tolerances, shared by tests, `verify` and benchmarks."""

from .inputs import AWKWARD_SHAPES, Decay, Shape, call, make_inputs, relative_error, rules_of, to_float64, type_name
from .tolerances import TOLERANCE

__all__ = [
    "AWKWARD_SHAPES", "TOLERANCE", "Decay", "Shape", "call", "make_inputs", "relative_error", "rules_of", "to_float64",
    "type_name",
]  # fmt: skip
