"""How far two results may be apart: each row is a relative error in norm, with the reason for its size.

A test takes the row of the reason that it has. A number of its own belongs to a test with a reason of its own.
"""

from __future__ import annotations

import torch

TOLERANCE: dict[torch.dtype, float] = {
    torch.float64: 1e-10,
    torch.float32: 2e-5,
    torch.bfloat16: 1e-2,
    torch.float16: 2e-3,
}
"""Largest relative error in norm against the float64 reference on the same (rounded) inputs, by input type."""

SAME_SUMS = 1e-6
"""The same sums of float32 by another machine code, thread count or compiler: only the order of additions differs."""
SAME_GRADIENTS = 1e-5
"""The gradients of such calls: sums over a whole window cancel, so that rounding weighs ten times more."""
IN_PIECES = 2e-6
"""One call against several chained ones: the borders of chunks move, and with them what is rounded."""
BLOCKS = 1e-5
"""float32 passes of a stack of blocks, or of a model, against the same modules: some ten products follow each other."""
BLOCK_GRADIENTS = 1e-4
"""The gradients of such passes, which go back through every product once more."""
BLOCKS_BF16 = TOLERANCE[torch.bfloat16]
"""The same passes with products of bfloat16 operands: each product rounds once, as a call with bfloat16 inputs does."""
SESSION_STATES = 3e-6
"""States of a sleep that runs the same operators in another way: one rounding of float32 per pass."""
REORDERED_DOUBLE = 1e-14
"""The same formula of float64 in another order: some tens of roundings of 1e-16."""
MATTERS = 1e-3
"""Least error of a wrong result, two orders above what rounding makes: it shows that the test beside it could fail."""
