"""Step 5 of a call, COMPUTE. Every backend is an object, such as a module, with the same words (interface.py):

NAME                                   what `backend=` and SLEEPKERN_BACKEND call it
SUPPORTS                               frozenset of the rules it computes
OPTIONS                                frozenset of the options of Problem it heeds, its fields that have a default
why_not(problem) -> str | None         None, or the sentence why it cannot do a problem of these rules and options
kernel(problem) -> str                 one line on the code it would run
method_of(problem) -> str              the replay method it would take
forward(problem, tensors) -> RecurrenceResult  outputs, final state, and how a replay ended
backward(problem, tensors, do, dstate) gradients of q, k, v, g, beta and the initial state
step(problem, tensors) -> o            a few tokens, the state updated in place

Words that a backend may have besides, each with a protocol of its own in interface.py:

step_in_pool(problem, tensors, indices) the same on states of a pool (StepsInPool)
why_not_on(device) -> str | None        why nothing can run on a type of device (NamesDevices)
pieces(problem)                         one pass and its gradients, which replays of other backends take (Ordinary)

A new backend is such an object in BACKENDS, before those that it is better than.
"""

import warnings
from typing import Any

from . import chunked, modules, reference, torch_mixer, triton
from .cpu import blocks as cpu_blocks
from .cpu import mixer as cpu_mixer
from .cpu import recurrence as cpu
from .cuda import blocks as cuda_blocks
from .cuda import recurrence as cuda
from .interface import BlocksBackend, MixerBackend, RecurrenceBackend
from .triton import mixer as triton_mixer

BACKENDS: tuple[RecurrenceBackend, ...] = (cuda, cpu, triton, chunked, reference)
"""Best first; `choose` takes the first that does not refuse. Another tuple in this place counts from the next call."""
BLOCK_BACKENDS: tuple[BlocksBackend, ...] = (cuda_blocks, cpu_blocks, modules)
"""The same for the passes of a stack of blocks (`sleep_blocks`): objects with the words of `BlocksBackend`."""
MIXER_BACKENDS: tuple[MixerBackend, ...] = (cpu_mixer, triton_mixer, torch_mixer)
"""The same for the short convolution, its step and the gated RMS norm: objects with the words of `MixerBackend`."""


def __getattr__(name: str) -> Any:
    """The former name of RecurrenceBackend."""
    if name != "Backend":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(f"{__name__}.Backend is {__name__}.RecurrenceBackend", DeprecationWarning, stacklevel=2)
    return RecurrenceBackend
