"""Hybrid blocks as the CUDA kernel takes them, and its launch.

csrc/cuda/blocks/kernel.cuh is the other side. A cluster of thread blocks takes a group of windows; each has its share
of the heads, of the MLP's columns and of the columns of h.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import functional as F

from ..state import KVState, RecurrentState, State
from . import cuda
from .cpu_blocks import Source, _eps
from .cuda_blocks_order import Order, heads_of, order
from .cuda_blocks_plan import TILE, Plan, Shape, paired, plan, share, sizes, slower
from .tensors import on_device_of

if TYPE_CHECKING:
    from ..nn import HybridBlock

TAPS = 4
"""Tokens of a convolution."""
WIDEST, LONGEST, HEAD = 512, 128, 128
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_packed: WeakKeyDictionary[HybridBlock, dict[Any, Packed]] = WeakKeyDictionary()
_reading: list[list[Packed]] = []


def why_not(h: Tensor, blocks: Sequence[HybridBlock]) -> str | None:
    """None where the blocks' passes over h can be one launch, else the sentence why they run module by module.

    h is [B,L,d], or any tensor of its type and device: then its sizes are not asked about.
    """
    reason = cuda.why_not_on(h.device.type)
    if reason is not None:
        return reason
    types = {str(t.dtype) for t in (h, *(p for block in blocks for p in block.parameters()))}
    if len(types) > 1:
        return f"one launch for h and weights of one type, got {', '.join(sorted(types))}"
    captured = h.is_cuda and torch.cuda.is_current_stream_capturing()
    if captured and not _reading:
        return "a CUDA graph of the caller's own would not keep the packed weights; SleepSession(capture=True) does"
    if h.dtype != torch.bfloat16 and torch.get_float32_matmul_precision() != "medium":
        return (
            f"one launch multiplies in bfloat16, which {h.dtype} allows only with "
            'torch.set_float32_matmul_precision("medium")'
        )
    if len(blocks) > cuda._C.cuda_blocks_layers:
        return f"one launch for at most {cuda._C.cuda_blocks_layers} blocks, got {len(blocks)}"
    shapes = _shapes(blocks)
    if max(max(s.K, s.V) for s in shapes) > HEAD or max(s.W for s in shapes) > TAPS:
        return f"one launch for heads of at most {HEAD} and short convolutions of at most {TAPS} tokens"
    if h.ndim != 3:
        return None
    B, L, d = h.shape
    if d > WIDEST or L > LONGEST:
        return f"one launch for windows of at most {LONGEST} tokens and widths of at most {WIDEST}, got {L} and {d}"
    device = cuda.device_at_hand()
    found = plan(B, L, d, shapes, device)
    if found is None:
        return "the window does not fit a cluster's shared memory"
    return slower(found, B, device, captured)


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


def run(
    h: Tensor, blocks: Sequence[HybridBlock], states: Sequence[State], passes: int, reinject: bool, carry: bool
) -> tuple[Tensor, list[RecurrentState | KVState], Tensor]:
    """h [B,L,d] after all passes, what each block remembers, and [passes] relative changes of the state."""
    B, L, d = h.shape
    found = plan(B, L, d, _shapes(blocks), cuda.device_at_hand())
    assert found is not None
    weights = packed(blocks, found, h.device)
    for read in _reading:
        read.append(weights)
    h = h.contiguous()
    out = torch.empty_like(h)
    layers, after, alive, units = [], [], [], 0
    for layer, block, state in zip(weights.layers, blocks, states, strict=True):
        own, now, read = (_fast if block.recurrent else _slow)(block.mixer, state, h, passes)
        layers.append(layer | own | {"first_unit": units})
        if block.recurrent:
            units += B * found.cluster * layer["value_heads"] * layer["VP"] // TILE
        after.append(now)
        alive.append(read)
    changes = h.new_empty(passes, units, 2, dtype=torch.float32)
    call = sizes(found) | {
        "h": h.data_ptr(),
        "out": out.data_ptr(),
        "weights": weights.stream.data_ptr(),
        "stages": weights.order.stages.data_ptr(),
        "changes": changes.data_ptr(),
        "type": _TYPES[h.dtype],
        "B": B,
        "L": L,
        "d": d,
        "passes": passes,
        "reinject": reinject,
        "carry": carry,
        "units": units,
    }
    with on_device_of(h):
        cuda._C.cuda_blocks(call, layers, cuda._stream(h))
    squares = changes.sum(1, dtype=torch.float64).sqrt()
    return out, after, (squares[:, 0] / squares[:, 1].clamp_min(1e-30)).float()


def _shapes(blocks: Sequence[HybridBlock]) -> tuple[Shape, ...]:
    shapes = []
    for block in blocks:
        mixer: Any = block.mixer
        hidden = block.mlp.up.weight.shape[0]
        if block.recurrent:
            W = mixer.convolution.weight.shape[1]
            sizes = (mixer.heads, mixer.value_heads, mixer.key_width, mixer.value_width, W, hidden)
        else:
            D = mixer.q_norm.weight.shape[0]
            sizes = (mixer.heads, mixer.heads, D, D, 1, hidden)
        shapes.append(Shape(block.recurrent, *sizes))
    return tuple(shapes)


class Packed:
    """Weights of a stack of blocks for a plan, in bf16, each norm multiplied into the product after it."""

    def __init__(
        self, blocks: Sequence[HybridBlock], p: Plan, device: torch.device, before: Packed | None = None
    ) -> None:
        """before: of the same plan, whose order is taken over if it is that of these blocks."""
        self.source, self.forgotten = Source(blocks), False
        self.cluster = p.cluster
        self.alive: list[Tensor] = []
        shapes = _shapes(blocks)
        self.layers = [share(s, p.cluster) | self._layer(block, s) for block, s in zip(blocks, shapes, strict=True)]
        weights = [w.to(torch.bfloat16).flatten() for block in blocks for w in _weights(block)]
        self.ordered = (blocks[0].mixer_norm.weight.shape[0], shapes, device)
        same = before is not None and before.ordered == self.ordered
        self.order: Order = before.order if before is not None and same else order(*self.ordered, p)
        self.stream = torch.cat([weights[0].new_zeros(1), *weights]).index_select(0, self.order.places)

    def holds(self, blocks: Sequence[HybridBlock]) -> bool:
        """Whether these are its blocks, and their weights what they were."""
        return not self.forgotten and self.source.holds(blocks)

    def current(self) -> bool:
        """Whether its blocks are still there, with the weights that were packed."""
        return not self.forgotten and self.source.current()

    def _layer(self, block: HybridBlock, s: Shape) -> dict[str, Any]:
        mixer: Any = block.mixer
        epsilons = {"mixer_eps": _eps(block.mixer_norm), "mlp_eps": _eps(block.mlp_norm)}
        own = share(s, self.cluster)
        if not block.recurrent:
            return epsilons | {
                "q_gain": self._floats(mixer.q_norm.weight * s.K**-0.5, own["KP"]),
                "k_gain": self._floats(mixer.k_norm.weight, own["KP"]),
                "q_eps": _eps(mixer.q_norm),
                "k_eps": _eps(mixer.k_norm),
            }
        taps = F.pad(mixer.convolution.weight.detach().float(), (TAPS - s.W, 0))
        parts = zip(taps.split(mixer.split), (s.heads, s.heads, s.value_heads), (s.K, s.K, s.V), strict=True)
        q, k, v = ([heads_of(x, n, width, self.cluster, r) for r in range(self.cluster)] for x, n, width in parts)
        return epsilons | {
            "taps": self._floats(torch.cat([x for each in zip(q, k, v, strict=True) for x in each])),
            "gain": self._floats(mixer.norm.weight, own["VP"]),
            "gain_eps": mixer.norm.eps,
            "decay_bias": mixer.decay_bias,
            "strength": mixer.strength,
        }

    def _floats(self, t: Tensor, width: int | None = None) -> int:
        """The address of a copy, with zeros up to a width, that lives as long as this."""
        kept = t.detach().float()
        kept = kept.contiguous().clone() if width is None else F.pad(kept, (0, width - len(kept))).contiguous()
        self.alive.append(kept)
        return kept.data_ptr()


def packed(blocks: Sequence[HybridBlock], p: Plan, device: torch.device) -> Packed:
    """Of these blocks for a plan, made anew if their weights are not what they were."""
    key = (p.cluster, p.columns, p.exchange, paired(p.tiles), len(blocks))
    kept = _packed.setdefault(blocks[0], {})
    found = kept.get(key)
    if found is None or not found.holds(blocks):
        with torch.no_grad():
            found = kept[key] = Packed(blocks, p, device, found)
    return found


def forget(block: HybridBlock) -> None:
    """What was packed of stacks that begin with this block; recordings that read it see that it is not current."""
    for found in _packed.pop(block, {}).values():
        found.forgotten = True


def _weights(block: HybridBlock) -> list[Tensor]:
    """As `cuda_blocks_order.sizes_of` has them."""
    m, mlp = cast(Any, block.mixer), block.mlp
    norm, mlp_norm = (n.weight.detach().float() for n in (block.mixer_norm, block.mlp_norm))
    into = [m.qkv, m.gate, m.rates] if block.recurrent else [m.qkv]
    return [*(x.weight.detach() * norm for x in into), m.out.weight, mlp.up.weight.detach() * mlp_norm, mlp.out.weight]


def _fast(mixer: Any, before: State, h: Tensor, passes: int) -> tuple[dict[str, int], RecurrentState, Any]:
    channels, W = mixer.convolution.weight.shape
    B, past = h.shape[0], None
    last = h.new_empty(2, B, W - 1, channels)
    if before is None:
        state = h.new_empty(B, mixer.value_heads, mixer.key_width, mixer.value_width, dtype=torch.float32)
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


def _slow(mixer: Any, before: State, h: Tensor, passes: int) -> tuple[dict[str, int], KVState, Any]:
    B, L, _ = h.shape
    kept = 0 if before is None else before[0].shape[2]
    size = (B, mixer.heads, kept + L, mixer.q_norm.weight.shape[0])
    after = KVState(h.new_empty(size), h.new_empty(size))
    if before is not None:
        for to, old in zip(after, before, strict=True):
            to[:, :, :kept] = old
    return {"keys": after.keys.data_ptr(), "values": after.values.data_ptr(), "kept": kept}, after, None
