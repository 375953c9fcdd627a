"""N passes of a stack of blocks over a window, in one call (arXiv 2605.26099).

h(0) = h;   (h(n), S(n)) = Blocks(h(n-1), S(n-1)),  n = 1..N
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ..autograd import blocks as autograd_blocks
from ..backends import modules
from ..backends.cpu import blocks as cpu_blocks
from ..backends.cuda import blocks as cuda_blocks
from ..backends.native.views import on_device_of
from ..backends.native.witness import known_layers
from ..dispatch import BlocksExplanation, choose_blocks, explain_blocks_problem
from ..problems.blocks import Slept, check, check_blocks, check_window, describe
from ..problems.layer_weights import Block
from ..state import State, filled, tensors_of
from . import known_blocks


def sleep_blocks(
    h: Tensor,
    blocks: Sequence[Block],
    states: Sequence[State] | None = None,
    passes: int = 1,
    feedback: Literal["raw", "reinject"] = "raw",
    conv_state: Literal["rewind", "carry"] = "rewind",
    backend: str | None = None,
) -> Slept:
    """Run blocks `passes` times over a window, exactly as the modules do one by one.

    Args:
        h: [B,L,d] the window, embedded.
        blocks: of `sleepkern.nn`, or modules that are called alike (`Block`), one after the other.
        states: what each block remembers from before the window, default nothing. Attention sees its part in every
            pass; fast weights go on from pass to pass.
        passes: N.
        feedback: a pass after the first starts from "raw", what the one before left, or "reinject", that normalised,
            plus h.
        conv_state: before the window, the short convolutions of a pass after the first see "rewind", what preceded the
            window, or "carry", the window's own end.
        backend: "cuda", "cpu" or "modules", default the first of these that can; `explain_blocks` says which.

    With "cpu" all of it is one call of C++: groups of sequences go through all passes and blocks without leaving the
    caches. Products with weights multiply in bfloat16 where h is that, or float32 of which
    torch.set_float32_matmul_precision("medium") allows it, and the processor does it in one instruction; those of
    float32 go in part by Winograd's inner product where additions run beside multiplications, with the errors of
    plain ones (docs/kernels/cpu_blocks.md). With "cuda" it is one launch, whose products multiply in bfloat16. With
    gradients h and the fast weights are kept between passes only, and each pass is run again in the backward. "modules"
    calls the blocks one by one, on any device and for any type. Weights are packed once, and again when they have
    changed, but for writes that torch does not count: see `forget_packed`.

    Raises:
        TypeError: an argument of another type.
        ValueError: an argument out of range, a tensor whose memory was freed, or a backend that cannot do this call.
    """
    key = known_blocks.key_of(h, blocks, states, passes, feedback, conv_state, backend)
    found = known_blocks.find(key, h, blocks)  # type: ignore[arg-type]  # only a list has a key
    if found is not None:
        with on_device_of(h):
            return found.engine.run(found.problem, h, blocks, [None] * len(blocks) if states is None else states)
    blocks, states = check(h, blocks, states, passes, feedback, conv_state)
    if _signs_to_change(h, states):
        h, states = h.resolve_neg(), filled(states, [t.resolve_neg() for t in tensors_of(states)])
    with on_device_of(h):
        problem = describe(h, blocks, states, passes, feedback == "reinject", conv_state == "carry", known_layers)
        engine = choose_blocks(problem, backend)
        known_blocks.remember(key, blocks, problem, engine)
        return autograd_blocks.sleep_blocks(problem, engine, h, blocks, states)


def _signs_to_change(h: Tensor, states: Sequence[State]) -> bool:
    """Tells whether a tensor has the opposites of its numbers in memory; in a graph torch's own operators heed that."""
    return not torch.compiler.is_compiling() and any(t.is_neg() for t in (h, *tensors_of(states)))


def explain_blocks(h: Tensor, blocks: Sequence[Block], backend: str | None = None) -> BlocksExplanation:
    """Which backend `sleep_blocks` would take for this window [B,L,d] and these blocks, and why not the others.

    Raises:
        TypeError: no tensor, or something else than blocks.
        ValueError: another h, an unknown backend, or one that cannot do this call.
    """
    check_window(h)
    blocks = check_blocks(blocks)
    with on_device_of(h):
        problem = describe(h, blocks)
        choose_blocks(problem, backend)
        return explain_blocks_problem(problem, backend)


def forget_packed(blocks: Sequence[Block]) -> None:
    """Have `sleep_blocks` pack the weights of these blocks anew.

    It does so by itself where a block has other weights or numbers than before, or torch has counted a write to one of
    its parameters. Torch does not count writes by way of a parameter's `.data` (`p.data.mul_(2)`, `p.data += d`, which
    merging an adapter may do), of its numpy array, or of another process that shares its memory: call this after them.
    """
    for block in blocks:
        cpu_blocks.forget(block)
        cuda_blocks.forget(block)


def why_not(h: Tensor, blocks: Sequence[Block]) -> str | None:
    """None where `sleep_blocks` is one call of C++ or one launch, else the sentence why it runs module by module.

    h: [B,L,d], or any tensor of its device and type.
    """
    with on_device_of(h):
        told = explain_blocks_problem(describe(h, blocks))
    if told.chosen != "modules":
        return None
    return told.reasons["cuda" if h.device.type == "cuda" else "cpu"]


def one_by_one(
    h: Tensor,
    blocks: Sequence[Block],
    passes: int = 1,
    states: Sequence[State] | None = None,
    feedback: Literal["raw", "reinject"] = "raw",
    conv_state: Literal["rewind", "carry"] = "rewind",
) -> Slept:
    """`sleep_blocks` with backend "modules", and nothing checked."""
    began = [None] * len(blocks) if states is None else list(states)
    made = modules.passes_of(blocks, h, began, passes, feedback == "reinject", conv_state == "carry")
    return Slept(*made)  # type: ignore[arg-type]
