"""Hybrid blocks as the native module takes them: weights packed once, and again when they have changed."""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor

from ..sleep.fitting import numbers_of, weights_of
from ..state import KVState, RecurrentState, State
from .identity import Contents

if TYPE_CHECKING:
    from ..nn import GatedDeltaNet, HybridBlock, WindowAttention

try:
    _C: Any = importlib.import_module("sleepkern._C")
except ImportError:
    _C = None

_FLOATS: Any = {"dtype": torch.float32, "device": "cpu"}
"""What C++ reads and writes, whatever torch's defaults are."""
_SPREAD = 16.0
"""How much larger than the others an output's or input's weights may be for Winograd's product: errors grow with half
of it."""
_packed: WeakKeyDictionary[HybridBlock, Packed] = WeakKeyDictionary()


class Source:
    """What weights were packed of: these blocks, with the weights and numbers that they have. Keeps none of it."""

    def __init__(self, blocks: Sequence[HybridBlock]) -> None:
        self._blocks = [ref(block) for block in blocks]
        self._numbers = [numbers_of(block) for block in blocks]
        self._weights = Contents([weight for block in blocks for weight in weights_of(block)])

    def holds(self, blocks: Sequence[HybridBlock]) -> bool:
        """Whether these are the blocks, with the weights and numbers that they had, as far as torch counts writes."""
        if len(blocks) != len(self._blocks) or any(r() is not b for r, b in zip(self._blocks, blocks, strict=True)):
            return False
        weights = [weight for block in blocks for weight in weights_of(block)]
        return self._weights.hold(weights) and [numbers_of(block) for block in blocks] == self._numbers

    def current(self) -> bool:
        """Whether the blocks are still there, with the weights and numbers they had."""
        blocks = [block for r in self._blocks if (block := r()) is not None]
        return self.holds(blocks)


class Packed:
    """Weights of a stack of blocks, each norm multiplied into the product after it; see csrc/common/blocks.h.

    form: of the products' operands, of `_C.Form`.
    """

    def __init__(self, blocks: Sequence[HybridBlock], form: Any) -> None:
        self.source = Source(blocks)
        self.asked, self.isa = form, _C.isa()
        self.form = _C.Form.plain if form == _C.Form.winograd and not _balanced(blocks) else form
        sizes = (_C.packed_size(n, depth, self.form) for block in blocks for n, depth in _shapes(block))
        self.weights = _room(sum(sizes))
        self.used = 0
        self.alive: list[Tensor] = []
        self.layers = [self._layer(block) for block in blocks]

    def holds(self, blocks: Sequence[HybridBlock], form: Any) -> bool:
        """Whether these are its blocks, packed when this form was asked for, and their weights what they were; and the
        instruction set, whose panels differ in width."""
        return self.asked == form and self.isa == _C.isa() and self.source.holds(blocks)

    def _layer(self, block: HybridBlock) -> dict[str, Any]:
        mlp, norm = block.mlp, block.mlp_norm
        hidden = _hidden(block)
        up, down = _after(norm, mlp.up.weight), _float(mlp.out.weight)
        # What leaves the square is to be of down's size: up takes the root of it.
        root = 2.0 ** round(self._exponent(down, _square(up) * up.shape[1] * math.sqrt(1.5)) / 2)
        mixer: Any = block.mixer
        into = _delta_inputs(mixer) if block.recurrent else mixer.qkv.weight
        layer = {
            "recurrent": block.recurrent,
            "into_width": into.shape[0],
            # In the order of their use, for each product asks for the weights behind its own.
            **self._weight("into", _after(block.mixer_norm, into), 1.0),
            **self._weight("out", _float(mixer.out.weight), _mixed_size(block)),
            **self._weight("up", up * root, 1.0),
            "down": self._pack(torch.nn.functional.pad(down / root**2, (0, hidden - up.shape[0]))),
            "hidden": hidden,
            "mixer_eps": _eps(block.mixer_norm),
            "mlp_eps": _eps(norm),
            "H": mixer.heads,
        }
        return layer | (self._delta(mixer) if block.recurrent else self._attention(mixer))

    def _delta(self, mixer: GatedDeltaNet) -> dict[str, Any]:
        return {
            "HV": mixer.value_heads,
            "K": mixer.key_width,
            "V": mixer.value_width,
            "W": mixer.convolution.weight.shape[1],
            "decay_bias": mixer.decay_bias,
            "strength": mixer.strength,
            "taps": self._floats(mixer.convolution.weight),
            "gain": self._floats(mixer.norm.weight),
            "gain_eps": mixer.norm.eps,
        }

    def _attention(self, mixer: WindowAttention) -> dict[str, Any]:
        return {
            "q_gain": self._floats(mixer.q_norm.weight),
            "k_gain": self._floats(mixer.k_norm.weight),
            "q_eps": _eps(mixer.q_norm),
            "k_eps": _eps(mixer.k_norm),
        }

    def _floats(self, t: Tensor) -> int:
        """The address of a copy that lives as long as this."""
        kept = t.detach().float().contiguous().clone()
        self.alive.append(kept)
        return kept.data_ptr()

    def _weight(self, name: str, weight: Tensor, size: float) -> dict[str, Any]:
        """A matrix [n, depth] for rows whose numbers are about of this size: packed over its balance, and that."""
        balance = 2.0 ** self._exponent(weight, size)
        return {name: self._pack(weight / balance), f"{name}_balance": balance}

    def _exponent(self, weight: Tensor, size: float) -> int:
        """Of the power of two by which rows of numbers of this size are to be multiplied, and the weights divided, so
        that both are of one size."""
        if self.form != _C.Form.winograd:
            return 0
        ratio = math.sqrt(_square(weight)) / max(size, 1e-30)
        return max(-30, min(30, round(math.log2(max(ratio, 1e-30)) / 2)))

    def _pack(self, weight: Tensor) -> int:
        """The address of a packed matrix [n, depth]."""
        n, depth = weight.shape
        address, matrix = self.weights[self.used :].data_ptr(), weight.contiguous()
        _C.pack_weight(matrix.data_ptr(), n, depth, self.form, address)
        self.used += _C.packed_size(n, depth, self.form)
        return address

    def run(
        self,
        h: Tensor,
        blocks: Sequence[HybridBlock],
        states: Sequence[State],
        passes: int,
        reinject: bool,
        carry: bool,
    ) -> tuple[Tensor, list[RecurrentState | KVState], Tensor]:
        """h [B,L,d] float32 after all passes, what each block remembers, and [passes] relative changes of the state."""
        B, L, d = h.shape
        h, changes = _room(B, L, d).copy_(h), torch.empty(passes, 2, dtype=torch.float64, device="cpu")
        after: list[RecurrentState | KVState] = []
        layers, alive = [], []
        for layer, block, state in zip(self.layers, blocks, states, strict=True):
            addresses, now, read = (_fast if block.recurrent else _slow)(block.mixer, state, B, L)
            layers.append(layer | addresses)
            after.append(now)
            alive.append(read)
        _C.sleep_blocks(B, L, d, passes, reinject, carry, self.form, layers, h.data_ptr(), changes.data_ptr())
        squares = changes.sqrt()
        return h, after, (squares[:, 0] / squares[:, 1].clamp_min(1e-30)).float()


def why_not(blocks: Sequence[HybridBlock]) -> str | None:
    """None where C++ runs these blocks, else the sentence why not."""
    for mixer in (block.mixer for block in blocks if block.recurrent):
        gated: Any = mixer
        if max(gated.key_width, gated.value_width) > _C.head_limit:
            return f"heads of at most {_C.head_limit}"
        if gated.convolution.weight.shape[1] > _C.convolution_limit:
            return f"short convolutions of at most {_C.convolution_limit} tokens"
    return None


def packed(blocks: Sequence[HybridBlock], dtype: torch.dtype) -> Packed:
    """Of these blocks for h of this type, made anew if their weights are not what they were."""
    form = form_for(dtype)
    found = _packed.get(blocks[0])
    if found is None or not found.holds(blocks, form):
        found = _packed[blocks[0]] = Packed(blocks, form)
    return found


def forget(block: HybridBlock) -> None:
    """What was packed of the stack that begins with this block."""
    _packed.pop(block, None)


def multiplies_bfloat16(dtype: torch.dtype) -> bool:
    """Whether products with weights take bfloat16 for h of this type: where the machine multiplies it in one
    instruction, and h is bfloat16, or float32 of which torch.set_float32_matmul_precision("medium") allows it."""
    allowed = dtype == torch.float32 and torch.get_float32_matmul_precision() == "medium"
    return bool(_C.multiplies_pairs()) and (dtype == torch.bfloat16 or allowed)


def form_for(dtype: torch.dtype) -> Any:
    """In which form products with weights take their operands for h of this type, of `_C.Form`."""
    if multiplies_bfloat16(dtype):
        return _C.Form.bfloat16
    return _C.Form.winograd if _C.adds_beside_products() else _C.Form.plain


def _balanced(blocks: Sequence[HybridBlock]) -> bool:
    """Whether no output's or input's weights are so much larger than the others' that Winograd's product would lose
    digits of these; not so where one is not finite."""
    matrices = [_after(block.mlp_norm, block.mlp.up.weight) for block in blocks]
    matrices += [_float(weight) for block in blocks for weight in (block.mixer.out.weight, block.mlp.out.weight)]
    for block in blocks:
        mixer: Any = block.mixer
        matrices.append(_after(block.mixer_norm, _delta_inputs(mixer) if block.recurrent else mixer.qkv.weight))
    return all(_is_even(matrix.square().mean(dim)) for matrix in matrices for dim in (0, 1))


def _is_even(squares: Tensor) -> bool:
    return bool(squares.max() <= _SPREAD**2 * squares.median())


def _room(*sizes: int) -> Tensor:
    """Floats that are about to be written whole, in huge pages where there are any: the first touch of small ones took
    8 of the 303 ms of 64 windows."""
    made = torch.empty(sizes, **_FLOATS)
    _C.prefer_huge_pages(made.data_ptr(), made.nbytes)
    return made


def _hidden(block: HybridBlock) -> int:
    """Outputs of `up` come in whole panels, which `down` then reads."""
    panel = int(_C.panel_width())
    return -(-block.mlp.up.weight.shape[0] // panel) * panel


def _shapes(block: HybridBlock) -> list[tuple[int, int]]:
    """[outputs, depth] of all packed matrices."""
    mixer: Any = block.mixer
    into = [mixer.qkv, mixer.gate, mixer.rates] if block.recurrent else [mixer.qkv]
    (d, mixed), (up, _) = mixer.out.weight.shape, block.mlp.up.weight.shape
    return [(sum(part.weight.shape[0] for part in into), d), (d, mixed), (up, d), (d, _hidden(block))]


def _float(weight: Tensor) -> Tensor:
    return weight.detach().float()


def _after(norm: torch.nn.RMSNorm, weight: Tensor) -> Tensor:
    """Weights of a product, columns times the gains of the norm before it."""
    return _float(weight) * _float(norm.weight)


def _mixed_size(block: HybridBlock) -> float:
    """About how large the numbers are that leave the mixer: of the gated norm its gains, of attention its values."""
    mixer: Any = block.mixer
    if block.recurrent:
        return float(_float(mixer.norm.weight).square().mean().sqrt())
    d = mixer.out.weight.shape[0]
    return math.sqrt(_square(_after(block.mixer_norm, mixer.qkv.weight[2 * d :])) * d)


def _square(weight: Tensor) -> float:
    """Mean over the inputs, median over the outputs."""
    return float(weight.square().mean(1).median())


def _eps(norm: torch.nn.RMSNorm) -> float:
    return torch.finfo(torch.float32).eps if norm.eps is None else norm.eps


def _delta_inputs(mixer: GatedDeltaNet) -> Tensor:
    return torch.cat([mixer.qkv.weight, mixer.gate.weight, mixer.rates.weight])


def _fast(mixer: Any, before: State, B: int, L: int) -> tuple[dict[str, int], RecurrentState, Any]:
    channels, W = mixer.convolution.weight.shape
    state = _room(B, mixer.value_heads, mixer.key_width, mixer.value_width)
    if before is None:
        past = torch.zeros(B, W - 1, channels, **_FLOATS)
        state.zero_()
    else:
        assert isinstance(before, RecurrentState)
        past = before.conv.float().contiguous()
        state.copy_(before.state)
    last = _room(B, W - 1, channels)
    addresses = {"past": past.data_ptr(), "last": last.data_ptr(), "state": state.data_ptr()}
    return addresses, RecurrentState(last, state), past


def _slow(mixer: Any, before: State, B: int, L: int) -> tuple[dict[str, int], KVState, Any]:
    H, D = mixer.heads, mixer.q_norm.weight.shape[0]
    kept = None
    if before is not None:
        assert isinstance(before, KVState)
        kept = KVState(*(t.float().contiguous() for t in before))
    tokens = 0 if kept is None else kept.keys.shape[2]
    after = KVState(*(_room(B, H, tokens + L, D) for _ in range(2)))
    addresses = {
        "kept": tokens,
        "keys": 0 if kept is None else kept.keys.data_ptr(),
        "values": 0 if kept is None else kept.values.data_ptr(),
        "all_keys": after.keys.data_ptr(),
        "all_values": after.values.data_ptr(),
    }
    return addresses, after, kept
