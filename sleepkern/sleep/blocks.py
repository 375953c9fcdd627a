"""N passes of a stack of hybrid blocks over a window, in one call (arXiv 2605.26099).

h(0) = h;   (h(n), S(n)) = Blocks(h(n-1), S(n-1)),  n = 1..N
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from .. import autograd_blocks
from ..autograd_blocks import filled, tensors_of
from ..backends import cpu_blocks, cuda_blocks, modules
from ..backends.interface import BlocksBackend
from ..backends.tensors import on_device_of
from ..dispatch import asked_for
from ..problems.blocks import BlockProblem, Slept, check, describe
from ..state import State

if TYPE_CHECKING:
    from ..nn import HybridBlock

__all__ = ["Slept", "forget_packed", "one_by_one", "sleep_blocks", "why_not"]


def sleep_blocks(
    h: Tensor,
    blocks: Sequence[HybridBlock],
    states: Sequence[State] | None = None,
    passes: int = 1,
    feedback: Literal["raw", "reinject"] = "raw",
    conv_state: Literal["rewind", "carry"] = "rewind",
) -> Slept:
    """Run blocks `passes` times over a window, exactly as the modules do one by one.

    Args:
        h: [B,L,d] the window, embedded.
        blocks: of `sleepkern.nn`, one after the other.
        states: what each block remembers from before the window, default nothing. Attention sees its part in every
            pass; fast weights go on from pass to pass.
        passes: N.
        feedback: a pass after the first starts from "raw", what the one before left, or "reinject", that normalised,
            plus h.
        conv_state: before the window, the short convolutions of a pass after the first see "rewind", what preceded the
            window, or "carry", the window's own end.

    On the CPU all of it is one call of C++: groups of sequences go through all passes and blocks without leaving the
    caches. Products with weights multiply in bfloat16 where h is that, or float32 of which
    torch.set_float32_matmul_precision("medium") allows it, and the processor does it in one instruction; those of
    float32 go in part by Winograd's inner product where additions run beside multiplications, with the errors of
    plain ones (docs/sleep_blocks.md). On a GPU it is one launch, whose products multiply in bfloat16. With gradients
    h and the fast weights are kept between passes only, and each pass is run again in the backward. What `why_not`
    names runs module by module. Weights are packed once, and again when they have changed, but for writes that torch
    does not count: see `forget_packed`.

    Raises:
        TypeError: an argument of another type.
        ValueError: an argument out of range, or a tensor whose memory was freed.
    """
    blocks, states = check(h, blocks, states, passes, feedback, conv_state)
    if any(t.is_neg() for t in (h, *tensors_of(states))):  # a sign that is not in memory yet
        h, states = h.resolve_neg(), filled(states, [t.resolve_neg() for t in tensors_of(states)])
    with on_device_of(h):
        problem = describe(h, blocks, states, passes, feedback == "reinject", conv_state == "carry")
        engine = modules if _why_not(problem) is not None else _engine(problem)
        return autograd_blocks.sleep_blocks(problem, engine, h, blocks, states)


def forget_packed(blocks: Sequence[HybridBlock]) -> None:
    """Have `sleep_blocks` pack the weights of these blocks anew.

    It does so by itself where a block has other weights or numbers than before, or torch has counted a write to one of
    its parameters. Torch does not count writes by way of a parameter's `.data` (`p.data.mul_(2)`, `p.data += d`, which
    merging an adapter may do), of its numpy array, or of another process that shares its memory: call this after them.
    """
    for block in blocks:
        cpu_blocks.forget(block)
        cuda_blocks.forget(block)


def why_not(h: Tensor, blocks: Sequence[HybridBlock]) -> str | None:
    """None where `sleep_blocks` is one call of C++ or one launch, else the sentence why it runs module by module."""
    return _why_not(describe(h, blocks))


def _why_not(problem: BlockProblem) -> str | None:
    if not asked_for(problem.device):  # the backends of sleep_blocks have the names of their devices
        return "SLEEPKERN_BACKEND asks for another backend"
    return _engine(problem).why_not(problem)


def _engine(problem: BlockProblem) -> BlocksBackend:
    return cuda_blocks if problem.device == "cuda" else cpu_blocks


def one_by_one(
    h: Tensor,
    blocks: Sequence[HybridBlock],
    passes: int = 1,
    states: Sequence[State] | None = None,
    feedback: Literal["raw", "reinject"] = "raw",
    conv_state: Literal["rewind", "carry"] = "rewind",
) -> Slept:
    """`sleep_blocks` module by module, on any device, for any type, recorded by autograd as it comes."""
    began = [None] * len(blocks) if states is None else list(states)
    reinject, carry = feedback == "reinject", conv_state == "carry"
    return Slept(*modules.passes_of(blocks, h, began, passes, reinject, carry))  # type: ignore[arg-type]
