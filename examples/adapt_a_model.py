"""A model that sleepkern has never seen sleeps: a ModelAdapter of a page says how to run its blocks one by one.

    python examples/adapt_a_model.py

A model that looks like those of transformers needs less, a CausalLMAdapter (docs/guides/adapt_your_model.md).
"""

import torch
from torch import nn
from torch.nn import functional as F

import sleepkern
from sleepkern.sleep import KVState, RecurrentState, SleepSession

WIDTH, HEADS = 32, 2


class Recurrence(nn.Module):
    """A layer with a fast weight; called with h [B,T,WIDTH] and the state before, it gives both after."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.rates = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 2 * HEADS)

    def forward(self, h: torch.Tensor, state: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        q, k, v = self.qkv(h).unflatten(-1, (3, HEADS, -1)).unbind(-3)
        g, beta = self.rates(h).unflatten(-1, (2, HEADS)).unbind(-2)
        o, state = sleepkern.gated_delta_rule(
            q, k, v, F.logsigmoid(g + 4), beta.sigmoid(), initial_state=state, output_final_state=True,
            use_qk_l2norm_in_kernel=True,
        )  # fmt: skip
        return h + o.flatten(-2), state


class Attention(nn.Module):
    """A layer with keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, h: torch.Tensor, past: KVState | None) -> tuple[torch.Tensor, KVState]:
        q, k, v = self.qkv(h).unflatten(-1, (3, HEADS, -1)).transpose(1, 3).unbind(2)  # [B,HEADS,T,width]
        if past is not None:
            k, v = torch.cat([past.keys, k], dim=2), torch.cat([past.values, v], dim=2)
        T, seen = q.shape[2], k.shape[2]
        mask = torch.ones(T, seen, dtype=torch.bool).tril(seen - T)
        return h + F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(-2), KVState(k, v)


class Foreign(nn.Module):
    """The model: embedding, layers, head."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(vocabulary, WIDTH), nn.Linear(WIDTH, vocabulary)
        self.layers = nn.ModuleList([Attention(), Recurrence(), Attention(), Recurrence()])


class Cache:
    """What the layers carry from window to window: the LayerCache of the adapter."""

    recurrent, attention = [1, 3], [0, 2]

    def __init__(self) -> None:
        self.kept: dict[int, RecurrentState | KVState] = {}

    def fast(self) -> dict[int, RecurrentState]:
        return {i: x for i, x in self.kept.items() if i in self.recurrent}

    def set_fast(self, fast: dict[int, RecurrentState]) -> None:
        self.kept = self.slow() | fast

    def slow(self) -> dict[int, KVState]:
        return {i: x for i, x in self.kept.items() if i in self.attention}

    def set_slow(self, slow: dict[int, KVState]) -> None:  # {} is an eviction
        self.kept = self.fast() | slow


class ForeignAdapter:
    """The ModelAdapter: the model's blocks, one by one."""

    replays = False  # whether a block can repeat its recurrence alone, for feedback="replay"

    def __init__(self, model: Foreign) -> None:
        self.model = model

    def __len__(self) -> int:
        return len(self.model.layers)

    def memory(self) -> Cache:
        return Cache()

    def open(self, ids, first, memory, mask):  # noqa: ANN001, ANN201
        """h of the tokens, and the blocks as functions of h alone. This model has no positions and no padding."""
        return self.model.embedding(ids), [lambda h, i=i: self.run(i, h, memory) for i in range(len(self))]

    def run(self, i: int, h: torch.Tensor, memory: Cache) -> torch.Tensor:
        past = memory.kept.get(i)
        if i in memory.attention:
            h, memory.kept[i] = self.model.layers[i](h, past)
            return h
        h, state = self.model.layers[i](h, None if past is None else past.state)
        memory.kept[i] = RecurrentState(h.new_zeros(h.shape[0], 0, 1), state)  # no short convolution: an empty one
        return h

    def logits(self, h: torch.Tensor) -> torch.Tensor:
        return self.model.head(h)

    @torch.no_grad()
    def generate(self, ids, mask, first, memory, pending, max_new_tokens=8):  # noqa: ANN001, ANN201
        """Greedy. The session's memory must not change, so the copy here starts from it."""
        copy, out, new = self.memory(), ids, ids
        copy.kept = dict(memory.kept)
        for _ in range(max_new_tokens):
            h, blocks = self.open(new, first, copy, None)
            for block in blocks:
                h = block(h)
            new = self.logits(h[:, -1:]).argmax(-1)
            out = torch.cat([out, new], dim=1)
        return out[:, pending:]


torch.manual_seed(0)
session = SleepSession(ForeignAdapter(Foreign(vocabulary=100)), window=16, passes=3)
session.ingest(torch.randint(0, 100, (1, 40)))
print(session)
print("changes of the last sleep, pass by pass:", [round(float(c), 2) for c in session.reports[-1].changes])
print("answered:", session.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=5)[0, 3:].tolist())
assert session.position == 32 and session.memory.slow() == {} and set(session.memory.fast()) == {1, 3}
