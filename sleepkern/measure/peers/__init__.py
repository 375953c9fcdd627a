"""Whom sleepkern is compared with: one file each; the library is imported only when a case is prepared.

    name                                 column of the table
    why_not(case, device) -> str | None  None, or the sentence why it cannot do the case
    prepare(case, inputs, threads)       a callable for one set of inputs, returning (o, state), or
                                         for train the gradients of v and of the initial state

Work that the peer's own interface makes a caller do (a zero decay, beta * v) is inside the call;
what it does not (layouts, uploads) is done before. A peer that gives wrong results is reported as
wrong and not compared with.
"""

from __future__ import annotations

import torch

from ..cases import Case
from . import bitsandbytes, fla, flash_qla, ggml, hf_transformers, ours, relaunched, token_loop
from .peer import OURS, Peer, Prepared

__all__ = ["GPU_PEERS", "OURS", "PEERS", "Peer", "Prepared", "peers_of"]


def peers_of(case: Case, device: str = "cpu") -> tuple[Peer, ...]:
    """The peers to try on a case, and ours under other settings where that is the question."""
    if torch.device(device).type == "cuda":
        return GPU_PEERS
    if case.threads is not None:
        return (Peer("ours, 1 thread", ours.always, ours.prepare, threads=1),)
    if case.dtype != torch.float32:
        return (*PEERS, Peer("ours, float32", ours.always, ours.in_float32))
    return PEERS


GPU_PEERS = (
    Peer("fla", fla.why_not, fla.prepare),
    Peer("FlashQLA", flash_qla.why_not, flash_qla.prepare),
    Peer("torch.compile", ours.not_to_compile, ours.by_compiler),
    Peer("ours, pass by pass", ours.not_several_passes, ours.pass_by_pass),
    Peer("ours, prepared once", ours.not_for_triton, relaunched.prepare),
    Peer("ours, Triton", ours.not_for_triton, ours.by_triton),
    Peer("ours, with outputs", ours.no_outputs_to_add, ours.with_outputs),
)
PEERS = (
    Peer("token loop", ours.always, token_loop.prepare),
    Peer("transformers", hf_transformers.why_not, hf_transformers.prepare),
    Peer("ggml", ggml.why_not, ggml.prepare),
    Peer("bitsandbytes", bitsandbytes.why_not, bitsandbytes.prepare),
    Peer("fla", fla.why_not, fla.prepare),
)
"""The peers in the order of the table's columns."""
