"""Hybrid blocks as the CUDA kernel takes them, and its launch.

csrc/cuda/blocks/kernel.cuh is the other side. A cluster of thread blocks takes a group of windows; each has its share
of the heads, of the MLP's columns and of the columns of h.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
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
from . import recurrence as cuda
from .blocks_plan import TILE, Plan, Shape, paired, plan, share, sizes, slower
from .blocks_weight_layout import Order, heads_of, order

NAME = cuda.NAME
SUPPORTS = frozenset({AttentionWeights, GatedDeltaWeights})
RECORDED = False
TAPS = 4
"""Tokens of a convolution."""
WIDEST, LONGEST, HEAD = 512, 128, 128
_packed: WeakKeyDictionary[Any, dict[Any, Packed]] = WeakKeyDictionary()
"""The packed weights of each stack, keyed by its first block and then by plan."""
_reading: list[list[Packed]] = []


def why_not(problem: BlockProblem) -> str | None:
    """None where all passes can be one launch, else the sentence why not."""
    reason = cuda.why_not_on(problem.device) or problem.refusal
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
    if len(problem.layers) > _C.cuda_blocks_layers:
        return f"one launch for at most {_C.cuda_blocks_layers} blocks, got {len(problem.layers)}"
    shapes = shapes_of(problem.layers)
    if max(max(s.K, s.V) for s in shapes) > HEAD or max(s.W for s in shapes) > TAPS:
        return f"one launch for heads of at most {HEAD} and short convolutions of at most {TAPS} tokens"
    if problem.sizes is None:
        return None
    B, L, d = problem.sizes
    if d > WIDEST or L > LONGEST:
        return f"one launch for windows of at most {LONGEST} tokens and widths of at most {WIDEST}, got {L} and {d}"
    device = cuda.device_at_hand()
    found = plan(B, L, d, shapes, device)
    if found is None:
        return "the window does not fit a cluster's shared memory"
    return slower(found, B, device, captured)


def kernel(problem: BlockProblem) -> str:
    """One line on the code that runs."""
    if problem.sizes is None:
        return "CUDA, all passes in one launch"
    B, L, d = problem.sizes
    found = plan(B, L, d, shapes_of(problem.layers), cuda.device_at_hand())
    assert found is not None
    return f"CUDA, all passes in one launch, {found.group} windows for each cluster of {found.cluster} thread blocks"


@contextmanager
def reading() -> Iterator[list[Packed]]:
    """Packed weights that launches read meanwhile: who records launches has to keep them, and to look whether they are
    still `current` before each replay."""
    read: list[Packed] = []
    _reading.append(read)
    try:
        yield read
    finally:
        _reading[:] = [other for other in _reading if other is not read]


def run(problem: BlockProblem, h: Tensor, blocks: Sequence[Any], states: Sequence[State]) -> Slept:
    """Products in bfloat16; results in the types that modules leave."""
    (B, L, d), passes = h.shape, problem.passes
    found = plan(B, L, d, shapes_of(problem.layers), cuda.device_at_hand())
    assert found is not None
    packed_weights = packed(blocks, problem.layers, found, h.device)
    for read in _reading:
        read.append(packed_weights)
    h = h.contiguous()
    out = torch.empty_like(h)
    layers: list[dict[str, Any]] = []
    after: list[RecurrentState | KVState] = []
    alive, units = [], 0
    for layer, weights, state in zip(packed_weights.layers, problem.layers, states, strict=True):
        own, now, kept = (_recurrent if weights.recurrent else _attention)(weights, state, h, passes)
        layers.append(layer | own | {"first_unit": units})
        if weights.recurrent:
            units += B * found.cluster * layer["value_heads"] * layer["VP"] // TILE
        after.append(now)
        alive.append(kept)
    changes = h.new_empty(passes, units, 2, dtype=torch.float32)
    call = sizes(found) | {
        "h": h.data_ptr(),
        "out": out.data_ptr(),
        "weights": packed_weights.stream.data_ptr(),
        "stages": packed_weights.order.stages.data_ptr(),
        "changes": changes.data_ptr(),
        "type": TYPE_CODES[h.dtype],
        "B": B,
        "L": L,
        "d": d,
        "passes": passes,
        "reinject": problem.reinject,
        "carry": problem.carry,
        "units": units,
    }
    with on_device_of(h):
        _C.cuda_blocks(call, layers, stream_of(h))
    squares = changes.sum(1, dtype=torch.float64).sqrt()
    return Slept(out, after, (squares[:, 0] / squares[:, 1].clamp_min(1e-30)).float())


def shapes_of(layers: Sequence[LayerWeights]) -> tuple[Shape, ...]:
    """The sizes of each layer that a plan depends on."""
    return tuple(Shape(layer.recurrent, *_widths(layer.mixer), layer.up.shape[0]) for layer in layers)


def _widths(m: AttentionWeights | GatedDeltaWeights) -> tuple[int, int, int, int, int]:
    """H, HV, K, V, W."""
    if isinstance(m, GatedDeltaWeights):
        return m.heads, m.value_heads, m.key_width, m.value_width, m.convolution.shape[1]
    D = m.q_norm.shape[0]
    return m.heads, m.heads, D, D, 1


class Packed:
    """Weights of a stack of blocks for a plan, in bf16, each norm multiplied into the product after it."""

    def __init__(
        self,
        blocks: Sequence[Any],
        layers: Sequence[LayerWeights],
        p: Plan,
        device: torch.device,
        before: Packed | None = None,
    ) -> None:
        """before: of the same plan, whose order is taken over if it is that of these blocks."""
        self.source, self.forgotten = Source(blocks, layers), False
        self.cluster = p.cluster
        self.alive: list[Tensor] = []
        shapes = shapes_of(layers)
        self.layers = [share(s, p.cluster) | self._layer(layer, s) for layer, s in zip(layers, shapes, strict=True)]
        weights = [w.to(torch.bfloat16).flatten() for layer in layers for w in _weights(layer)]
        self.ordered = (layers[0].width, shapes, device)
        same = before is not None and before.ordered == self.ordered
        self.order: Order = before.order if before is not None and same else order(*self.ordered, p)
        self.stream = torch.cat([weights[0].new_zeros(1), *weights]).index_select(0, self.order.places)

    def holds(self, blocks: Sequence[Any], layers: Sequence[LayerWeights]) -> bool:
        """True if it was packed from these blocks and their weights have not changed."""
        return not self.forgotten and self.source.holds(blocks, layers)

    def current(self) -> bool:
        """True if its blocks still exist and have the weights that were packed."""
        return not self.forgotten and self.source.current()

    def _layer(self, layer: LayerWeights, s: Shape) -> dict[str, Any]:
        m, own = layer.mixer, share(s, self.cluster)
        epsilons = {"mixer_eps": layer.mixer_eps, "mlp_eps": layer.mlp_eps}
        if isinstance(m, AttentionWeights):
            return epsilons | {
                "q_gain": self._floats(m.q_norm * s.K**-0.5, own["KP"]),
                "k_gain": self._floats(m.k_norm, own["KP"]),
                "q_eps": m.q_eps,
                "k_eps": m.k_eps,
            }
        taps, keys = F.pad(m.convolution.detach().float(), (TAPS - s.W, 0)), s.heads * s.K
        split = taps.split((keys, keys, s.value_heads * s.V))
        parts = zip(split, (s.heads, s.heads, s.value_heads), (s.K, s.K, s.V), strict=True)
        q, k, v = ([heads_of(x, n, width, self.cluster, r) for r in range(self.cluster)] for x, n, width in parts)
        return epsilons | {
            "taps": self._floats(torch.cat([x for each in zip(q, k, v, strict=True) for x in each])),
            "gain": self._floats(m.norm, own["VP"]),
            "gain_eps": m.norm_eps,
            "decay_bias": m.decay_bias,
            "strength": m.strength,
        }

    def _floats(self, t: Tensor, width: int | None = None) -> int:
        """The address of a copy, with zeros up to a width, that lives as long as this."""
        kept = t.detach().float()
        kept = kept.contiguous().clone() if width is None else F.pad(kept, (0, width - len(kept))).contiguous()
        self.alive.append(kept)
        return kept.data_ptr()


def packed(blocks: Sequence[Any], layers: Sequence[LayerWeights], p: Plan, device: torch.device) -> Packed:
    """Of these blocks for a plan, made anew if their weights are not what they were."""
    key = (p.cluster, p.columns, p.exchange, paired(p.tiles), len(blocks))
    kept = _packed.setdefault(blocks[0], {})
    found = kept.get(key)
    if found is None or not found.holds(blocks, layers):
        with torch.no_grad():
            found = kept[key] = Packed(blocks, layers, p, device, found)
    return found


def forget(block: Any) -> None:
    """What was packed of stacks that begin with this block; recordings that read it see that it is not current."""
    for found in _packed.pop(block, {}).values():
        found.forgotten = True


def _weights(layer: LayerWeights) -> list[Tensor]:
    """As `cuda_blocks_order.sizes_of` has them."""
    norm, mlp_norm = layer.mixer_norm.detach().float(), layer.mlp_norm.detach().float()
    into = [x.detach() * norm for x in layer.mixer.inputs()]
    return [*into, layer.mixer.out, layer.up.detach() * mlp_norm, layer.down]


def _recurrent(
    weights: LayerWeights, before: State, h: Tensor, passes: int
) -> tuple[dict[str, int], RecurrentState, Any]:
    """What a launch reads and writes of the state of a layer, that state after it, and what must live meanwhile."""
    conv, fast = weights.mixer.carried(h.shape[0], 0)
    last, past = h.new_empty(2, *conv), None
    if before is None:
        state = h.new_empty(fast, dtype=torch.float32)
    else:
        assert isinstance(before, RecurrentState)
        past, state = before.conv.to(h.dtype).contiguous(), before.state.float().contiguous().clone()
    own = {
        "state": state.data_ptr(),
        "past": 0 if past is None else past.data_ptr(),
        "last": last.data_ptr(),
        "continued": before is not None,
    }
    return own, RecurrentState(last[(passes - 1) % 2], state), past


def _attention(weights: LayerWeights, before: State, h: Tensor, passes: int) -> tuple[dict[str, int], KVState, Any]:
    """The same as `_recurrent` for an attention layer: keys and values take the place of the state."""
    kept = 0 if before is None else before[0].shape[2]
    after = KVState(*(h.new_empty(size) for size in weights.mixer.carried(h.shape[0], kept + h.shape[1])))
    if before is not None:
        for to, old in zip(after, before, strict=True):
            to[:, :, :kept] = old
    return {"keys": after.keys.data_ptr(), "values": after.values.data_ptr(), "kept": kept}, after, None
