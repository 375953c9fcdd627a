"""The attention that the blocks of a model run: what `SleepSession.explain` says of it."""

from __future__ import annotations

from torch import nn

from ..nn.attention import RELEASES, capability_of, explain_attention, installed
from ..nn.window_attention import WindowAttention


def attention_of(model: object) -> str | None:
    """One line on the attention of a model, None where the model does not say.

    Models of transformers say it as `attn_implementation`; layers of sleepkern.nn choose by themselves.
    """
    implementation = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if isinstance(implementation, str):
        return f"transformers' {implementation}{_packages(implementation)}"
    layers = model.modules() if isinstance(model, nn.Module) else ()
    layer = next((x for x in layers if isinstance(x, WindowAttention)), None)
    if layer is None:
        return None
    weight = layer.qkv.weight
    return explain_attention(weight.dtype, weight.shape[1] // layer.heads, capability_of(weight.device))


def _packages(implementation: str) -> str:
    """The installed packages that have these functions, for an implementation by flash-attn."""
    if not implementation.startswith("flash_attention"):
        return ""
    found = [f"{r.package} {version}" for r in RELEASES if (version := installed(r.package)) is not None]
    return f" ({', '.join(found) or 'no flash-attn is installed'})"
