"""Blocks in one call of C++ (csrc/common/blocks.h): weights are packed once, and again when they have changed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ...problems.blocks import BlockProblem, Slept
from ...problems.layer_weights import AttentionWeights, GatedDeltaWeights, LayerWeights
from ...state import KVState, RecurrentState, State
from ..native.identity import Source
from ..native.module import _C
from ..native.witness import with_weights
from . import recurrence as cpu

NAME = cpu.NAME
SUPPORTS = frozenset({AttentionWeights, GatedDeltaWeights})
RECORDED = False
_FLOATS: Any = {"dtype": torch.float32, "device": "cpu"}
"""What C++ reads and writes, whatever torch's defaults are."""
_SPREAD = 16.0
"""How much larger than the others an output's or input's weights may be for Winograd's product: errors grow with half
of it."""
_packed: WeakKeyDictionary[Any, Packed] = WeakKeyDictionary()
"""The packed weights of each stack, keyed by its first block."""


def why_not(problem: BlockProblem) -> str | None:
    """None where C++ runs these blocks, else the sentence why not."""
    if _C is None:
        return "the compiled module sleepkern._C is not there"
    if problem.refusal is not None:
        return problem.refusal
    if problem.device != "cpu":
        return f"runs on the CPU, h is on {problem.device}"
    for m in (layer.mixer for layer in problem.layers):
        if type(m) is GatedDeltaWeights and max(m.key_width, m.value_width) > _C.head_limit:
            return f"heads of at most {_C.head_limit}"
        if type(m) is GatedDeltaWeights and m.convolution.shape[1] > _C.convolution_limit:
            return f"short convolutions of at most {_C.convolution_limit} tokens"
    return None


def kernel(problem: BlockProblem) -> str:
    """One line on the code that runs."""
    return f"C++ {_C.isa()}, all passes in one call, products {form_for(problem.dtype).name}"


def run(problem: BlockProblem, h: Tensor, blocks: Sequence[Any], states: Sequence[State]) -> Slept:
    """Compute in float32 but for products with weights; results have the types that modules give."""
    return packed(blocks, problem.layers, h.dtype).run(problem, h, states)


class Packed:
    """Weights of a stack of blocks, each norm multiplied into the product after it; see csrc/common/blocks.h.

    form: of the products' operands, of `_C.Form`.
    """

    source: Source
    asked: Any
    isa: str
    form: Any
    weights: Tensor
    used: int
    layers: list[_C.Layer]

    def __init__(self, blocks: Sequence[Any], layers: Sequence[LayerWeights], form: Any) -> None:
        self.source = Source(blocks, layers)
        self.asked, self.isa = form, _C.isa()
        self.form = _C.Form.plain if form == _C.Form.winograd and not _balanced(layers) else form
        sizes = (_C.packed_size(n, depth, self.form) for layer in layers for n, depth in _shapes(layer))
        self.weights = _room(sum(sizes))
        self.used = 0
        self.alive: list[Tensor] = []
        self.layers = [self._layer(layer) for layer in layers]

    def holds(self, blocks: Sequence[Any], layers: Sequence[LayerWeights], form: Any) -> bool:
        """True if it was packed from these blocks in this form, their weights have not changed, and the instruction set
        is the same: panels differ in width between instruction sets."""
        return self.asked == form and self.isa == _C.isa() and self.source.holds(blocks, layers)

    def _layer(self, layer: LayerWeights) -> _C.Layer:
        """The sizes and weights of a layer; what changes from call to call is still 0."""
        hidden, mixer, into = _hidden(layer), layer.mixer, torch.cat(layer.mixer.inputs())
        up, down = _after(layer.mlp_norm, layer.up), _float(layer.down)
        # relu(up)^2 gets the balance of down: up takes the root of it.
        root = 2.0 ** round(self._exponent(down, _square(up) * up.shape[1] * math.sqrt(1.5)) / 2)
        packed = _C.Layer()
        packed.recurrent, packed.H = layer.recurrent, mixer.heads
        if isinstance(mixer, GatedDeltaWeights):
            self._fill_delta(packed, mixer)
        else:
            self._fill_attention(packed, mixer)
        packed.into_width, packed.hidden = into.shape[0], hidden
        packed.mixer_eps, packed.mlp_eps = layer.mixer_eps, layer.mlp_eps
        # Matrices are packed in the order of their use, because each product prefetches the weights after its own.
        packed.into = self._weight(_after(layer.mixer_norm, into), 1.0)
        packed.out = self._weight(_float(mixer.out), _mixed_size(layer))
        packed.up = self._weight(up * root, 1.0)
        packed.down = self._pack(torch.nn.functional.pad(down / root**2, (0, hidden - up.shape[0])))
        return packed

    def _fill_delta(self, packed: _C.Layer, mixer: GatedDeltaWeights) -> None:
        packed.HV, packed.K, packed.V = mixer.value_heads, mixer.key_width, mixer.value_width
        packed.W, packed.taps = mixer.convolution.shape[1], self._floats(mixer.convolution)
        packed.decay_bias, packed.strength = mixer.decay_bias, mixer.strength
        packed.gain, packed.gain_eps = self._floats(mixer.norm), mixer.norm_eps

    def _fill_attention(self, packed: _C.Layer, mixer: AttentionWeights) -> None:
        packed.q_gain, packed.q_eps = self._floats(mixer.q_norm), mixer.q_eps
        packed.k_gain, packed.k_eps = self._floats(mixer.k_norm), mixer.k_eps

    def _floats(self, t: Tensor) -> int:
        """The address of a copy that lives as long as this."""
        kept = t.detach().float().contiguous().clone()
        self.alive.append(kept)
        return kept.data_ptr()

    def _weight(self, weight: Tensor, size: float) -> tuple[int, float]:
        """The address of a matrix [n, depth] that is packed over its balance, and the balance; `size` is about how
        large the elements of the rows are that it multiplies."""
        balance = 2.0 ** self._exponent(weight, size)
        return self._pack(weight / balance), balance

    def _exponent(self, weight: Tensor, size: float) -> int:
        """The exponent of the power of two that inputs of this size are multiplied by and weights are divided by, so
        that both have about the same size."""
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

    def run(self, problem: BlockProblem, given: Tensor, states: Sequence[State]) -> Slept:
        """The result of all passes over h [B,L,d]."""
        B, L, d = given.shape
        passes, dtype = problem.passes, given.dtype
        h, changes = _room(B, L, d).copy_(given), torch.empty(passes, 2, dtype=torch.float64, device="cpu")
        after: list[RecurrentState | KVState] = []
        layers, alive = [], []
        for layer, weights, state in zip(self.layers, problem.layers, states, strict=True):
            current = layer.copy()
            state_after, read = (_recurrent if weights.recurrent else _attention)(current, weights, state, B, L)
            layers.append(current)
            after.append(state_after)
            alive.append(read)
        _C.sleep_blocks(
            B=B,
            L=L,
            d=d,
            passes=passes,
            reinject=problem.reinject,
            carry=problem.carry,
            form=self.form,
            layers=layers,
            h=h.data_ptr(),
            changes=changes.data_ptr(),
        )
        squares = changes.sqrt()
        relative = (squares[:, 0] / squares[:, 1].clamp_min(1e-30)).float()
        return Slept(h.to(dtype), [_like(x, dtype) for x in after], relative)


def packed(blocks: Sequence[Any], layers: Sequence[LayerWeights], dtype: torch.dtype) -> Packed:
    """The packed weights of these blocks for h of this type; they are packed again if the weights have changed."""
    form = form_for(dtype)
    found = _packed.get(blocks[0])
    if found is None or not found.holds(blocks, layers, form):
        found = _packed[blocks[0]] = Packed(blocks, with_weights(blocks, layers), form)
    return found


def forget(block: Any) -> None:
    """The packed weights of the stack that begins with this block."""
    _packed.pop(block, None)


def multiplies_bfloat16(dtype: torch.dtype) -> bool:
    """True if products with weights take bfloat16 operands for h of this type. The processor must multiply bfloat16 in
    one instruction, and h be bfloat16, or float32 with torch.set_float32_matmul_precision("medium")."""
    allowed = dtype == torch.float32 and torch.get_float32_matmul_precision() == "medium"
    return bool(_C.multiplies_bf16()) and (dtype == torch.bfloat16 or allowed)


def form_for(dtype: torch.dtype) -> Any:
    """The form in which products with weights take their operands for h of this type, of `_C.Form`."""
    if multiplies_bfloat16(dtype):
        return _C.Form.bfloat16
    return _C.Form.winograd if _C.adds_beside_products() else _C.Form.plain


def _balanced(layers: Sequence[LayerWeights]) -> bool:
    """True if no row or column of the weights is so much larger than the others that Winograd's product would lose
    digits of the small ones. False if a weight is not finite."""
    matrices = [_after(layer.mlp_norm, layer.up) for layer in layers]
    matrices += [_float(weight) for layer in layers for weight in (layer.mixer.out, layer.down)]
    matrices += [_after(layer.mixer_norm, torch.cat(layer.mixer.inputs())) for layer in layers]
    return all(_is_even(matrix.square().mean(dim)) for matrix in matrices for dim in (0, 1))


def _is_even(squares: Tensor) -> bool:
    return bool(squares.max() <= _SPREAD**2 * squares.median())


def _room(*sizes: int) -> Tensor:
    """Allocate floats that are about to be written whole, in huge pages where there are any: the first touch of small
    pages took 8 of the 303 ms of 64 windows."""
    made = torch.empty(sizes, **_FLOATS)
    _C.prefer_huge_pages(made.data_ptr(), made.nbytes)
    return made


def _hidden(layer: LayerWeights) -> int:
    """Outputs of `up` come in whole panels, which `down` then reads."""
    panel = int(_C.panel_width())
    return -(-layer.up.shape[0] // panel) * panel


def _shapes(layer: LayerWeights) -> list[tuple[int, int]]:
    """[outputs, depth] of all packed matrices."""
    (d, mixed), (up, _) = layer.mixer.out.shape, layer.up.shape
    return [(sum(part.shape[0] for part in layer.mixer.inputs()), d), (d, mixed), (up, d), (d, _hidden(layer))]


def _float(weight: Tensor) -> Tensor:
    return weight.detach().float()


def _after(norm: Tensor, weight: Tensor) -> Tensor:
    """Weights of a product, columns times the gains of the norm before it."""
    return _float(weight) * _float(norm)


def _mixed_size(layer: LayerWeights) -> float:
    """About how large the outputs of the mixer are: as its gains with a gated norm, as its values with attention."""
    mixer, d = layer.mixer, layer.width
    if isinstance(mixer, GatedDeltaWeights):
        return float(_float(mixer.norm).square().mean().sqrt())
    return math.sqrt(_square(_after(layer.mixer_norm, mixer.qkv[2 * d :])) * d)


def _square(weight: Tensor) -> float:
    """Mean over the inputs, median over the outputs."""
    return float(weight.square().mean(1).median())


def _like(x: RecurrentState | KVState, dtype: torch.dtype) -> RecurrentState | KVState:
    if isinstance(x, RecurrentState):
        return RecurrentState(x.conv.to(dtype), x.state)
    return KVState(x.keys.to(dtype), x.values.to(dtype))


def _recurrent(layer: _C.Layer, weights: LayerWeights, before: State, B: int, L: int) -> tuple[RecurrentState, Tensor]:
    """Fill in the state of a layer; returns the state after the call, and the tensors that must live until then."""
    conv, fast = weights.mixer.carried(B, 0)
    state = _room(*fast)
    if before is None:
        past = torch.zeros(conv, **_FLOATS)
        state.zero_()
    else:
        assert isinstance(before, RecurrentState)
        past = before.conv.float().contiguous()
        state.copy_(before.state)
    last = _room(*conv)
    layer.past, layer.last, layer.state = past.data_ptr(), last.data_ptr(), state.data_ptr()
    return RecurrentState(last, state), past


def _attention(layer: _C.Layer, weights: LayerWeights, before: State, B: int, L: int) -> tuple[KVState, KVState | None]:
    """The same as `_recurrent` for an attention layer: keys and values take the place of the state."""
    kept = None
    if before is not None:
        assert isinstance(before, KVState)
        kept = KVState(*(t.float().contiguous() for t in before))
        layer.kept = kept.keys.shape[2]
        layer.keys, layer.values = kept.keys.data_ptr(), kept.values.data_ptr()
    after = KVState(*(_room(*size) for size in weights.mixer.carried(B, layer.kept + L)))
    layer.all_keys, layer.all_values = after.keys.data_ptr(), after.values.data_ptr()
    return after, kept
