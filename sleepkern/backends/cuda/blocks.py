"""Hybrid blocks as the CUDA kernel takes them, and its launch.

csrc/cuda/blocks/kernel.cuh is the kernel. A cluster of CTAs takes a group of windows; each CTA has its share of the
heads, of the MLP's columns and of the columns of h.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import functional as F

from ...problems.blocks import BlockProblem, Slept
from ...problems.layer_weights import AttentionWeights, GatedDeltaWeights, LayerWeights
from ...state import KVState, RecurrentState, State
from ..native.identity import Source
from ..native.module import _C, TYPE_CODES
from ..native.views import on_device_of, stream_of
from ..native.witness import with_weights
from . import device as gpu
from . import recurrence as cuda
from .blocks_plan import TILE, BlocksPlan, LayerShape, call_of, plan, share, slower
from .blocks_weight_layout import Order, heads_of, order

if TYPE_CHECKING:
    from ..._C import CudaBlockLayer, CudaBlocks

NAME = cuda.NAME
SUPPORTS = frozenset({AttentionWeights, GatedDeltaWeights})
RECORDED = False
_packed: WeakKeyDictionary[Any, dict[Any, StreamedWeights]] = WeakKeyDictionary()
"""The packed weights of each stack, keyed by its first block and then by plan."""
MOST_SHAPES = 256
_shapes: dict[int, tuple[tuple[LayerWeights, ...], tuple[LayerShape, ...]]] = {}
"""The sizes of layers by the layers' address, which is theirs while they are kept here. The oldest goes first."""
_reading: list[list[StreamedWeights]] = []
"""The lists that `reading` fills."""


def why_not(problem: BlockProblem) -> str | None:
    """None where all passes can be one launch, else the sentence why not."""
    reason = gpu.why_not_on(problem.device) or problem.refusal
    if reason is not None:
        return reason
    captured = problem.device == "cuda" and torch.cuda.is_current_stream_capturing()
    if captured and not _reading:
        return "a CUDA graph of the caller's own would not keep the packed weights; SleepSession(capture=True) does"
    if problem.dtype != torch.bfloat16 and torch.get_float32_matmul_precision() != "medium":
        return (
            f"one launch multiplies in bfloat16, which {problem.dtype} allows only with "
            'torch.set_float32_matmul_precision("medium")'
        )
    limits, shapes = _C.CudaBlocksConstants, shapes_of(problem.layers)
    if len(shapes) > limits.MOST_LAYERS:
        return f"one launch for at most {limits.MOST_LAYERS} blocks, got {len(shapes)}"
    head, taps = limits.WIDEST_HEAD, limits.TAPS
    if max(max(s.K, s.V) for s in shapes) > head or max(s.W for s in shapes) > taps:
        return f"one launch for heads of at most {head} and short convolutions of at most {taps} tokens"
    if problem.sizes is None:
        return None
    B, L, d = problem.sizes
    tokens, width = limits.LONGEST, limits.WIDEST_MODEL
    if d > width or L > tokens:
        return f"one launch for windows of at most {tokens} tokens and widths of at most {width}, got {L} and {d}"
    device = gpu.current_device()
    found = plan(B, L, d, shapes, device)
    if found is None:
        return "the window does not fit a cluster's shared memory"
    return slower(found, B, device, captured)


def kernel(problem: BlockProblem) -> str:
    """Describe in one line the code that runs."""
    if problem.sizes is None:
        return "CUDA, all passes in one launch"
    B, L, d = problem.sizes
    found = plan(B, L, d, shapes_of(problem.layers), gpu.current_device())
    assert found is not None
    return f"CUDA, all passes in one launch, {found.group} windows for each cluster of {found.cluster} CTAs"


@contextmanager
def reading() -> Iterator[list[StreamedWeights]]:
    """Collect the packed weights that launches read inside the context.

    A CUDA graph of these launches reads the weights again: its owner keeps them, and tests that each is still `current`
    before a replay.
    """
    read: list[StreamedWeights] = []
    _reading.append(read)
    try:
        yield read
    finally:
        _reading[:] = [other for other in _reading if other is not read]


def run(problem: BlockProblem, h: Tensor, blocks: Sequence[Any], states: Sequence[State]) -> Slept:
    """Run all passes in one launch. Products are computed in bfloat16; results have the types that modules give."""
    (B, L, d), passes = h.shape, problem.passes
    found = plan(B, L, d, shapes_of(problem.layers), gpu.current_device())
    assert found is not None
    weights = packed(blocks, problem.layers, found, h.device)
    for read in _reading:
        read.append(weights)
    h = h.contiguous()
    out = torch.empty_like(h)
    after: list[RecurrentState | KVState] = []
    carried, alive, sums = [], [], 0
    for rows, layer, state in zip(weights.sums, problem.layers, states, strict=True):
        now, addresses, kept = (_recurrent if rows else _attention)(layer, state, h, passes)
        carried.append((sums, *addresses))
        sums += B * rows
        after.append(now)
        alive.append(kept)
    changes = h.new_empty(passes, sums, 2, dtype=torch.float32)
    call = _call(found, B, L, d, TYPE_CODES[h.dtype], sums, passes, problem.reinject, problem.carry)
    with on_device_of(h):
        _C.cuda_blocks(
            call, weights.layers, carried, h=h.data_ptr(), out=out.data_ptr(), weights=weights.stream.data_ptr(),
            stages=weights.order.stages.data_ptr(), changes=changes.data_ptr(), stream=stream_of(h),
        )  # fmt: skip
    squares, norms = changes.sum(1, dtype=torch.float64).sqrt_().unbind(1)
    return Slept(out, after, squares.div(norms.clamp_min_(1e-30)).float())


@lru_cache(maxsize=1024)
def _call(
    p: BlocksPlan, B: int, L: int, d: int, dtype: int, sums: int, passes: int, reinject: bool, carry: bool
) -> CudaBlocks:
    """Describe a call for _C. A launch reads the result, which is kept: filling it takes longer than finding it."""
    call = call_of(p, L)
    call.type, call.B, call.d, call.sums = dtype, B, d, sums
    call.passes, call.reinject, call.carry = passes, reinject, carry
    return call


def shapes_of(layers: tuple[LayerWeights, ...]) -> tuple[LayerShape, ...]:
    """Give the sizes of each layer that a plan depends on; those of layers that a witness keeps are found once."""
    found = _shapes.get(id(layers))
    if found is not None and found[0] is layers:
        return found[1]
    shapes = tuple(LayerShape(layer.recurrent, *_widths(layer.mixer), layer.up.shape[0]) for layer in layers)
    if layers and layers[0].up.is_meta:
        if len(_shapes) >= MOST_SHAPES:
            _shapes.pop(next(iter(_shapes)), None)
        _shapes[id(layers)] = layers, shapes
    return shapes


def _widths(m: AttentionWeights | GatedDeltaWeights) -> tuple[int, int, int, int, int]:
    """H, HV, K, V, W."""
    if isinstance(m, GatedDeltaWeights):
        return m.heads, m.value_heads, m.key_width, m.value_width, m.convolution.shape[1]
    D = m.q_norm.shape[0]
    return m.heads, m.heads, D, D, 1


class StreamedWeights:
    """The weights of a stack of blocks for a plan: in bf16, in the order in which the warps of each CTA read them.

    The gain of each norm is multiplied into the weight after it.
    """

    source: Source
    forgotten: bool
    cluster: int
    layers: list[CudaBlockLayer]
    sums: list[int]
    """Pairs of sums that a window's pass makes in each layer, 0 in one of attention."""
    ordered: tuple[int, tuple[LayerShape, ...], torch.device]
    stream: Tensor

    def __init__(
        self,
        blocks: Sequence[Any],
        layers: Sequence[LayerWeights],
        p: BlocksPlan,
        device: torch.device,
        before: StreamedWeights | None = None,
    ) -> None:
        """Pack the weights. `before`, of the same plan, gives its order where its layers have the same sizes."""
        self.source, self.forgotten = Source(blocks, layers), False
        self.cluster = p.cluster
        self.alive: list[Tensor] = []
        shapes = shapes_of(tuple(layers))
        self.layers = [self._layer(layer, s) for layer, s in zip(layers, shapes, strict=True)]
        self.sums = [self.cluster * x.value_heads * x.VP // TILE if x.recurrent else 0 for x in self.layers]
        weights = [w.to(torch.bfloat16).flatten() for layer in layers for w in _weights(layer)]
        self.ordered = (layers[0].width, shapes, device)
        same = before is not None and before.ordered == self.ordered
        self.order: Order = before.order if before is not None and same else order(*self.ordered, p)
        self.stream = torch.cat([weights[0].new_zeros(1), *weights]).index_select(0, self.order.indices)

    def holds(self, blocks: Sequence[Any], layers: Sequence[LayerWeights]) -> bool:
        """Tells whether these weights were packed from these blocks, whose weights have not changed."""
        return not self.forgotten and self.source.holds(blocks, layers)

    def current(self) -> bool:
        """Tells whether the blocks still exist and have the weights that were packed."""
        return not self.forgotten and self.source.current()

    def _layer(self, weights: LayerWeights, s: LayerShape) -> CudaBlockLayer:
        """Everything of a layer that does not change from call to call."""
        m, layer = weights.mixer, share(s, self.cluster)
        layer.mixer_eps, layer.mlp_eps = weights.mixer_eps, weights.mlp_eps
        if isinstance(m, AttentionWeights):
            layer.q_gain = self._floats(m.q_norm * s.K**-0.5, layer.KP)
            layer.k_gain = self._floats(m.k_norm, layer.KP)
            layer.q_eps, layer.k_eps = m.q_eps, m.k_eps
            return layer
        taps, keys = F.pad(m.convolution.detach().float(), (_C.CudaBlocksConstants.TAPS - s.W, 0)), s.heads * s.K
        split = taps.split((keys, keys, s.value_heads * s.V))
        parts = zip(split, (s.heads, s.heads, s.value_heads), (s.K, s.K, s.V), strict=True)
        q, k, v = ([heads_of(x, n, width, self.cluster, r) for r in range(self.cluster)] for x, n, width in parts)
        layer.taps = self._floats(torch.cat([x for each in zip(q, k, v, strict=True) for x in each]))
        layer.gain, layer.gain_eps = self._floats(m.norm, layer.VP), m.norm_eps
        layer.decay_bias, layer.strength = m.decay_bias, m.strength
        return layer

    def _floats(self, t: Tensor, width: int | None = None) -> int:
        """The address of a copy with zeros up to a width. The copy lives as long as these weights."""
        kept = t.detach().float()
        kept = kept.contiguous().clone() if width is None else F.pad(kept, (0, width - len(kept))).contiguous()
        self.alive.append(kept)
        return kept.data_ptr()


def packed(
    blocks: Sequence[Any], layers: Sequence[LayerWeights], p: BlocksPlan, device: torch.device
) -> StreamedWeights:
    """Find the packed weights of these blocks for a plan; pack them again if a weight has changed."""
    key = (p.cluster, p.columns, p.exchange, _C.cuda_blocks_paired(p.tiles), len(blocks))
    kept = _packed.setdefault(blocks[0], {})
    found = kept.get(key)
    if found is None or not found.holds(blocks, layers):
        with torch.no_grad():
            found = kept[key] = StreamedWeights(blocks, with_weights(blocks, layers), p, device, found)
    return found


def forget(block: Any) -> None:
    """Drop the packed weights of stacks that begin with this block; graphs that read them see they are not current."""
    for found in _packed.pop(block, {}).values():
        found.forgotten = True


def _weights(layer: LayerWeights) -> list[Tensor]:
    """The weights of a layer in the order of csrc/cuda/blocks/weight_order.h."""
    norm, mlp_norm = layer.mixer_norm.detach().float(), layer.mlp_norm.detach().float()
    into = [x.detach() * norm for x in layer.mixer.inputs()]
    return [*into, layer.mixer.out, layer.up.detach() * mlp_norm, layer.down]


_Addresses = tuple[int, int, int, int]


def _recurrent(
    weights: LayerWeights, before: State, h: Tensor, passes: int
) -> tuple[RecurrentState, _Addresses, Tensor | None]:
    """The state after a launch, its addresses as `_C.cuda_blocks` takes them, and what must live until the launch."""
    conv, fast = weights.mixer.carried(h.shape[0], 0)
    last, past = h.new_empty(2, *conv), None
    if before is None:
        state = h.new_empty(fast, dtype=torch.float32)
    else:
        assert isinstance(before, RecurrentState)
        past, state = before.conv.to(h.dtype).contiguous(), _copied(before.state)
    addresses = (past is not None, state.data_ptr(), last.data_ptr(), 0 if past is None else past.data_ptr())
    return RecurrentState(last[(passes - 1) % 2], state), addresses, past


def _copied(state: Tensor) -> Tensor:
    """A contiguous copy in float32, which the launch writes to."""
    return state.to(torch.float32, memory_format=torch.contiguous_format, copy=True)


def _attention(weights: LayerWeights, before: State, h: Tensor, passes: int) -> tuple[KVState, _Addresses, None]:
    """Do the same as `_recurrent` for an attention layer: keys and values take the place of the state."""
    kept = 0 if before is None else before[0].shape[2]
    keys, values = weights.mixer.carried(h.shape[0], kept + h.shape[1])
    after = KVState(h.new_empty(keys), h.new_empty(values))
    if before is not None:
        for to, old in zip(after, before, strict=True):
            to.narrow(2, 0, kept).copy_(old)
    return after, (kept, after.keys.data_ptr(), after.values.data_ptr(), 0), None
