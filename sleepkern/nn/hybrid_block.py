"""A block: mixer and MLP, each behind a norm, each added to the residual stream."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..problems.layer_weights import READ_OF_MODULES, AttentionWeights, GatedDeltaWeights, LayerWeights
from .gated_delta_net import GatedDeltaNet
from .gated_rms_norm import GatedRMSNorm
from .padding import without_padding
from .short_convolution import ShortConvolution
from .sizes import whole_numbers
from .unmodified import Parts, is_tuple_of_ints, why_not_as_made
from .window_attention import WindowAttention

_EPS: float = torch.finfo(torch.float32).eps
"""Eps of a norm that leaves the choice to torch."""


class MLP(nn.Module):
    """out relu(up x)^2.

    Args:
        width: d of the residual stream.
        factor: the inner width over d.

    Raises:
        TypeError, ValueError: a size that is not a whole number from 1 on.
    """

    up: nn.Linear
    out: nn.Linear

    def __init__(self, width: int, factor: int = 4) -> None:
        super().__init__()
        whole_numbers(width=width, factor=factor)
        self.up = nn.Linear(width, factor * width, bias=False)
        self.out = nn.Linear(factor * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[...,width] to the same."""
        return self.out(F.relu(self.up(x)).square())  # type: ignore[no-any-return]


class HybridBlock(nn.Module):
    """h <- h + mixer(norm h); h <- h + MLP(norm h).

    Args:
        width: d of the residual stream.
        mixer: a GatedDeltaNet or WindowAttention of the same width.
        factor: the inner width of the MLP over d.

    Raises:
        TypeError, ValueError: a size that is not a whole number from 1 on.
    """

    mixer_norm: nn.RMSNorm
    mixer: GatedDeltaNet | WindowAttention
    mlp_norm: nn.RMSNorm
    mlp: MLP

    def __init__(self, width: int, mixer: GatedDeltaNet | WindowAttention, factor: int = 4) -> None:
        super().__init__()
        self.mixer_norm, self.mixer = nn.RMSNorm(width), mixer
        self.mlp_norm, self.mlp = nn.RMSNorm(width), MLP(width, factor)

    @property
    def recurrent(self) -> bool:
        """Tells whether its memory is a fast weight; attention's is keys and values."""
        return isinstance(self.mixer, GatedDeltaNet)

    def forward(
        self, h: Tensor, before: Any = None, mask: Tensor | None = None, replays: int = 1
    ) -> tuple[Tensor, Any]:
        """h [B,T,d] and the mixer's memory to both after it; replays: passes of a recurrence over the same input.

        mask: as the mixer takes it; what is padding counts as 0.
        """
        if mask is not None:  # nan in padding would reach the gradients of the norms
            h = without_padding(h, mask, 0 if before is None or self.recurrent else before.keys.shape[2])
        options = {"replays": replays} if self.recurrent else {}
        mixed, after = self.mixer(self.mixer_norm(h), before, mask, **options)
        h = h + mixed
        return h + self.mlp(self.mlp_norm(h)), after

    def layer_weights(self) -> LayerWeights | str:
        """What kernels read of this block, or the sentence why that does not say all of what it does."""
        if type(self) is not HybridBlock:
            return f"a {type(self).__name__} is not a HybridBlock of sleepkern.nn"
        reason = why_not_as_made(self, _PARTS)
        if reason is not None:
            return reason
        own: Any = self._modules
        mixer_norm, mlp_norm, mlp = own["mixer_norm"], own["mlp_norm"], own["mlp"]._modules
        mixer = _attention(own["mixer"]) if type(own["mixer"]) is WindowAttention else _gated_delta(own["mixer"])
        if isinstance(mixer, str):
            return mixer
        if not _of_its_weight(mixer_norm) or not _of_its_weight(mlp_norm):
            return _OTHER_SIZES
        norms, products = (_weight(mixer_norm), _weight(mlp_norm)), (_weight(mlp["up"]), _weight(mlp["out"]))
        return LayerWeights(mixer, _eps(mixer_norm), _eps(mlp_norm), *norms, *products)


_OTHER_SIZES = "a norm is over other sizes than those of its weights"
_NORM, _LINEAR = (nn.RMSNorm,), (nn.Linear,)
_PARTS: Parts = {
    HybridBlock: {"mixer_norm": _NORM, "mixer": (GatedDeltaNet, WindowAttention), "mlp_norm": _NORM, "mlp": (MLP,)},
    MLP: {"up": _LINEAR, "out": _LINEAR},
    WindowAttention: {"qkv": _LINEAR, "q_norm": _NORM, "k_norm": _NORM, "out": _LINEAR},
    GatedDeltaNet: {
        "qkv": _LINEAR, "gate": _LINEAR, "rates": _LINEAR, "convolution": (ShortConvolution,),
        "norm": (GatedRMSNorm,), "out": _LINEAR,
    },
    **{kind: {} for kind in (nn.Linear, nn.RMSNorm, ShortConvolution, GatedRMSNorm)},
}  # fmt: skip


_READ = frozenset({
    "layer_weights", "recurrent", "forward", "heads", "value_heads", "key_width", "value_width", "split", "decay_bias",
    "strength", "eps", "normalized_shape", "_modules", "_parameters", "__dict__", "__getattribute__",
})  # fmt: skip
"""The names that `layer_weights` reads of the block and of the modules in it."""
READ_OF_MODULES[HybridBlock] = (HybridBlock.layer_weights, _READ)


def _attention(m: Any) -> AttentionWeights | str:
    """The weights of a WindowAttention that nobody has modified."""
    parts = m._modules
    q_norm, k_norm = parts["q_norm"], parts["k_norm"]
    if not _of_its_weight(q_norm) or not _of_its_weight(k_norm):
        return _OTHER_SIZES
    weights = (_weight(parts["qkv"]), _weight(q_norm), _weight(k_norm), _weight(parts["out"]))
    return AttentionWeights(m.heads, _eps(q_norm), _eps(k_norm), *weights)


def _gated_delta(m: Any) -> GatedDeltaWeights | str:
    """The weights of a GatedDeltaNet that nobody has modified."""
    parts = m._modules
    sizes = H, HV, K, V = m.heads, m.value_heads, m.key_width, m.value_width
    if not all(type(n) is int for n in sizes) or not is_tuple_of_ints(m.split, (H * K, H * K, HV * V)):
        return f"a mixer's heads and widths, {sizes}, do not fit each other or its split {m.split}"
    return GatedDeltaWeights(
        *sizes, m.decay_bias, m.strength, parts["norm"].eps,
        _weight(parts["qkv"]), _weight(parts["gate"]), _weight(parts["rates"]), _weight(parts["convolution"]),
        _weight(parts["norm"]), _weight(parts["out"]),
    )  # fmt: skip


def _weight(leaf: Any) -> Tensor:
    return leaf._parameters["weight"]  # type: ignore[no-any-return]


def _eps(norm: Any) -> float:
    return _EPS if norm.eps is None else norm.eps  # type: ignore[no-any-return]


def _of_its_weight(norm: Any) -> bool:
    """Tells whether a norm is over as many numbers as it has gains."""
    return is_tuple_of_ints(norm.normalized_shape, _weight(norm).shape)
