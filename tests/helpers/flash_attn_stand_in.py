"""A package `flash_attn` that computes what flash-attn documents, in float32 on any device.

Shapes [B,T,H,D] and [total,H,D]; fewer key heads than query heads; softmax_scale, default D^-1/2; causal and
window_size aligned to the last key; offsets in int32; rows behind the last offset hold NaN, in gradients as well,
because flash-attn promises nothing of them. The stand-in refuses the types, shapes and layouts that flash-attn refuses.
"""

from __future__ import annotations

import importlib.machinery
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

Window = tuple[int | None, int | None]


class Calls:
    """What was called: the name of each function, and the sizes it got."""

    def __init__(self) -> None:
        self.made: list[tuple[str, int, int]] = []


class _Garbage(torch.autograd.Function):
    """x with NaN in the rows from `start` on, in the gradient too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, start: int) -> Tensor:
        ctx.start = start
        return _spoilt(x, start)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _spoilt(gradients[0], ctx.start), None


def _spoilt(x: Tensor, start: int) -> Tensor:
    x = x.clone()
    x[start:] = float("nan")
    return x


def one_sequence(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, window: Window) -> Tensor:
    """[T,H,D] of q [T,H,D], k and v [S,HK,D]; window: keys to the left and to the right of a query's own."""
    T, S, groups = q.shape[0], k.shape[0], q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1).float() for x in (k, v))
    scores = scale * torch.einsum("thd,shd->hts", q.float(), k)
    away = torch.arange(S)[None] - (torch.arange(T)[:, None] + S - T)  # 0 at a query's own key
    left, right = (None if x is None or x < 0 else x for x in window)
    hidden = torch.zeros(T, S, dtype=torch.bool)
    if causal:
        hidden |= away > 0
    if left is not None:
        hidden |= away < -left
    if right is not None and not causal:
        hidden |= away > right
    weights = scores.masked_fill(hidden, -float("inf")).softmax(-1).nan_to_num(0.0)  # a query that sees no key gets 0
    return torch.einsum("hts,shd->thd", weights, v).to(q.dtype)


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    assert q.dtype in (torch.bfloat16, torch.float16) and q.dtype == k.dtype == v.dtype, (q.dtype, k.dtype, v.dtype)
    assert q.shape[-1] <= 256 and q.shape[-1] % 8 == 0 and q.shape[-2] % k.shape[-2] == 0 and k.shape == v.shape
    assert all(x.stride(-1) == 1 for x in (q, k, v)), "the elements of a head have to be side by side"


def functions(calls: Calls, version: int) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """flash_attn_func and flash_attn_varlen_func; those of version 4 return a pair and have no dropout."""
    name = f"flash-attn {version}"

    def result(out: Tensor) -> Any:
        return out if version == 2 else (out, None)

    def rows(q: Tensor, k: Tensor, v: Tensor, causal: bool, softmax_scale: float | None, window_size: Window) -> Any:
        _check(q, k, v)
        assert q.ndim == k.ndim == 4 and q.shape[0] == k.shape[0]
        calls.made.append((name, q.shape[1], k.shape[1]))
        scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
        parts = [one_sequence(*x, scale, causal, window_size) for x in zip(q, k, v, strict=True)]
        return result(torch.stack(parts))

    def packed(
        q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
        max_seqlen_k: int, causal: bool, softmax_scale: float | None, window_size: Window,
    ) -> Any:  # fmt: skip
        _check(q, k, v)
        assert q.ndim == k.ndim == 3 and cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        at, to = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
        assert at[0] == to[0] == 0 and at[-1] <= len(q) and to[-1] <= len(k)
        assert max(b - a for a, b in zip(at, at[1:], strict=False)) <= max_seqlen_q
        assert max(b - a for a, b in zip(to, to[1:], strict=False)) <= max_seqlen_k
        calls.made.append((f"{name} packed", at[-1], to[-1]))
        scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
        q, k, v = _Garbage.apply(q, at[-1]), _Garbage.apply(k, to[-1]), _Garbage.apply(v, to[-1])
        parts = [
            one_sequence(q[a:b], k[c:d], v[c:d], scale, causal, window_size)
            for a, b, c, d in zip(at, at[1:], to, to[1:], strict=False)
        ]
        return result(torch.cat([*parts, q[at[-1] :]]))

    if version == 2:

        def flash_attn_func(
            q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None,
            causal: bool = False, window_size: Window = (-1, -1), deterministic: bool = False,
        ) -> Any:  # fmt: skip
            return rows(q, k, v, causal, softmax_scale, window_size)

        def flash_attn_varlen_func(
            q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
            max_seqlen_k: int, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
            window_size: Window = (-1, -1), deterministic: bool = False,
        ) -> Any:  # fmt: skip
            return packed(
                q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, softmax_scale, window_size
            )

        return flash_attn_func, flash_attn_varlen_func

    def flash_attn_func_4(
        q: Tensor, k: Tensor, v: Tensor, qv: None = None, gather_kv_indices: None = None,
        softmax_scale: float | None = None, causal: bool = False, window_size: Window = (None, None),
        deterministic: bool = False,
    ) -> Any:  # fmt: skip
        return rows(q, k, v, causal, softmax_scale, window_size)

    def flash_attn_varlen_func_4(
        q: Tensor, k: Tensor, v: Tensor, qv: None = None, cu_seqlens_q: Any = None, cu_seqlens_k: Any = None,
        max_seqlen_q: Any = None, max_seqlen_k: Any = None, softmax_scale: float | None = None, causal: bool = False,
        window_size: Window = (None, None), deterministic: bool = False,
    ) -> Any:  # fmt: skip
        return packed(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, softmax_scale, window_size
        )

    return flash_attn_func_4, flash_attn_varlen_func_4


def unpad_input(x: Tensor, mask: Tensor, unused: Tensor | None = None) -> tuple[Any, ...]:
    """The tokens of x [B,T,...] where mask [B,T] is not 0, their positions, offsets, the longest row, their counts."""
    counts = mask.sum(-1, dtype=torch.int32)
    index = mask.flatten().nonzero().flatten()
    offsets = torch.nn.functional.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))
    return x.flatten(0, 1)[index], index, offsets, int(counts.max()), counts


def pad_input(x: Tensor, index: Tensor, batch: int, length: int) -> Tensor:
    """[B,T,...] of the tokens that `unpad_input` took, 0 elsewhere."""
    out = x.new_zeros(batch * length, *x.shape[1:])
    out[index] = x
    return out.unflatten(0, (batch, length))


def install(monkeypatch: pytest.MonkeyPatch, version: int) -> Calls:
    """Put the stand-in of flash-attn 2 or flash-attn-4 where `import flash_attn` finds it; both import there."""
    calls = Calls()
    attend, attend_packed = functions(calls, version)
    parts: dict[str, ModuleType] = {name: ModuleType(name) for name in ("flash_attn", "flash_attn.cute")}
    padding = ModuleType("flash_attn.bert_padding")
    padding.pad_input, padding.unpad_input = pad_input, unpad_input  # type: ignore[attr-defined]
    holder = parts["flash_attn" if version == 2 else "flash_attn.cute"]
    holder.flash_attn_func, holder.flash_attn_varlen_func = attend, attend_packed  # type: ignore[attr-defined]
    if version == 2:
        parts["flash_attn"].flash_attn_with_kvcache = None  # type: ignore[attr-defined]
    parts["flash_attn"].cute = parts["flash_attn.cute"]  # type: ignore[attr-defined]
    for name, module in {**parts, "flash_attn.bert_padding": padding}.items():
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    return calls
