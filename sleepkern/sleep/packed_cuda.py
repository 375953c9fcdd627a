"""Hybrid blocks as the CUDA kernel takes them: a plan, weights in the order in which it multiplies by them, the launch.

csrc/cuda/blocks.cuh is the other side. A cluster of thread blocks takes a group of windows; each has its share of the
heads, of the MLP's columns and of the columns of h.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import functional as F

from ..backends import cuda
from ..backends.tensors import on_device_of
from .memory import Fast, Slow
from .packed import State, _eps
from .plan_cuda import TILE, WARPS, Plan, Shape, paired, plan, share, sizes, up

if TYPE_CHECKING:
    from ..nn import HybridBlock

TAPS, STAGE = 4, 2
"""Tokens of a convolution; fragments that a warp asks for at a time."""
WIDEST, LONGEST, HEAD = 512, 128, 128
Round = tuple[Sequence[int], Sequence[int]]
"""Groups of 16 outputs that warps multiply by at a time: the first ones, one a warp, and the second ones."""
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_packed: WeakKeyDictionary[HybridBlock, dict[Any, Packed]] = WeakKeyDictionary()


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
    if plan(B, L, d, shapes, cuda.device_at_hand()) is None:
        return "the window does not fit a cluster's shared memory"
    return None


def run(
    h: Tensor, blocks: Sequence[HybridBlock], states: Sequence[State], passes: int, reinject: bool, carry: bool
) -> tuple[Tensor, list[Fast | Slow], Tensor]:
    """h [B,L,d] after all passes, what each block remembers, and [passes] relative changes of the state."""
    B, L, d = h.shape
    found = plan(B, L, d, _shapes(blocks), cuda.device_at_hand())
    assert found is not None
    weights = packed(blocks, found, h.device)
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
        "stages": weights.stages.data_ptr(),
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
    """Weights of a stack of blocks for a plan: bf16, each norm multiplied into the product after it.

    stream  fragments of 16 outputs x 16 terms: warp after warp of thread block after thread block
    stages  [cluster, warps, 2] where a warp's begin, and how many
    """

    def __init__(self, blocks: Sequence[HybridBlock], p: Plan, device: torch.device) -> None:
        self.blocks = list(blocks)
        self.version = _version(blocks)
        self.plan = p
        self.alive: list[Tensor] = []
        self.layers: list[dict[str, Any]] = []
        parts: list[list[list[Tensor]]] = [[[] for _ in range(WARPS)] for _ in range(p.cluster)]
        for block, shape in zip(blocks, _shapes(blocks), strict=True):
            self.layers.append(share(shape, p.cluster) | self._layer(block, shape))
            for rank in range(p.cluster):
                for weight, rounds, splits in self._products(block, shape, rank):
                    for warp, fragments in _by_warp(_fragments(weight), rounds, splits):
                        parts[rank][warp].append(fragments)
        streams, starts, first = [], [], 0
        for warp_parts in (warp for rank in parts for warp in rank):
            stream = torch.cat(warp_parts) if warp_parts else torch.zeros(0, 256, device=device)
            streams.append(stream.to(torch.bfloat16))
            starts.append((first, len(stream) // STAGE))
            first += len(stream) // STAGE
        self.stream = torch.cat(streams)
        self.stages = torch.tensor(starts, dtype=torch.int32).to(device)

    def _layer(self, block: HybridBlock, s: Shape) -> dict[str, Any]:
        mixer: Any = block.mixer
        epsilons = {"mixer_eps": _eps(block.mixer_norm), "mlp_eps": _eps(block.mlp_norm)}
        own = share(s, self.plan.cluster)
        if not block.recurrent:
            return epsilons | {
                "q_gain": self._floats(mixer.q_norm.weight * s.K**-0.5, own["KP"]),
                "k_gain": self._floats(mixer.k_norm.weight, own["KP"]),
                "q_eps": _eps(mixer.q_norm),
                "k_eps": _eps(mixer.k_norm),
            }
        taps = F.pad(mixer.convolution.weight.detach().float(), (TAPS - s.W, 0))
        q, k, v = taps.split(mixer.split)
        by_rank = [
            torch.cat([_heads(x, n, width, self.plan.cluster, rank) for x, n, width in self._inputs(s, q, k, v)])
            for rank in range(self.plan.cluster)
        ]
        return epsilons | {
            "taps": self._floats(torch.stack(by_rank)),
            "gain": self._floats(mixer.norm.weight, own["VP"]),
            "gain_eps": mixer.norm.eps,
            "decay_bias": mixer.decay_bias,
            "strength": mixer.strength,
        }

    @staticmethod
    def _inputs(s: Shape, q: Tensor, k: Tensor, *values: Tensor) -> list[tuple[Tensor, int, int]]:
        """Each with its heads and their width."""
        return [(q, s.heads, s.K), (k, s.heads, s.K), *((v, s.value_heads, s.V) for v in values)]

    def _products(self, block: HybridBlock, s: Shape, rank: int) -> Iterator[tuple[Tensor, list[Round], int]]:
        """Each weight of a layer [outputs, terms], in what order and how many parts they are multiplied by."""
        p, m = self.plan, cast(Any, block.mixer)
        all_columns = p.cluster * p.columns
        norm, mlp_norm = (n.weight.detach().float() for n in (block.mixer_norm, block.mlp_norm))
        parts = [*m.qkv.weight.detach().float().split([s.heads * s.K] * 2 + [s.value_heads * s.V])]
        if s.recurrent:
            parts.append(m.gate.weight.detach().float())
        rows = [_heads(x, n, width, p.cluster, rank) for x, n, width in self._inputs(s, *parts)]
        into = torch.cat(rows) * norm
        yield _padded(into, len(into), all_columns), _rounds(len(into) // TILE), 1
        if s.recurrent:
            rates = m.rates.weight.detach().float().view(2, p.cluster, -1, len(norm))[:, rank].flatten(0, 1) * norm
            groups, splits = -(-len(rates) // TILE), _splits(p)
            each: list[Round] = [([group] * splits, []) for group in range(groups)]
            yield _padded(rates, groups * TILE, all_columns), each, splits

        exchanges = self._exchanges()
        columns = m.out.weight.detach().float().T  # one row a term
        terms = _heads(columns, s.value_heads, s.V, p.cluster, rank)
        yield _padded(terms.T, all_columns), exchanges, 1

        hidden = share(s, p.cluster)["hidden"]
        mine = slice(rank * hidden, (rank + 1) * hidden)
        wider, down = block.mlp.up.weight.detach().float(), block.mlp.out.weight.detach().float()
        yield _padded(wider[mine] * mlp_norm, hidden, all_columns), _rounds(hidden // TILE), 1
        yield _padded(down[:, mine], all_columns, hidden), exchanges, 1

    def _exchanges(self) -> list[Round]:
        """Of groups of columns of h, those that are summed together: of one owner after another."""
        p = self.plan
        own = p.columns // TILE
        exchanges = [
            [owner * own + group for group in range(first, min(own, first + p.exchange)) for owner in range(p.cluster)]
            for first in range(0, own, p.exchange)
        ]
        if not paired(p.tiles):
            return [(exchange, []) for exchange in exchanges]
        if p.cluster * p.exchange > WARPS:
            return [(exchange[:WARPS], exchange[WARPS:]) for exchange in exchanges]
        return list(zip_longest(exchanges[::2], exchanges[1::2], fillvalue=[]))

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
    if found is None or found.blocks != list(blocks) or found.version != _version(blocks):
        with torch.no_grad():
            found = kept[key] = Packed(blocks, p, device)
    return found


def _version(blocks: Sequence[HybridBlock]) -> tuple[Any, ...]:
    """Changes with every write to a weight."""
    return tuple((p.data_ptr(), p._version) for block in blocks for p in block.parameters())


def _padded(t: Tensor, rows: int, columns: int | None = None) -> Tensor:
    """With zeros up to a size, rounded up to fragments."""
    columns = up(t.shape[1], 16) if columns is None else columns
    return F.pad(t, (0, columns - t.shape[1], 0, rows - t.shape[0]))


def _heads(x: Tensor, heads: int, width: int, cluster: int, rank: int) -> Tensor:
    """Rows of one thread block's heads, each with zeros up to a multiple of 16."""
    mine = x.unflatten(0, (heads, width))[rank * (heads // cluster) : (rank + 1) * (heads // cluster)]
    return F.pad(mine, (0, 0, 0, up(width, TILE) - width)).flatten(0, 1)


def _fragments(weight: Tensor) -> Tensor:
    """[outputs / 16, terms / 16, 256] of a weight [outputs, terms], as lanes hold right operands (csrc/cuda/tile.h)."""
    groups, steps = weight.shape[0] // 16, weight.shape[1] // 16
    x = weight.reshape(groups, 2, 8, steps, 2, 4, 2)  # group, half, g; step, half, t, pair
    return x.permute(0, 3, 2, 5, 1, 4, 6).reshape(groups, steps, 256)


def _rounds(groups: int) -> list[Round]:
    every = range(groups)
    return [(every[i : i + WARPS], every[i + WARPS : i + 2 * WARPS]) for i in range(0, groups, 2 * WARPS)]


def _splits(p: Plan) -> int:
    """Parts of the terms of the rates, as csrc/cuda/blocks_call.h has it."""
    return next(n for n in (8, 4, 2, 1) if n <= p.cluster * p.exchange)


def _by_warp(fragments: Tensor, rounds: list[Round], splits: int) -> Iterator[tuple[int, Tensor]]:
    """Fragments [n, 256] of a warp in the order of csrc/cuda/blocks_stream.cuh, in whole stages."""
    for one, other in rounds:
        for warp in range(len(one)):
            mine = [one[warp], other[warp]] if warp < len(other) else [one[warp]]
            taken = fragments[mine][:, warp % splits :: splits].transpose(0, 1).reshape(-1, 256)
            yield warp, F.pad(taken, (0, 0, 0, -len(taken) % STAGE))


def _fast(mixer: Any, before: State, h: Tensor, passes: int) -> tuple[dict[str, int], Fast, Any]:
    channels, W = mixer.convolution.weight.shape
    B, past = h.shape[0], None
    last = h.new_empty(2, B, W - 1, channels)
    if before is None:
        state = h.new_empty(B, mixer.value_heads, mixer.key_width, mixer.value_width, dtype=torch.float32)
    else:
        assert isinstance(before, Fast)
        past, state = before.conv.to(h.dtype).contiguous(), before.state.float().contiguous().clone()
    own = {
        "state": state.data_ptr(),
        "past": 0 if past is None else past.data_ptr(),
        "last": last.data_ptr(),
        "continued": before is not None,
    }
    return own, Fast(last[(passes - 1) % 2], state), past


def _slow(mixer: Any, before: State, h: Tensor, passes: int) -> tuple[dict[str, int], Slow, Any]:
    B, L, _ = h.shape
    kept = 0 if before is None else before[0].shape[2]
    size = (B, mixer.heads, kept + L, mixer.q_norm.weight.shape[0])
    after = Slow(h.new_empty(size), h.new_empty(size))
    if before is not None:
        for to, old in zip(after, before, strict=True):
            to[:, :, :kept] = old
    return {"keys": after.keys.data_ptr(), "values": after.values.data_ptr(), "kept": kept}, after, None
