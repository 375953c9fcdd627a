"""The weights and numbers of a block, as it hands them out to kernels.

    h <- h + mixer(norm h);   h <- h + down relu(up norm h)^2

Native code takes sizes and addresses on trust, and everything about a module can be changed. So each call asks the
blocks for their weights anew, and looks whether these fit each other and lie where they say.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

_LARGEST = 1e30
"""Number that is surely one of float32."""
_TYPES = (Tensor, nn.Parameter)

Size = tuple[int, ...]


class AttentionWeights(NamedTuple):
    """Causal attention whose q and k are normalised in each head.

    heads           H, each D = d / H wide
    q_eps, k_eps    of the norms of q and k
    qkv             [3 d,d]
    q_norm, k_norm  [D]
    out             [d,d]
    """

    heads: int
    q_eps: float
    k_eps: float
    qkv: Tensor
    q_norm: Tensor
    k_norm: Tensor
    out: Tensor

    def sizes(self) -> Size:
        """Whole numbers from 1 on."""
        return (self.heads,)

    def floats(self) -> tuple[float, ...]:
        """Numbers that may be anything."""
        return ()

    def eps(self) -> tuple[float, ...]:
        """Numbers from 0 on."""
        return (self.q_eps, self.k_eps)

    def inputs(self) -> list[Tensor]:
        """What is multiplied with norm h."""
        return [self.qkv]

    def shapes(self, d: int) -> list[Size] | None:
        """Sizes of the weights in their order for h of this width; None where sizes do not fit each other or it."""
        H = self.heads
        return None if d % H else [(3 * d, d), (d // H,), (d // H,), (d, d)]

    def carried(self, B: int, tokens: int) -> tuple[Size, Size]:
        """Shapes of the keys and values of so many tokens of B windows."""
        size = (B, self.heads, tokens, self.q_norm.shape[0])
        return size, size


class GatedDeltaWeights(NamedTuple):
    """Gated DeltaNet (arXiv 2412.06464); g = log sigmoid(a + decay_bias), beta = strength sigmoid(b), [a, b] = rates x.

    heads, value_heads      H, and HV, a multiple of it
    key_width, value_width  K and V of a head
    norm_eps                of the gated norm
    qkv                     [2 H K + HV V,d]
    gate                    [HV V,d]
    rates                   [2 HV,d]
    convolution             [2 H K + HV V,W] the token's own weight last
    norm                    [V]
    out                     [d,HV V]
    """

    heads: int
    value_heads: int
    key_width: int
    value_width: int
    decay_bias: float
    strength: float
    norm_eps: float
    qkv: Tensor
    gate: Tensor
    rates: Tensor
    convolution: Tensor
    norm: Tensor
    out: Tensor

    def sizes(self) -> Size:
        """Whole numbers from 1 on."""
        return self[:4]

    def floats(self) -> tuple[float, ...]:
        """Numbers that may be anything."""
        return (self.decay_bias, self.strength)

    def eps(self) -> tuple[float, ...]:
        """Numbers from 0 on."""
        return (self.norm_eps,)

    def inputs(self) -> list[Tensor]:
        """What is multiplied with norm h."""
        return [self.qkv, self.gate, self.rates]

    def shapes(self, d: int) -> list[Size] | None:
        """Sizes of the weights in their order for h of this width; None where sizes do not fit each other or it."""
        H, HV, K, V = self[:4]
        channels, values, W = 2 * H * K + HV * V, HV * V, self.convolution.shape[1:2]
        if HV % H or len(W) != 1 or 0 in W:
            return None
        return [(channels, d), (values, d), (2 * HV, d), (channels, *W), (V,), (d, values)]

    def carried(self, B: int, tokens: int) -> tuple[Size, Size]:
        """Shapes of the convolution's last inputs and of the fast weight of B windows."""
        channels, W = self.convolution.shape
        return (B, W - 1, channels), (B, self.value_heads, self.key_width, self.value_width)


Mixer = AttentionWeights | GatedDeltaWeights


class LayerWeights(NamedTuple):
    """All that a kernel reads of a block: [outputs, inputs] of products, and gains of norms.

    mixer                 of attention or of a recurrence
    mixer_eps, mlp_eps    of the norms before mixer and MLP
    mixer_norm, mlp_norm  [d]
    up, down              [hidden,d] and [d,hidden] of the MLP
    """

    mixer: Mixer
    mixer_eps: float
    mlp_eps: float
    mixer_norm: Tensor
    mlp_norm: Tensor
    up: Tensor
    down: Tensor

    @property
    def recurrent(self) -> bool:
        """Tells whether the layer carries a RecurrentState, else a KVState."""
        return type(self.mixer) is GatedDeltaWeights

    @property
    def width(self) -> int:
        """d of h."""
        return self.mixer_norm.shape[0]

    def numbers(self) -> tuple[Any, ...]:
        """What says, beside the weights, what the layer does."""
        mixer = self.mixer
        return (*mixer.sizes(), *mixer.floats(), *mixer.eps(), self.mixer_eps, self.mlp_eps)

    def tensors(self) -> tuple[Tensor, ...]:
        """All weights, the mixer's first."""
        first = _FIRST[type(self.mixer)]
        return (*self.mixer[first:], *self[_FIRST[LayerWeights] :])  # type: ignore[arg-type]

    def names(self) -> tuple[str, ...]:
        """The names of `tensors`, in their order."""
        first = _FIRST[type(self.mixer)]
        return (*self.mixer._fields[first:], *self._fields[_FIRST[LayerWeights] :])


_FIRST: dict[type, int] = {
    AttentionWeights: AttentionWeights._fields.index("qkv"),
    GatedDeltaWeights: GatedDeltaWeights._fields.index("qkv"),
    LayerWeights: LayerWeights._fields.index("mixer_norm"),
}
"""The index of the first weight; the numbers come before."""


@runtime_checkable
class Block(Protocol):
    """A block of a stack, a torch module: block(h, state) gives h and the state after it.

    A class whose instances can hand out their weights has a method `layer_weights` too; kernels then run them in the
    place of the module. The method counts where the class defines it, not on an instance.
    """

    @property
    def recurrent(self) -> bool:
        """Tells whether it carries a RecurrentState, else a KVState."""

    def __call__(self, h: Tensor, state: Any, /) -> tuple[Tensor, Any]:
        """h [B,L,d] and what it carries, None for nothing, to both after it."""


READ_OF_MODULES: dict[type, tuple[Callable[..., Any], frozenset[str]]] = {}
"""The classes of blocks whose `layer_weights` reads nothing but the dictionaries of the block and of the modules in it,
and of their classes what these names mean: by class, the method and the names."""


def layers_of(blocks: Sequence[Any], h: Tensor | None = None) -> tuple[LayerWeights, ...] | str:
    """What these blocks hand out, or the sentence why kernels cannot run them in the place of the modules.

    h: what they are to run on, whose type and device their weights must have. None: any.

    Raises:
        TypeError: a block hands out something else.
        ValueError: a weight whose memory was freed.
    """
    layers = []
    for block in blocks:
        hand_out: Callable[[Any], LayerWeights | str] | None = getattr(type(block), "layer_weights", None)
        if hand_out is None:
            return f"a {type(block).__name__} is not a HybridBlock of sleepkern.nn and hands out no layer weights"
        layer = hand_out(block)
        if isinstance(layer, str):
            return layer
        reason = _why_not(layer, block, h)
        if reason is not None:
            return reason
        layers.append(layer)
    return tuple(layers)


def readable(t: Tensor) -> bool:
    """Tells whether numbers lie at a tensor's address as they are.

    Raises:
        ValueError: there is no memory at all, which ends torch's own operators, too.
    """
    if type(t) not in _TYPES or t.layout is not torch.strided or t.is_neg():
        return False
    if t.data_ptr() == 0 and t.numel() and t.device.type != "meta":
        raise ValueError(f"got a tensor {list(t.shape)} whose memory was freed; expected one with its numbers")
    return True


def _why_not(layer: LayerWeights, block: Any, h: Tensor | None) -> str | None:
    if type(layer) is not LayerWeights or type(layer.mixer) not in (AttentionWeights, GatedDeltaWeights):
        found = type(layer.mixer if type(layer) is LayerWeights else layer).__name__
        raise TypeError(f"blocks: got a {found} out of a {type(block).__name__}'s layer_weights; expected LayerWeights")
    if block.recurrent is not layer.recurrent:
        return f"a {type(block).__name__} has recurrent = {block.recurrent} and weights of the other kind"
    tensors = layer.tensors()
    return _why_not_readable(tensors, h) or _why_not_fitting(layer, tensors)


def _why_not_readable(tensors: Sequence[Tensor], h: Tensor | None) -> str | None:
    for p in tensors:
        if not readable(p):
            return f"a {type(p).__name__} among the weights is not numbers at an address"
        if h is not None and (p.device != h.device or p.dtype != h.dtype):
            return f"weights are {p.dtype} on {p.device}, h is {h.dtype} on {h.device}"
        if p.is_inference():
            return "weights made in inference mode do not say when they change"
        if p._backward_hooks:
            return "a weight has hooks, which want to be called once"
    return None


def _why_not_fitting(layer: LayerWeights, tensors: Sequence[Tensor]) -> str | None:
    mixer = layer.mixer
    sizes = mixer.sizes()
    if not all(type(n) is int and n > 0 for n in sizes):
        return f"a mixer's heads and widths are {sizes}, which are not all whole numbers from 1 on"
    eps = (*mixer.eps(), layer.mixer_eps, layer.mlp_eps)
    if not all(type(x) in (float, int) and abs(x) <= _LARGEST for x in (*mixer.floats(), *eps)) or min(eps) < 0:
        return f"a block has the numbers {layer.numbers()}, which are not all those of its kind"
    d, hidden = layer.mixer_norm.numel(), layer.up.shape[:1]
    own = mixer.shapes(d)
    if own is None:
        return f"a mixer's heads and widths, {sizes}, do not fit each other, its convolution or the width of h"
    expected = [*own, (d,), (d,), (*hidden, d), (d, *hidden)]
    shapes = [t.shape for t in tensors]
    if shapes != expected or 0 in layer.up.shape:
        named = zip(layer.names(), shapes, expected, strict=True)
        wrong: dict[str, Any] = {name: (list(is_), list(should)) for name, is_, should in named if is_ != should}
        sizes_found = wrong or {"up": list(layer.up.shape)}
        return f"sizes of weights do not fit each other: {sizes_found} (are, and by the others would be)"
    return None
