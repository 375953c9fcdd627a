"""Steps 2 and 3 of `sleep_blocks`, CHECK and CHOOSE, remembered: a call like an earlier one takes the same answer.

What the checks and the choice say follows from the blocks, from the shapes, types and devices of h and states, from the
options, and from which backends there are. A witness (backends/native/witness.py) says of the blocks that they are as
they were; everything else is the key. A call that autograd, a mode, a transform or a graph capture looks at, and every
call with an odd argument, takes the steps.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.modules import module as _module

from .. import backends, settings
from ..backends.interface import BlocksBackend
from ..backends.native.witness import last_witness
from ..eager import any_autocast as _autocast
from ..eager import dispatch_modes as _modes
from ..eager import forward_mode as _forward_mode
from ..eager import transform_stack as _transforms
from ..problems.blocks import BlockProblem
from ..state import KVState, RecurrentState

MOST = 64
"""Answers that are remembered of a stack; the oldest goes first."""
# These are names of this module because each dot on the way to a function costs half of what the function does.
_compiling = torch.compiler.is_compiling
_grad = torch.is_grad_enabled
_precision = torch.get_float32_matmul_precision
_strided = torch.strided


class Answer(NamedTuple):
    """The problem of a call and the backend that runs it, as long as the backends are these."""

    problem: BlockProblem
    engine: BlocksBackend
    order: Any


def key_of(
    h: Any, blocks: Any, states: Any, passes: Any, feedback: Any, conv_state: Any, backend: Any
) -> Hashable | None:
    """Everything beside the blocks that the answer follows from; None for a call that is not remembered."""
    if type(blocks) is not list or type(h) is not Tensor or _compiling() or _grad() or _modes() != 0:
        return None
    if _transforms() is not None or _autocast() or _forward_mode():
        return None
    if _module._global_forward_hooks or _module._global_forward_pre_hooks:
        return None
    # An option of another type than the usual one may equal it (1 == True) and be refused.
    if type(passes) is not int or type(feedback) is not str or type(conv_state) is not str:
        return None
    if backend is not None and type(backend) is not str:
        return None
    if not _plain(h) or (h.is_cuda and torch.cuda.is_current_stream_capturing()):
        return None
    key: list[Any] = [h.shape, h.dtype, h.device, passes, feedback, conv_state, backend, settings.BACKEND, _precision()]
    if states is not None:
        if type(states) is not list or len(states) != len(blocks):
            return None
        for state in states:
            kind = type(state)
            key.append(kind)
            if state is None:
                continue
            if kind is not RecurrentState and kind is not KVState:
                return None
            for t in state:
                if type(t) is not Tensor or not _plain(t):
                    return None
                key += (t.shape, t.dtype, t.device)
    return tuple(key)


def find(key: Hashable | None, h: Tensor, blocks: list[Any]) -> Answer | None:
    """The answer of an earlier call with this key, if the blocks are as they were then."""
    if key is None or not blocks or (witness := last_witness(blocks)) is None:
        return None
    found: Answer | None = witness.answers.get(key)
    if found is None or found.order is not backends.BLOCK_BACKENDS or not witness.holds_on(blocks, h):
        return None
    return found


def remember(key: Hashable | None, blocks: list[Any], problem: BlockProblem, engine: BlocksBackend) -> None:
    """Keep the answer for later calls, if the blocks' part in it is what their witness says."""
    if key is None or (witness := last_witness(blocks)) is None or problem.layers is not witness.layers:
        return
    if len(witness.answers) >= MOST:
        witness.answers.pop(next(iter(witness.answers)), None)
    witness.answers[key] = Answer(problem, engine, backends.BLOCK_BACKENDS)


def _plain(t: Tensor) -> bool:
    """Tells whether the tensor's values themselves are in memory."""
    return t.layout is _strided and not t.is_neg() and (t.data_ptr() != 0 or t.numel() == 0)
