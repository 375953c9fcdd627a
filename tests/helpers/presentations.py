"""One tensor's numbers in the many ways that torch can hold them, and what is no such tensor at all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from helpers.wrapping import Wrapped


class Named(Tensor):
    """A subclass that changes nothing."""


def _offset(t: Tensor) -> Tensor:
    return torch.cat([t.new_zeros(3), t.flatten()])[3:].view(t.shape)


def _every_other(t: Tensor) -> Tensor:
    wide = t.new_zeros((*t.shape, 2)).flatten(-2)
    shown = wide[..., ::2]
    shown.copy_(t)
    return shown


def _part_of_a_row(t: Tensor) -> Tensor:
    wide = t.new_zeros((*t.shape[:-1], t.shape[-1] + 5))
    shown = wide[..., 2 : 2 + t.shape[-1]]
    shown.copy_(t)
    return shown


def _transposed(t: Tensor) -> Tensor:
    order = list(reversed(range(t.dim())))
    return t.permute(order).contiguous().permute(order)


def _conjugate(t: Tensor) -> Tensor:
    if t.dtype not in (torch.float32, torch.float64):
        return torch._neg_view(-t)
    return torch.complex(torch.zeros_like(t), -t).conj().imag


RIGHT: dict[str, Callable[[Tensor], Tensor]] = {
    "as it is": lambda t: t.clone(),
    "offset": _offset,
    "every other": _every_other,
    "part of a row": _part_of_a_row,
    "transposed": _transposed,
    "negative": lambda t: torch._neg_view(-t),
    "of conjugates": _conjugate,
    "wrapped": lambda t: Wrapped(t.clone()),
    "subclass": lambda t: t.clone().as_subclass(Named),
    "parameter": lambda t: torch.nn.Parameter(t.clone(), requires_grad=False),
    "inference": lambda t: _in_inference(t),
}
"""Numbers that a call has to read as they are."""


def _in_inference(t: Tensor) -> Tensor:
    with torch.inference_mode():
        return t.clone()


def _freed(t: Tensor) -> Tensor:
    shown = _offset(t)
    shown.untyped_storage().resize_(0)
    return shown


WRONG: dict[str, Callable[[Tensor], Any]] = {
    "freed": _freed,
    "meta": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse(),
    "list": lambda t: t.tolist(),
    "number": lambda t: 1.0,
    "bool": lambda t: t.bool(),
    "complex": lambda t: t.to(torch.complex64),
    "flat": lambda t: t.flatten() if t.dim() > 1 else t[None],
    "one more": lambda t: torch.cat([t, t[..., :1]], -1),
    "one more dimension": lambda t: t[None],
}
"""What has to be refused."""


def numbers(t: Tensor) -> Tensor:
    """A plain copy, of what is wrapped too."""
    inner = t.inner if isinstance(t, Wrapped) else t
    return inner.detach().as_subclass(Tensor).resolve_neg().clone(memory_format=torch.contiguous_format)
