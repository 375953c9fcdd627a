"""Tiny hybrid models of transformers, and arguments of the functions they call."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from helpers.versions import here, release
from sleepkern.integrations.caches import NAMES, cache_among, cache_name
from sleepkern.ops import recurrence as ops
from sleepkern.sleep import retrofit

VERSION = release(here())
PROMISED = {
    (4, 57): ("qwen3_next",),
    (5, 20): (
        "qwen3_5", "qwen3_5_moe", "olmo_hybrid", "kimi_linear", "bailing_hybrid",
        "mamba2", "bamba", "falcon_h1", "nemotron_h", "granitemoehybrid", "zamba2",
    ),
    (5, 23): ("qwen4_exp", "glm5_next"),
    (5, 24): ("lara_mini",),
}  # fmt: skip
"""Families that `patch` knows by name, and the version from which on it has to. Tests run over those of the version
that is here, and fail if it lacks one."""
FAMILIES = tuple(family for since, families in PROMISED.items() if since <= VERSION for family in families)
CARRIES = (5, 16) <= VERSION
"""Mixers look functions up at each call, keep their states in buffers, and go on from them with more than one token."""
CHUNK, STEP = "torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"
CONV = "causal_conv1d_fn"
MODEL_TYPES = {"qwen3_5": "qwen3_5_text", "qwen3_5_moe": "qwen3_5_moe_text", "qwen4_exp": "qwen4_exp_text"}
KDA = ("kimi_linear", "bailing_hybrid", "glm5_next")
MAMBA = ("mamba2", "bamba", "falcon_h1", "nemotron_h", "granitemoehybrid", "zamba2")
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 24,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "eos_token_id": None,
}
_MAMBA = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_n_groups": 2,
    "mamba_d_state": 16,
    "mamba_chunk_size": 16,
}
_LATENT = {"kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16, "num_local_experts": 4}
_VISION = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
OWN_SIZES: dict[str, dict[str, Any]] = {
    "qwen4_exp": {
        "hc_count": 2,
        "hc_lowrank": 8,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 64,
        "indexer_compress_ratio": 4,
    },
    "lara_mini": {"sliding_window": 8},
    "glm5_next": {
        "num_key_value_heads": 2,
        "linear_head_dim": 16,
        "linear_num_heads": 2,
        "n_routed_experts": 4,
        "kv_lora_rank": 16,
        "q_lora_rank": 16,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
        "index_topk": 64,
        "index_kpool": 4,
        "index_head_dim": 16,
        "index_n_heads": 2,
        "hc_mult": 2,
    },
    "kimi_linear": {
        **_LATENT,
        "num_key_value_heads": 2,
        "linear_head_dim": 16,
        "linear_num_heads": 2,
        "layer_types": ["linear_attention"] * 3 + ["full_attention"],
    },
    "bailing_hybrid": {
        **_LATENT,
        "num_key_value_heads": 2,
        "n_group": 1,
        "topk_group": 1,
        "layer_group_size": 4,
        "num_mtp_layers": 0,
    },
    "mamba2": {"num_heads": 4, "head_dim": 16, "state_size": 16, "n_groups": 2, "chunk_size": 16},
    "bamba": {**_MAMBA, "attn_layer_indices": [1]},
    "falcon_h1": {**_MAMBA, "mamba_d_ssm": 64},
    "nemotron_h": {
        "layers_block_type": ["mamba", "attention", "mamba", "mamba"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "ssm_state_size": 16,
        "n_groups": 2,
        "chunk_size": 16,
    },
    "granitemoehybrid": {
        **_MAMBA,
        "layer_types": ["mamba", "attention", "mamba", "mamba"],
        "num_local_experts": 4,
        "shared_intermediate_size": 16,
    },
    "zamba2": {
        "layers_block_type": ["mamba", "hybrid", "mamba", "mamba"],
        "n_mamba_heads": 4,
        "mamba_d_state": 16,
        "mamba_ngroups": 2,
        "chunk_size": 16,
        "num_key_value_heads": 2,
    },
}
CLOSE = 1e-5
"""Relative, float32 logits after four layers; stock itself moves by 2e-6 when read in pieces."""


def build(family: str, **changes: Any) -> nn.Module:
    """A tiny random model that remembers: random gates forget within a token and hide faults."""
    torch.manual_seed(0)
    sizes = {**SIZES, **OWN_SIZES.get(family, {}), **changes}
    if family == "nemotron_h":
        del sizes["num_hidden_layers"]  # it counts its layers' types
    if family == "glm5_next":  # images go in beside the text
        sizes = {"text_config": {**sizes, "num_experts": None}, "vision_config": _VISION}
    config = CONFIG_MAPPING[MODEL_TYPES.get(family, family)](**sizes)
    auto = AutoModelForImageTextToText if family == "glm5_next" else AutoModelForCausalLM
    model = auto.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("A_log"):
            nn.init.constant_(parameter, -3.0)
    return model


def many_of(family: str) -> str:
    """The sleepkern function that stands for many tokens of a family."""
    if family in KDA:
        return "kda"
    return "simple_gla" if family in MAMBA else "gated_delta_rule"


def layers_of(model: nn.Module) -> int:
    """Layers with a recurrence."""
    return sum(name.endswith("A_log") for name, _ in model.named_parameters())


def cached(model: nn.Module, cache: Any) -> dict[str, Any]:
    """The keyword by which a forward takes a cache; none without a cache."""
    return {} if cache is None else {cache_name(model): cache}


def kept(out: Any) -> Any:
    """The cache in what a model gives; versions before 5 have classes of their own for it."""
    found = cache_among(out.values())
    return next(out[name] for name in NAMES if name in out) if found is None else found


def globals_of(family: str) -> ModuleType:
    return importlib.import_module(f"transformers.models.{family}.modeling_{family}")


def tokens(batch: int, length: int, seed: int = 1) -> Tensor:
    return torch.randint(1, 64, (batch, length), generator=torch.Generator().manual_seed(seed))


def arguments(T: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    return {
        "query": normal(2, T, 2, 16),
        "key": normal(2, T, 2, 16),
        "value": normal(2, T, 4, 24),
        "g": -0.1 * normal(2, T, 4).abs(),
        "beta": normal(2, T, 4).sigmoid(),
        "initial_state": normal(2, 4, 16, 24).float(),
        "output_final_state": True,
        "use_qk_l2norm_in_kernel": True,
    }


def spy_on_sleepkern(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the sleepkern functions that ran: no test may pass with stock on both sides."""
    seen: list[str] = []

    def spy(name: str, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        seen.append(name)
        return run(*args, **kwargs)

    for name in ("gated_delta_rule", "kda", "simple_gla", "recurrent_step"):
        monkeypatch.setattr(ops, name, functools.partial(spy, name, getattr(ops, name)))
    return seen


def retrofitted(family: str = "llama", awake: bool = True, **options: Any) -> nn.Module:
    """An attention-only model with mixers in layers 1 and 2, which do something, unless not awake."""
    model = retrofit(build(family), layers=[1, 2], heads=2, **options)
    if awake:
        for i in (1, 2):
            nn.init.normal_(model.model.layers[i].inserted.mixer.out.weight, std=0.3)
    return model
