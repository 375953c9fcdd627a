"""What only addresses can tell of tensors that native code reads and writes: whether they have memory, and whose."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .eager import increment_version

_LOW = 2**40
"""Freed storages put their tensors below; some systems put others there as well, which then take a closer look."""


def check_memory(names: Sequence[str], tensors: Sequence[Tensor | None]) -> None:
    """Refuse what has a shape and no numbers: a wrapper around another tensor, or a storage that was freed.

    Raises:
        ValueError: names the argument.
    """
    for name, t in zip(names, tensors, strict=True):
        if t is not None and t.data_ptr() < _LOW and t.numel() and _has_no_memory(t):
            raise ValueError(
                f"{name}: got a tensor without memory {list(t.shape)}; expected numbers, not a storage that was freed "
                "or a wrapper of another tensor"
            )


def check_writable(name: str, t: Tensor) -> None:
    """Refuse a tensor that torch does not let anyone update in place here.

    Raises:
        ValueError: it was made in inference mode and is written to outside.
    """
    if t.is_inference() and not torch.is_inference_mode_enabled():
        raise ValueError(
            f"{name}: got a tensor made in torch.inference_mode; expected one that may be updated in place here"
        )


def check_written(name: str, t: Tensor, names: Sequence[str], read: Sequence[Tensor | None]) -> None:
    """Refuse a tensor that is about to be updated in place while its memory is read by another name.

    Raises:
        ValueError: it overlaps one of `read` or itself, or was made in inference mode and is written to outside.
    """
    check_writable(name, t)
    if not t.numel():
        return
    begin, end = _range(t)
    if not t.is_contiguous() and _overlaps_itself(t):
        raise ValueError(
            f"{name}: got strides {list(t.stride())} of shape {list(t.shape)}, by which its numbers overlap; expected "
            "each in a place of its own, for it is updated in place"
        )
    for other, r in zip(names, read, strict=True):
        if r is None or (first := r.data_ptr()) >= end or first + r.nbytes <= begin and r.is_contiguous():
            continue
        if r.numel() and _range(r)[1] > begin and _share(t, r):
            raise ValueError(
                f"{name}: got memory that {other} lies in as well; expected its own, for it is updated in place"
            )


def mark_written(t: Tensor) -> None:
    """Tell autograd of an update in place that torch did not make."""
    increment_version((t,))


def _has_no_memory(t: Tensor) -> bool:
    return not t.is_meta and (t.data_ptr() == 0 or t.untyped_storage().nbytes() == 0)


def _range(t: Tensor) -> tuple[int, int]:
    """First byte, and the one behind the last, of a tensor that is not empty."""
    begin = t.data_ptr()
    if t.is_contiguous():
        return begin, begin + t.nbytes
    last = 0
    for n, stride in zip(t.shape, t.stride(), strict=True):
        last += (n - 1) * stride
    return begin, begin + (last + 1) * t.element_size()


def _overlaps_itself(t: Tensor) -> bool:
    reach = 0
    for stride, n in sorted(zip(t.stride(), t.shape, strict=True)):
        if n > 1 and stride <= reach:
            return int(_marked(t, t).sum()) < t.nbytes
        reach += (n - 1) * stride
    return False


def _share(a: Tensor, b: Tensor) -> bool:
    """Tells whether tensors whose ranges meet have a byte in common."""
    return bool(_bytes_of(b, _marked(a, b), min(a.data_ptr(), b.data_ptr())).any())


def _marked(a: Tensor, b: Tensor) -> Tensor:
    """One number for each byte from the first of both to the last, 1 where a lies."""
    begin, end = min(a.data_ptr(), b.data_ptr()), max(_range(a)[1], _range(b)[1])
    marks = torch.zeros(end - begin, dtype=torch.uint8, device="cpu")
    _bytes_of(a, marks, begin).fill_(1)
    return marks


def _bytes_of(t: Tensor, marks: Tensor, begin: int) -> Tensor:
    size = t.element_size()
    return marks.as_strided((*t.shape, size), (*(size * s for s in t.stride()), 1), t.data_ptr() - begin)
