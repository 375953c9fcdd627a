"""Causal attention, by flash-attn on a GPU where a release of it is installed, else by torch.

    o_i = sum_j softmax_j(q_i . k_j / sqrt(D)) v_j,   j <= i + S - T

T queries are the last of S tokens, so the last query sees every key. flash-attn aligns its causal mask in the same way
since 2.1; torch's `is_causal` does so only for T = S.

Two packages have flash-attn's functions, and both install into `flash_attn`: flash-attn (2.x, compiled) and
flash-attn-4 (CuTe, `flash_attn.cute`). The names of the installed packages say which functions there are.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

TORCH = "torch's scaled_dot_product_attention"


class Release(NamedTuple):
    """A package with flash-attn's functions.

    package  its name in an index of packages
    first    the first version whose causal mask is aligned to the last key
    devices  major compute capabilities that it is made for
    graphs   whether torch.compile takes its functions into a graph
    """

    package: str
    first: tuple[int, ...]
    devices: tuple[int, ...]
    graphs: bool


FLASH_4 = Release("flash-attn-4", (4,), (9, 10, 11), graphs=False)
FLASH_2 = Release("flash-attn", (2, 1), (8, 9, 10, 12), graphs=True)
RELEASES = (FLASH_4, FLASH_2)
"""Best first."""
WIDEST = {9: 256}
"""The widest head of flash-attn-4, by major compute capability."""


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention [B,H,T,D] of queries [B,H,T,D] to keys and values [B,H,S,D], S >= T.

    mask [B,S] has 0 for padding, which nobody sees; the output is v there.
    """
    dtype = _product_type(q)
    release = release_for(dtype, q.shape[-1], capability_of(q.device))
    if release is not None:
        return _by_flash(release, q.to(dtype), k.to(dtype), v.to(dtype), mask)
    T, S = q.shape[2], k.shape[2]
    if mask is None and S == T:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    seen = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    if mask is not None:
        diagonal = torch.eye(T, S, dtype=torch.bool, device=q.device).roll(S - T, 1)  # a row of padding sees itself
        seen = (seen & mask[:, None, None, :].bool()) | diagonal
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)


def explain_attention(dtype: torch.dtype, width: int, capability: tuple[int, int] | None) -> str:
    """One line on the attention that such a call takes, and why not flash-attn.

    Args:
        dtype: type of q, k and v.
        width: elements of a head.
        capability: compute capability of the device, None for another device than a GPU.
    """
    release = release_for(dtype, width, capability)
    if release is not None:
        return f"{release.package} {installed(release.package)}"
    if capability is None:
        return f"{TORCH} (flash-attn runs on a GPU)"
    reasons = [f"{r.package}: {why_not(r, dtype, width, capability)}" for r in RELEASES]
    return f"{TORCH} ({'; '.join(reasons)})"


def release_for(dtype: torch.dtype, width: int, capability: tuple[int, int] | None) -> Release | None:
    """The best installed release that takes such a call, None where torch has to."""
    if capability is None:
        return None
    return next((release for release in RELEASES if why_not(release, dtype, width, capability) is None), None)


def why_not(release: Release, dtype: torch.dtype, width: int, capability: tuple[int, int]) -> str | None:
    """None, or the reason why a release cannot take a call."""
    version = installed(release.package)
    if version is None:
        return "not installed"
    if _numbers(version) < release.first:
        return f"{version} is older than {'.'.join(map(str, release.first))}"
    if capability[0] not in release.devices:
        return f"not made for compute capability {capability[0]}.{capability[1]}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"takes bfloat16 and float16, not {dtype}"
    widest = 256 if release is FLASH_2 else WIDEST.get(capability[0], 128)
    if width % 8 or width > widest:
        return f"takes heads of multiples of 8 up to {widest}, not of {width}"
    if not release.graphs and torch.compiler.is_compiling():
        return "torch.compile does not take it into a graph"
    return None


@lru_cache(maxsize=8)
def installed(package: str) -> str | None:
    """The version of an installed package, None without it."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def capability_of(device: torch.device) -> tuple[int, int] | None:
    """The compute capability of a GPU, None for another device."""
    return _capability(device.index) if device.type == "cuda" else None


@lru_cache(maxsize=64)
def _capability(index: int | None) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def _product_type(q: Tensor) -> torch.dtype:
    """The type in which torch would multiply q: under autocast norms return float32, and products do not take it."""
    device = q.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return q.dtype


def _by_flash(release: Release, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """The same as `attend` by functions that take [B,T,H,D], or tokens of several sequences one after the other."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    attend_rows, attend_packed = _functions(release)
    if mask is None:
        return _output(attend_rows(q, k, v, causal=True)).transpose(1, 2)
    T, S = q.shape[1], k.shape[1]
    queries, keys = _Tokens(mask[:, S - T :]), _Tokens(mask)
    out = attend_packed(
        queries.packed(q), keys.packed(k), keys.packed(v), cu_seqlens_q=queries.offsets, cu_seqlens_k=keys.offsets,
        max_seqlen_q=T, max_seqlen_k=S, causal=True,
    )  # fmt: skip
    out = queries.unpacked(_output(out))
    return torch.where(queries.real[..., None, None], out, v[:, S - T :]).transpose(1, 2)


class _Tokens:
    """Tokens of rows [B,T], of which some are padding, as packed sequences; nothing here waits for the device.

    A packed tensor keeps its B T rows: real tokens come first, rows after them are 0, in gradients as well, because
    flash-attn leaves there what memory held.
    """

    def __init__(self, mask: Tensor) -> None:
        self.real = mask != 0
        flat = self.real.flatten()
        self.order = (~flat).to(torch.uint8).argsort(stable=True)
        self.offsets = F.pad(self.real.sum(1).cumsum(0), (1, 0)).to(torch.int32)
        self._rest = torch.arange(flat.numel(), dtype=torch.int64, device=flat.device) >= self.offsets[-1]

    def packed(self, x: Tensor) -> Tensor:
        """[B T,H,D] of x [B,T,H,D]."""
        return x.flatten(0, 1)[self.order].masked_fill(self._rest[:, None, None], 0)

    def unpacked(self, x: Tensor) -> Tensor:
        """[B,T,H,D] of packed x [B T,H,D], 0 at padding."""
        x = x.masked_fill(self._rest[:, None, None], 0)
        rows: Tensor = x[self.order.argsort()].unflatten(0, self.real.shape)
        return rows


def _functions(release: Release) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The functions for rows of one length and for packed sequences."""
    if release is FLASH_4:
        from flash_attn.cute import flash_attn_func, flash_attn_varlen_func
    else:
        from flash_attn import flash_attn_func, flash_attn_varlen_func
    return flash_attn_func, flash_attn_varlen_func


def _output(out: Any) -> Tensor:
    """The output itself; flash-attn-4 returns it with the logarithms of the softmax's sums."""
    found: Tensor = out[0] if isinstance(out, tuple) else out
    return found


def _numbers(version: str) -> tuple[int, ...]:
    """(2, 8) of "2.8.3.post1"."""
    return tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
