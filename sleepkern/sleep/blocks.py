"""The passes of a stack of blocks, as sessions take them (ops/blocks.py)."""

from ..ops.blocks import explain_blocks, forget_packed, one_by_one, sleep_blocks, why_not
from ..problems.blocks import Slept

__all__ = ["Slept", "explain_blocks", "forget_packed", "one_by_one", "sleep_blocks", "why_not"]
