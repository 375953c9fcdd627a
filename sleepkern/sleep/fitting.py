"""Whether a block is as sleepkern.nn made it, and whether its parts fit each other.

Native code takes sizes and addresses on trust, and everything about a module can be changed. What does not fit runs
module by module, where torch computes it, or says what is wrong. All of this is asked at every call, so it reads the
dictionaries of modules: `__getattr__` of torch's would take most of the time.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from ..nn import HybridBlock

_FORWARD: dict[type, Any] = {kind: kind.forward for kind in (nn.Linear, nn.RMSNorm)}
"""Tools that watch or quantise a model put others in their place."""
_LARGEST = 1e30
"""Number that is surely one of float32."""
_TYPES = (Tensor, nn.Parameter)


class Numbers(NamedTuple):
    """What says, beside the weights, what a block does.

    sizes   heads, and of gated DeltaNet value heads and the widths of keys and values
    floats  of gated DeltaNet what is added to the decay, and the largest strength
    eps     of the norms, None for torch's own choice
    split   of gated DeltaNet channels of q, k and v
    """

    sizes: tuple[Any, ...]
    floats: tuple[Any, ...]
    eps: tuple[Any, ...]
    split: Any


def why_not(block: HybridBlock, h: Tensor) -> str | None:
    """None where weights and numbers say all of what a block does to an h like this, else the sentence why not."""
    from .. import nn as ours

    if type(block) is not ours.HybridBlock:
        return f"a {type(block).__name__} is not a HybridBlock of sleepkern.nn"
    reason = _why_not_ours(block)
    if reason is not None:
        return reason
    weights = _weights(block)
    return _why_not_fitting(block, weights) or _why_not_readable(weights, h)


def weights_of(block: HybridBlock) -> list[Tensor]:
    """All of them, of a block for which there is no `why_not`."""
    return list(_weights(block).values())


def numbers_of(block: HybridBlock) -> Numbers:
    """Of a block whose modules are ours."""
    own: Any = block._modules
    mixer, parts = own["mixer"], own["mixer"]._modules
    eps = (own["mixer_norm"].eps, own["mlp_norm"].eps)
    if "q_norm" in parts:
        return Numbers((mixer.heads,), (), (*eps, parts["q_norm"].eps, parts["k_norm"].eps), None)
    sizes = (mixer.heads, mixer.value_heads, mixer.key_width, mixer.value_width)
    return Numbers(sizes, (mixer.decay_bias, mixer.strength), (*eps, parts["norm"].eps), mixer.split)


def readable(t: Tensor) -> bool:
    """Whether numbers lie at a tensor's address as they are.

    Raises:
        ValueError: there is no memory at all, which ends torch's own operators, too.
    """
    if type(t) not in _TYPES or t.layout is not torch.strided or t.is_neg():
        return False
    if t.data_ptr() == 0 and t.numel() and t.device.type != "meta":
        raise ValueError(f"got a tensor {list(t.shape)} whose memory was freed; expected one with its numbers")
    return True


@lru_cache(maxsize=1)
def _kinds() -> dict[type, dict[str, tuple[type, ...]]]:
    """What a block is made of; what has no parts has a weight."""
    from .. import nn as ours

    norm, linear = (nn.RMSNorm,), (nn.Linear,)
    mixers = (ours.GatedDeltaNet, ours.WindowAttention)
    return {
        ours.HybridBlock: {"mixer_norm": norm, "mixer": mixers, "mlp_norm": norm, "mlp": (ours.MLP,)},
        ours.MLP: {"up": linear, "out": linear},
        ours.WindowAttention: {"qkv": linear, "q_norm": norm, "k_norm": norm, "out": linear},
        ours.GatedDeltaNet: {
            "qkv": linear, "gate": linear, "rates": linear, "convolution": (ours.ShortConvolution,),
            "norm": (ours.GatedRMSNorm,), "out": linear,
        },
        **{kind: {} for kind in (nn.Linear, nn.RMSNorm, ours.ShortConvolution, ours.GatedRMSNorm)},
    }  # fmt: skip


def _why_not_ours(block: nn.Module) -> str | None:
    kinds, modules = _kinds(), [block]
    for m in modules:
        own, kind = m.__dict__, type(m)
        parts, inside, given = kinds[kind], own["_modules"], own["_parameters"]
        for name, allowed in parts.items():
            if type(inside.get(name)) not in allowed:
                return _not_as_made(type(inside.get(name)))
        if own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]:
            return "a module has hooks, which want to be called"
        for name, p in given.items():
            if (p is None) is (name == "weight"):
                return _not_as_made(kind)
        if len(inside) != len(parts) or own["_buffers"] or "forward" in own or "_recur" in own:
            return _not_as_made(kind)
        if (not parts and "weight" not in given) or _FORWARD.get(kind, kind.forward) is not kind.forward:
            return _not_as_made(kind)
        modules += inside.values()
    return None


def _not_as_made(kind: type) -> str:
    return f"a {kind.__name__} in a block is not as sleepkern.nn made it"


def _weights(block: HybridBlock) -> dict[str, Any]:
    own: Any = block._modules
    mlp, leaves = own["mlp"]._modules, {**own["mixer"]._modules}
    leaves |= {"mixer_norm": own["mixer_norm"], "mlp_norm": own["mlp_norm"], "up": mlp["up"], "down": mlp["out"]}
    return {name: leaf._parameters["weight"] for name, leaf in leaves.items()}


def _why_not_fitting(block: HybridBlock, weights: dict[str, Any]) -> str | None:
    numbers = numbers_of(block)
    if not all(type(n) is int and n > 0 for n in numbers.sizes):
        return f"a mixer's heads and widths are {numbers.sizes}, which are not all whole numbers from 1 on"
    eps = [0.0 if x is None else x for x in numbers.eps]
    if "norm" in weights and numbers.eps[-1] is None:
        return "a gated norm has no eps"
    if not all(type(x) in (float, int) and abs(x) <= _LARGEST for x in (*numbers.floats, *eps)) or min(eps) < 0:
        return f"a block has the numbers {numbers}, which are not all those of its kind"
    shapes = {name: t.shape for name, t in weights.items()}
    expected = _shapes(numbers, shapes)
    if expected is None:
        return f"a mixer's heads and widths, {numbers.sizes}, do not fit each other or the width of h"
    if shapes != expected or 0 in shapes["up"] or 0 in shapes.get("convolution", ()):
        wrong = {name: (list(size), list(expected[name])) for name, size in shapes.items() if size != expected[name]}
        return (
            f"sizes of weights do not fit each other: {wrong or list(shapes['up'])} (are, and by the others would be)"
        )
    own: Any = block._modules
    norms = [own["mixer_norm"], own["mlp_norm"], *[m for m in own["mixer"]._modules.values() if type(m) is nn.RMSNorm]]
    if any(not _is_tuple_of_ints(n.normalized_shape, n._parameters["weight"].shape) for n in norms):
        return "a norm is over other sizes than those of its weights"
    return None


def _is_tuple_of_ints(found: Any, expected: tuple[int, ...]) -> bool:
    """Whether it is this one; 8.0 equals 8, but torch does not take it."""
    return type(found) is tuple and found == expected and all(type(n) is int for n in found)


def _shapes(numbers: Numbers, shapes: dict[str, Any]) -> dict[str, Any] | None:
    """Of weights, by their names, as the numbers and some of them ask for; None where numbers do not fit each other."""
    d, hidden = shapes["mixer_norm"].numel(), shapes["up"][:1]
    both = {"mixer_norm": (d,), "mlp_norm": (d,), "up": (*hidden, d), "down": (d, *hidden)}
    if len(numbers.sizes) == 1:
        (H,) = numbers.sizes
        return None if d % H else {**both, "qkv": (3 * d, d), "q_norm": (d // H,), "k_norm": (d // H,), "out": (d, d)}
    H, HV, K, V = numbers.sizes
    keys, values, split = H * K, HV * V, numbers.split
    if HV % H or not _is_tuple_of_ints(split, (keys, keys, values)):
        return None
    inputs = 2 * keys + values
    return {
        **both,
        "qkv": (inputs, d),
        "gate": (values, d),
        "rates": (2 * HV, d),
        "convolution": (inputs, *shapes["convolution"][1:2]),
        "norm": (V,),
        "out": (d, values),
    }


def _why_not_readable(weights: dict[str, Any], h: Tensor) -> str | None:
    device, dtype = h.device, h.dtype
    for p in weights.values():
        if p.device != device or p.dtype != dtype:
            return f"weights are {p.dtype} on {p.device}, h is {dtype} on {device}"
        if p.is_inference():
            return "weights made in inference mode do not say when they change"
        if not readable(p):
            return f"a {type(p).__name__} among the weights is not numbers at an address"
        if p._backward_hooks:
            return "a weight has hooks, which want to be called once"
    return None
