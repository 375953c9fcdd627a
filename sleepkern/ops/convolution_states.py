"""Steps of the short convolution on several tokens, on states of a pool, and with the state after each token."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..addresses import check_memory, check_written
from ..autograd.steps import same_memory
from ..backends.torch_common import read_rows, store_states, write_rows
from ..eager import untraced
from ..problems.mixer import check_step_tokens
from ..problems.pools import check_rows, check_states_out

MOST_TOKENS = 16
"""The number of tokens that a call may store states after."""


def convolve_tokens(
    x: Tensor,
    state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    indices: Tensor | None,
    states_out: Tensor | None,
    out_indices: Tensor | None,
    convolve: Callable[..., tuple[Tensor, Tensor]],
) -> Tensor:
    """y of `short_convolution_step` in the shape of x [B,D] or [B,T,D]; convolve is `short_convolution` on [B,T,D].

    Raises:
        TypeError, ValueError: an argument that does not fit. Nothing was written.
    """
    tokens = x[:, None] if isinstance(x, Tensor) and x.ndim == 2 else x
    check_step_tokens(tokens, state, weight, bias, activation, indices, states_out, out_indices, MOST_TOKENS)
    _check_memory(tokens, state, weight, bias, indices, states_out, out_indices)
    with torch.no_grad():
        present = None if indices is None else indices >= 0
        start = state if indices is None else read_rows(state, indices)
        past = start[..., 1:].transpose(1, 2).to(x.dtype)
        y = convolve(tokens, past=past)[0] if tokens.numel() else torch.zeros_like(tokens)
        if present is not None:
            y = torch.where(present[:, None, None], y, 0)
        # [B,D,1+T,W]: the last W inputs before the first token, and after each.
        windows = torch.cat([start, tokens.transpose(1, 2).to(state.dtype)], 2).unfold(2, weight.shape[1], 1)
        if states_out is not None:
            for t in range(tokens.shape[1]):
                store_states(windows[:, :, t + 1], states_out, out_indices, present, t)
        elif indices is None:
            state.copy_(windows[:, :, -1].clone())
        else:
            write_rows(state, windows[:, :, -1], indices)
    return y.view(x.shape)


def _check_memory(
    x: Tensor,
    state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    indices: Tensor | None,
    states_out: Tensor | None,
    out_indices: Tensor | None,
) -> None:
    """Check the values of indices, and that what is written is not read by another name."""
    if not untraced(x, state, weight, bias, indices, states_out, out_indices) or state.is_meta:
        return
    names = ("x", "weight", "bias", "state_indices", "states_out_indices")
    read = (x, weight, bias, indices, out_indices)
    check_memory((*names, "state", "states_out"), (*read, state, states_out))
    if states_out is None:
        check_written("state", state, names, read)
        if indices is not None:
            check_rows(state.shape[0], indices)
        return
    pool = None if out_indices is not None and same_memory(state, states_out) else state
    check_written("states_out", states_out, (*names, "state"), (*read, pool))
    check_states_out(state, indices, states_out, out_indices)
