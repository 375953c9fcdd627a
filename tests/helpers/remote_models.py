"""How models whose code comes with their weights call their layers and caches: Jet-Nemotron and Ouro, in small.

Written for the tests from what their public code does: names, order and form of arguments, what is returned, what the
caches hold. Everything else is as plain as can be.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sleepkern

WIDTH, HEADS, VOCABULARY = 32, 2, 64


class Attention(nn.Module):
    """Causal, with an angle a position; `attend` is given what the cache makes of keys and values."""

    def __init__(self, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def parts(self, h: Tensor, position_embeddings: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(h).chunk(3, dim=-1))
        return transposed(q, position_embeddings), transposed(k, position_embeddings), v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[..., -k.shape[2] :])
        return self.out(o.transpose(1, 2).flatten(-2))


def transposed(x: Tensor, angle: Tensor) -> Tensor:
    """[B,H,T,D] by an angle [B,T]."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = angle.cos()[:, None, :, None], angle.sin()[:, None, :, None]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def causal(mask: Tensor | None, T: int, seen: int) -> Tensor:
    """[B or 1,1,T,seen+T]."""
    allowed = torch.ones(T, seen + T, dtype=torch.bool).tril(seen)[None, None]
    if mask is not None:
        allowed = allowed & (mask[:, None, None, :].bool() | torch.eye(T, seen + T, dtype=torch.bool).roll(seen, 1))
    return torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)


# ---------------------------------------------------------------- Jet-Nemotron


class JetNemotronCache:
    """Keeps dictionaries in the order in which layers first come, and counts tokens at every update."""

    def __init__(self) -> None:
        self.states: list[dict[str, Any]] = []
        self._seen_tokens: list[int] = []

    def __len__(self) -> int:
        return len(self.states)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return self.states[i]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._seen_tokens[layer_idx] if layer_idx < len(self._seen_tokens) else 0

    def update(
        self,
        recurrent_state: Tensor | None = None,
        attn_state: Any = None,
        conv_state: Tensor | None = None,
        layer_idx: int = 0,
        offset: int = 1,
        cache_kwargs: Any = None,
    ) -> dict[str, Any]:
        if len(self._seen_tokens) <= layer_idx:
            self._seen_tokens.append(0)
        self._seen_tokens[layer_idx] += offset
        new = {"recurrent_state": recurrent_state, "attn_state": attn_state, "conv_state": conv_state}
        if len(self.states) <= layer_idx:
            self.states.append(new)
        elif attn_state is not None:
            past = self.states[layer_idx]["attn_state"]
            self.states[layer_idx]["attn_state"] = tuple(torch.cat(p, -2) for p in zip(past, attn_state, strict=True))
        else:
            self.states[layer_idx] = new
        return self.states[layer_idx]


class JetBlock(nn.Module):
    """The convolution's history is written in place, and taken only where one token comes, or in evaluation."""

    def __init__(self, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.qkv, self.rates = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 2 * HEADS)
        self.taps, self.out = nn.Parameter(torch.randn(4, WIDTH)), nn.Linear(WIDTH, WIDTH)

    def forward(
        self, hidden_states: Tensor, past_key_value: Any = None, attention_mask: Any = None, use_cache: bool = False,
        **unused: Any,
    ) -> tuple[Tensor, Any]:  # fmt: skip
        last = (
            past_key_value[self.layer_idx]
            if past_key_value is not None and len(past_key_value) > self.layer_idx
            else {}
        )
        q, k, v = self.qkv(hidden_states).chunk(3, dim=-1)
        v, conv_state = self.convolve(v, last.get("conv_state"))
        q, k, v = (t.unflatten(-1, (HEADS, -1)) for t in (F.silu(q), F.silu(k), v))
        decay, strength = self.rates(hidden_states).chunk(2, dim=-1)
        o, state = sleepkern.gated_delta_rule(
            q=q, k=k, v=v, g=F.logsigmoid(decay + 4), beta=strength.sigmoid(), use_qk_l2norm_in_kernel=True,
            initial_state=last.get("recurrent_state"), output_final_state=use_cache,
        )  # fmt: skip
        if past_key_value is not None:
            past_key_value.update(
                recurrent_state=state, conv_state=conv_state, layer_idx=self.layer_idx, offset=hidden_states.shape[1]
            )
        return self.out(o.flatten(-2)), past_key_value

    def convolve(self, v: Tensor, cache: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """v [B,T,D], cache [B,D,4]."""
        assert cache is None or not self.training
        past = v.new_zeros(v.shape[0], 4, WIDTH) if cache is None else cache.transpose(1, 2)
        full = torch.cat([past, v], dim=1)
        y = sum(full[:, 4 - j : full.shape[1] - j] * self.taps[j] for j in range(4))
        if self.training:
            return F.silu(y), None
        new = full[:, -4:].transpose(1, 2)
        return F.silu(y), new.contiguous() if cache is None else cache.copy_(new)


class JetAttention(Attention):
    def forward(
        self, hidden_states: Tensor, position_embeddings: Tensor, attention_mask: Tensor,
        past_key_value: Any = None, **unused: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        q, k, v = self.parts(hidden_states, position_embeddings)
        if past_key_value is not None:
            state = past_key_value.update(
                attn_state=(k, v), layer_idx=self.layer_idx, offset=q.shape[2], cache_kwargs={"window_size": None}
            )
            k, v = state["attn_state"]
        return self.attend(q, k, v, attention_mask), None


class JetLayer(nn.Module):
    def __init__(self, kind: str, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = JetBlock(layer_idx) if kind == "jet" else JetAttention(layer_idx)
        self.input_layernorm, self.post_attention_layernorm = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.mlp = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden_states: Tensor, **options: Any) -> tuple[Tensor]:
        mixed, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **options)
        hidden_states = hidden_states + mixed
        return (hidden_states + self.mlp(self.post_attention_layernorm(hidden_states)),)


class JetModel(nn.Module):
    def __init__(self, kinds: tuple[str, ...]) -> None:
        super().__init__()
        self.embed_tokens, self.norm = nn.Embedding(VOCABULARY, WIDTH), nn.RMSNorm(WIDTH)
        self.layers = nn.ModuleList(JetLayer(kind, i) for i, kind in enumerate(kinds))

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None,
        past_key_values: Any = None, use_cache: bool = True,
    ) -> tuple[Tensor, Any]:  # fmt: skip
        seen = past_key_values.get_seq_length() if past_key_values is not None else 0
        cache_position = torch.arange(seen, seen + input_ids.shape[1])
        position_ids = cache_position[None] if position_ids is None else position_ids
        h, mask = self.embed_tokens(input_ids), causal(attention_mask, input_ids.shape[1], seen)
        for layer in self.layers:
            outputs = layer(
                h, attention_mask=mask, position_ids=position_ids, past_key_value=past_key_values,
                output_attentions=False, use_cache=use_cache, cache_position=cache_position,
                position_embeddings=0.3 * position_ids,
            )  # fmt: skip
            h = outputs[0]
        return self.norm(h), past_key_values


class JetForCausalLM(nn.Module):
    base_model_prefix = "model"

    def __init__(self, kinds: tuple[str, ...]) -> None:
        super().__init__()
        self.config, self.model = SimpleNamespace(layer_types=kinds), JetModel(kinds)
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, input_ids: Tensor, past_key_values: Any = None) -> Tensor:
        cache = JetNemotronCache() if past_key_values is None else past_key_values
        return self.lm_head(self.model(input_ids, past_key_values=cache)[0])


# ---------------------------------------------------------------- Ouro


class UniversalTransformerCache:
    """A slot for each loop and layer."""

    def __init__(self) -> None:
        self.key_cache: list[Tensor | None] = []
        self.value_cache: list[Tensor | None] = []

    def get_seq_length(self, layer_idx: int = 0) -> int:
        keys = self.key_cache[layer_idx] if layer_idx < len(self.key_cache) else None
        return 0 if keys is None else keys.shape[2]

    def update(self, k: Tensor, v: Tensor, layer_idx: int, cache_kwargs: Any = None) -> tuple[Tensor, Tensor]:
        for cache, new in ((self.key_cache, k), (self.value_cache, v)):
            cache.extend([None] * (layer_idx + 1 - len(cache)))
            old = cache[layer_idx]
            cache[layer_idx] = new if old is None else torch.cat([old, new], dim=2)
        return self.key_cache[layer_idx], self.value_cache[layer_idx]  # type: ignore[return-value]


class OuroLayer(nn.Module):
    def __init__(self, layers: int, layer_idx: int) -> None:
        super().__init__()
        self.layers, self.self_attn, self.mlp = layers, Attention(layer_idx), nn.Linear(WIDTH, WIDTH)
        self.input_layernorm, self.input_layernorm_2 = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.post_attention_layernorm, self.post_attention_layernorm_2 = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor, position_embeddings: Tensor, past_key_value: Any = None,
        current_ut: int = 0, **unused: Any,
    ) -> Tensor:  # fmt: skip
        q, k, v = self.self_attn.parts(self.input_layernorm(hidden_states), position_embeddings)
        if past_key_value is not None:
            k, v = past_key_value.update(k, v, current_ut * self.layers + self.self_attn.layer_idx, {})
        hidden_states = hidden_states + self.input_layernorm_2(self.self_attn.attend(q, k, v, attention_mask))
        mixed = self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states + self.post_attention_layernorm_2(mixed)


class OuroModel(nn.Module):
    def __init__(self, layers: int, steps: int) -> None:
        super().__init__()
        self.embed_tokens, self.norm = nn.Embedding(VOCABULARY, WIDTH), nn.RMSNorm(WIDTH)
        self.layers = nn.ModuleList(OuroLayer(layers, i) for i in range(layers))
        self.total_ut_steps = steps

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None,
        past_key_values: Any = None, use_cache: bool = True,
    ) -> tuple[Any, list[Tensor], list[Tensor]]:  # fmt: skip
        if use_cache and past_key_values is None:
            past_key_values = UniversalTransformerCache()
        seen = past_key_values.get_seq_length() if past_key_values is not None else 0
        cache_position = torch.arange(seen, seen + input_ids.shape[1])
        position_ids = cache_position[None] if position_ids is None else position_ids
        h, mask = self.embed_tokens(input_ids), causal(attention_mask, input_ids.shape[1], seen)
        for current_ut in range(self.total_ut_steps):
            for layer in self.layers:
                h = layer(
                    h, attention_mask=mask, position_ids=position_ids, past_key_value=past_key_values,
                    use_cache=use_cache, cache_position=cache_position, position_embeddings=0.3 * position_ids,
                    current_ut=current_ut,
                )  # fmt: skip
            h = self.norm(h)
        return (h, past_key_values), [], []


class OuroForCausalLM(nn.Module):
    base_model_prefix = "model"

    def __init__(self, layers: int, steps: int) -> None:
        super().__init__()
        self.config, self.model = SimpleNamespace(total_ut_steps=steps), OuroModel(layers, steps)
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, input_ids: Tensor, past_key_values: Any = None) -> Tensor:
        return self.lm_head(self.model(input_ids, past_key_values=past_key_values)[0][0])
