"""Inputs, the error measure and tolerances, shared by tests, `verify` and benchmarks."""

from .inputs import (
    AWKWARD_SHAPES,
    Decay,
    Shape,
    call,
    make_inputs,
    relative_error,
    rules_of,
    to_float64,
    type_name,
)
from .tolerances import (
    BLOCK_GRADIENTS,
    BLOCKS,
    BLOCKS_BF16,
    IN_PIECES,
    MATTERS,
    REORDERED_DOUBLE,
    SAME_GRADIENTS,
    SAME_SUMS,
    SESSION_STATES,
    TOLERANCE,
)

__all__ = [
    "AWKWARD_SHAPES", "BLOCKS", "BLOCKS_BF16", "BLOCK_GRADIENTS", "IN_PIECES", "MATTERS", "REORDERED_DOUBLE",
    "SAME_GRADIENTS", "SAME_SUMS", "SESSION_STATES", "TOLERANCE", "Decay", "Shape", "call", "make_inputs",
    "relative_error", "rules_of", "to_float64", "type_name",
]  # fmt: skip
