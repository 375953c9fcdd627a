"""Hybrid blocks as the CUDA kernel takes them: a plan, weights in the order in which it multiplies by them, the launch.

csrc/cuda/blocks.cuh is the other side. A cluster of thread blocks takes a group of windows; each has its share of the
heads, of the MLP's columns and of the columns of h.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import functional as F

from ..backends import cuda
from .memory import Fast, Slow
from .packed import State, _eps

if TYPE_CHECKING:
    from ..nn import HybridBlock

WARPS, TAPS, STAGE = 8, 4, 2
"""Warps of a thread block, tokens of a convolution, and fragments that are asked for at a time."""
TILES = (2, 5, 8)
"""Of 16 rows, which kernels there are for."""
CLUSTERS = (8, 4, 2, 1)
WIDEST, LONGEST, HEAD = 512, 128, 128
RINGS = (16, 12, 8, 6, 4, 3, 2)
"""Stages of a warp, best first."""
EIGHT = 8
"""Value columns whose sums of squares stand together."""
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_packed: WeakKeyDictionary[HybridBlock, dict[Any, Packed]] = WeakKeyDictionary()


class Plan(NamedTuple):
    """How a call is cut.

    cluster   thread blocks that share a group of windows
    group     windows of a group
    tiles     of 16 rows, which a group fills up
    columns   of h in a thread block
    exchange  of those how many, by 16, are summed over the cluster at a time
    ring      stages of weights that a warp has on their way
    """

    cluster: int
    group: int
    tiles: int
    columns: int
    exchange: int
    ring: int


class Shape(NamedTuple):
    """Of a layer, what a plan depends on."""

    recurrent: bool
    heads: int
    value_heads: int
    K: int
    V: int
    W: int
    hidden: int


def why_not(h: Tensor, blocks: Sequence[HybridBlock]) -> str | None:
    """None where the blocks' passes over h can be one launch, else the sentence why they run module by module."""
    reason = cuda.why_not_on(h.device.type)
    if reason is not None:
        return reason
    types = {p.dtype for block in blocks for p in block.parameters()} | {h.dtype}
    if len(types) > 1 or h.dtype not in _TYPES:
        return f"one launch for h and weights of one type of at most 32 bits, got {', '.join(map(str, sorted(types, key=str)))}"
    if h.dtype != torch.bfloat16 and torch.get_float32_matmul_precision() != "medium":
        return (
            f"one launch multiplies in bfloat16, which {h.dtype} allows only with "
            'torch.set_float32_matmul_precision("medium")'
        )
    B, L, d = h.shape
    if d > WIDEST or L > LONGEST:
        return f"one launch for windows of at most {LONGEST} tokens and widths of at most {WIDEST}, got {L} and {d}"
    if len(blocks) > cuda._C.cuda_blocks_layers:
        return f"one launch for at most {cuda._C.cuda_blocks_layers} blocks, got {len(blocks)}"
    shapes = _shapes(blocks)
    if max(max(s.K, s.V) for s in shapes) > HEAD or max(s.W for s in shapes) > TAPS:
        return f"one launch for heads of at most {HEAD} and short convolutions of at most {TAPS} tokens"
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
            units += B * block.mixer.value_heads * layer["VP"] // EIGHT
        after.append(now)
        alive.append(read)
    changes = h.new_empty(passes, units, 2, dtype=torch.float32)
    call = _sizes(found) | {
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
    with cuda._current(h):
        cuda._C.cuda_blocks(call, layers, cuda._stream(h))
    squares = changes.sum(1, dtype=torch.float64).sqrt()
    return out, after, (squares[:, 0] / squares[:, 1].clamp_min(1e-30)).float()


def plan(B: int, L: int, d: int, shapes: Sequence[Shape], device: cuda.Device) -> Plan | None:
    """The plan that takes least time by `_time`; None where nothing fits."""
    return _plan(B, L, d, tuple(shapes), device)


@lru_cache(maxsize=256)
def _plan(B: int, L: int, d: int, shapes: tuple[Shape, ...], device: cuda.Device) -> Plan | None:
    plans = []
    for cluster in CLUSTERS if device.capability >= (9, 0) else (1,):
        if cluster > device.multiprocessors or any(s.heads % cluster for s in shapes):
            continue
        columns = _up(-(-d // cluster), 16)
        for tiles in TILES:
            group = min(16 * tiles // _up(L, 8), B)
            fits = _fit(Plan(cluster, group, tiles, columns, columns // 16, RINGS[0]), shapes, device) if group else None
            if fits is not None:
                plans.append(fits)
    return min(plans, key=lambda p: _time(p, B, d, shapes, device), default=None)


def _fit(tried: Plan, shapes: Sequence[Shape], device: cuda.Device) -> Plan | None:
    """With as much at a time as shared memory holds: exchanges first, they make the cluster wait."""
    layers = [_share(s, tried.cluster) for s in shapes]
    for exchange in range(tried.exchange, 0, -1):
        for ring in RINGS:
            found = tried._replace(exchange=exchange, ring=ring)
            if cuda._C.cuda_blocks_memory(_sizes(found), layers) <= device.shared_memory:
                return found
            if ring <= 4 and exchange > 1:
                break
    return None


def _time(p: Plan, B: int, d: int, shapes: Sequence[Shape], device: cuda.Device) -> float:
    """Clocks of a pass, roughly: of products or of their weights' way from L2, and of what is waited for."""
    waves = -(-(-(-B // p.group)) // (device.multiprocessors // p.cluster))
    total = 0.0
    for s in shapes:
        inner = s.value_heads * s.V
        weights = d * (2 * s.heads * s.K + inner * (3 if s.recurrent else 2) + 2 * s.hidden) / p.cluster
        total += max(2 * weights / 50, 2 * weights * 16 * p.tiles / 2000)
        total += 1000 * (4 if p.cluster > 1 else 2) + 500 * 2 * (p.columns // 16 // p.exchange - 1)
        total += 16 * p.tiles * d * 10 / 32 if p.cluster > 1 else 0
        walks = -(-p.group * (s.value_heads // p.cluster) * -(-s.V // EIGHT) // WARPS)
        total += 160 * walks * 16 * p.tiles / p.group if s.recurrent else 2000
    return waves * total


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


def _share(s: Shape, cluster: int) -> dict[str, int]:
    """Sizes of a layer in one thread block."""
    multiple = 32 if s.recurrent else 16
    KP, VP = _up(s.K, multiple), _up(s.V, multiple)
    heads, value_heads = s.heads // cluster, s.value_heads // cluster
    return {
        "recurrent": s.recurrent,
        "heads": heads,
        "value_heads": value_heads,
        "K": s.K,
        "V": s.V,
        "KP": KP,
        "VP": VP,
        "W": s.W,
        "into": 2 * heads * KP + value_heads * VP * (2 if s.recurrent else 1),
        "hidden": _up(-(-s.hidden // cluster), 16),
    }


def _sizes(p: Plan) -> dict[str, int]:
    return p._asdict()


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


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
            self.layers.append(_share(shape, p.cluster) | self._layer(block, shape))
            for rank in range(p.cluster):
                for weight, groups in self._products(block, shape, rank):
                    for warp, fragments in _by_warp(_fragments(weight), groups):
                        parts[rank][warp].append(fragments)
        streams, starts, first = [], [], 0
        for warp_parts in (warp for rank in parts for warp in rank):
            stream = torch.cat(warp_parts) if warp_parts else torch.zeros(0, 256, device=device)
            stream = F.pad(stream, (0, 0, 0, -len(stream) % STAGE))
            streams.append(stream.to(torch.bfloat16))
            starts.append((first, len(stream) // STAGE))
            first += len(stream) // STAGE
        self.stream = torch.cat(streams)
        self.stages = torch.tensor(starts, dtype=torch.int32).to(device)

    def _layer(self, block: HybridBlock, s: Shape) -> dict[str, Any]:
        mixer: Any = block.mixer
        epsilons = {"mixer_eps": _eps(block.mixer_norm), "mlp_eps": _eps(block.mlp_norm)}
        share = _share(s, self.plan.cluster)
        if not block.recurrent:
            return epsilons | {
                "q_gain": self._floats(mixer.q_norm.weight * s.K**-0.5, share["KP"]),
                "k_gain": self._floats(mixer.k_norm.weight, share["KP"]),
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
            "gain": self._floats(mixer.norm.weight, share["VP"]),
            "gain_eps": mixer.norm.eps,
            "decay_bias": mixer.decay_bias,
            "strength": mixer.strength,
        }

    @staticmethod
    def _inputs(s: Shape, q: Tensor, k: Tensor, *values: Tensor) -> list[tuple[Tensor, int, int]]:
        """Each with its heads and their width."""
        return [(q, s.heads, s.K), (k, s.heads, s.K), *((v, s.value_heads, s.V) for v in values)]

    def _products(self, block: HybridBlock, s: Shape, rank: int) -> Iterator[tuple[Tensor, list[list[int]]]]:
        """Each weight of a layer [outputs, terms], and its groups of 16 outputs, those of a call of `product` together."""
        p, mixer = self.plan, block.mixer
        share, all_columns = _share(s, p.cluster), p.cluster * p.columns
        norm, mlp_norm = (n.weight.detach().float() for n in (block.mixer_norm, block.mlp_norm))
        m: Any = mixer
        parts = [*m.qkv.weight.detach().float().split([s.heads * s.K] * 2 + [s.value_heads * s.V])]
        if s.recurrent:
            parts.append(m.gate.weight.detach().float())
        rows = [_heads(x, n, width, p.cluster, rank, s.recurrent) for x, n, width in self._inputs(s, *parts)]
        if s.recurrent:
            rates = m.rates.weight.detach().float().view(2, p.cluster, -1, len(norm))[:, rank].flatten(0, 1)
            rows.append(_padded(rates, _up(len(rates), 16), len(norm)))
        into = torch.cat(rows) * norm
        yield _padded(into, len(into), all_columns), [list(range(len(into) // 16))]

        exchanges = self._exchanges()
        columns = mixer.out.weight.detach().float().T  # one row a term
        terms = _heads(columns, s.value_heads, s.V, p.cluster, rank, s.recurrent)
        yield _padded(terms.T, all_columns), exchanges

        up, down = block.mlp.up.weight.detach().float(), block.mlp.out.weight.detach().float()
        hidden = share["hidden"]
        mine = slice(rank * hidden, (rank + 1) * hidden)
        yield _padded(up[mine] * mlp_norm, hidden, all_columns), [list(range(hidden // 16))]
        yield _padded(down[:, mine], all_columns, hidden), exchanges

    def _exchanges(self) -> list[list[int]]:
        """Groups of 16 columns of h, as they are summed together: those of one owner after those of another."""
        p = self.plan
        own = p.columns // 16
        return [
            [owner * own + group for group in range(first, min(own, first + p.exchange)) for owner in range(p.cluster)]
            for first in range(0, own, p.exchange)
        ]

    def _floats(self, t: Tensor, width: int | None = None) -> int:
        """The address of a copy, with zeros up to a width, that lives as long as this."""
        kept = t.detach().float()
        kept = kept.contiguous().clone() if width is None else F.pad(kept, (0, width - len(kept))).contiguous()
        self.alive.append(kept)
        return kept.data_ptr()


def packed(blocks: Sequence[HybridBlock], p: Plan, device: torch.device) -> Packed:
    """Of these blocks for a plan, made anew if their weights are not what they were."""
    key = (p.cluster, p.columns, p.exchange, len(blocks))
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
    columns = _up(t.shape[1], 16) if columns is None else columns
    return F.pad(t, (0, columns - t.shape[1], 0, rows - t.shape[0]))


def _heads(x: Tensor, heads: int, width: int, cluster: int, rank: int, recurrent: bool = True) -> Tensor:
    """Rows of one thread block's heads, each with zeros up to a multiple of 32, in attention of 16."""
    mine = x.unflatten(0, (heads, width))[rank * (heads // cluster) : (rank + 1) * (heads // cluster)]
    return F.pad(mine, (0, 0, 0, _up(width, 32 if recurrent else 16) - width)).flatten(0, 1)


def _fragments(weight: Tensor) -> Tensor:
    """[outputs / 16, terms / 16, 256] of a weight [outputs, terms], as lanes hold right operands (csrc/cuda/tile.h)."""
    groups, steps = weight.shape[0] // 16, weight.shape[1] // 16
    x = weight.reshape(groups, 2, 8, steps, 2, 4, 2)  # group, half, g; step, half, t, pair
    return x.permute(0, 3, 2, 5, 1, 4, 6).reshape(groups, steps, 256)


def _by_warp(fragments: Tensor, calls: list[list[int]]) -> Iterator[tuple[int, Tensor]]:
    """Fragments [n, 256] of a warp in the order of `product` in csrc/cuda/blocks_stream.cuh: two groups side by side."""
    for groups in calls:
        for warp in range(WARPS):
            mine = groups[warp::WARPS]
            for i in range(0, len(mine), 2):
                yield warp, fragments[mine[i : i + 2]].transpose(0, 1).reshape(-1, 256)


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
