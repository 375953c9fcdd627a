"""Options that several commands share: the sizes of a call of one's own, its rules and its types, and their checks."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Annotated

import torch
import typer

from ..testing import Shape, type_name
from ..testing.verify import DTYPES

TYPES = {type_name(dtype): dtype for dtype in DTYPES}

Batch = Annotated[int | None, typer.Option("--B", metavar="N", help="sequences of a call of one's own")]
Tokens = Annotated[int | None, typer.Option("--T", metavar="N", help="its tokens")]
ManyTokens = Annotated[
    list[int] | None, typer.Option("--T", metavar="N", help="its tokens, or those of a prompt; may be repeated")
]
KeyHeads = Annotated[int | None, typer.Option("--H", metavar="N", help="its key heads")]
ValueHeads = Annotated[int | None, typer.Option("--HV", metavar="N", help="its value heads, a multiple of H")]
KeyWidth = Annotated[int | None, typer.Option("--K", metavar="N", help="its key width")]
ValueWidth = Annotated[int | None, typer.Option("--V", metavar="N", help="its value width")]


def one_of(option: str, values: Iterable[str], known: Iterable[str]) -> None:
    """A usage error of `option` for the first of `values` that is not in `known`."""
    known = list(known)
    for value in values:
        if value not in known:
            raise typer.BadParameter(f"got {value!r}; expected one of {', '.join(known)}", param_hint=option)


def own_shape(sizes: dict[str, int | None], usual: Shape) -> Shape:
    """The shape of the sizes that were given, B, T, H, HV, K and V; the others are those of `usual`, and HV is H."""
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise typer.BadParameter(f"got {size}; expected at least 1", param_hint=f"--{name}")
    given = {name: size for name, size in sizes.items() if size is not None}
    H = given.get("H", usual.H)
    HV = given.get("HV", H)
    if HV % H:
        raise typer.BadParameter(f"got {HV}; expected a multiple of H = {H}", param_hint="--HV")
    rest = {name: given.get(name, getattr(usual, name)) for name in ("B", "T", "K", "V")}
    return Shape(H=H, HV=HV, **rest)


def fits_memory(needed: int, shape: Shape, what: str) -> None:
    """A usage error unless `needed` bytes fit into the memory of this machine; `what` takes them."""
    size = f"B={shape.B} T={shape.T} H={shape.H} HV={shape.HV} K={shape.K} V={shape.V}"
    refuse_too_large(needed, f"{size}, for which {what}", "a call", "--T")


def refuse_too_large(needed: int, got: str, expected: str, option: str, device: str = "cpu") -> None:
    """A usage error of `option` unless `needed` bytes fit into the memory of this machine, or of its GPU.

    Args:
        needed: bytes.
        got: what was given and what takes the bytes, e.g. "T=9, for which the call takes".
        expected: what should fit, e.g. "a call".
        option: the option that is wrong.
        device: cpu or cuda.
    """
    present = _memory_of(device)
    if present is not None and needed > present:
        raise typer.BadParameter(
            f"got {got} about {needed / 1e9:.0f} GB; "
            f"expected {expected} that fits into the {present / 1e9:.0f} GB of this machine",
            param_hint=option,
        )


def _memory_of(device: str) -> int | None:
    if torch.device(device).type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None
