"""The sizes of each family for a CPU: published widths per head and proportions, a hidden size of 512, few experts.

A default is what differs from the family's own default config. Layers are cut from the published number to LAYERS.
"""

from __future__ import annotations

from typing import Any

LAYERS = 4
"""Layers of a family's default, chosen so that recurrence and attention are both among them."""

_COMMON: dict[str, Any] = {"vocab_size": 4096, "hidden_size": 512, "pad_token_id": 0, "eos_token_id": None}
_EXPERTS = {"num_experts": 16, "num_experts_per_tok": 4, "num_experts_per_token": 4}
_QWEN: dict[str, Any] = {
    **_EXPERTS,
    "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256,
    "linear_num_key_heads": 4, "linear_num_value_heads": 8, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
    "moe_intermediate_size": 128, "shared_expert_intermediate_size": 128,
}  # fmt: skip
_KIMI: dict[str, Any] = {
    **_EXPERTS,
    "num_attention_heads": 8, "num_key_value_heads": 8, "linear_num_heads": 8, "linear_head_dim": 128,
    "kv_lora_rank": 128, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128,
    "intermediate_size": 1536, "moe_intermediate_size": 192,
}  # fmt: skip
_MAMBA: dict[str, Any] = {
    "mamba_n_heads": 16, "mamba_d_head": 64, "mamba_n_groups": 1, "mamba_d_state": 128, "mamba_chunk_size": 256,
    "num_attention_heads": 4, "num_key_value_heads": 1, "intermediate_size": 1792,
}  # fmt: skip

VISION = {"depth": 1, "hidden_size": 64, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 512}
"""The part for images of a family that transformers has with images only; it is built and takes no part."""
WITH_IMAGES = ("glm5_next",)
"""Families whose config has a text_config."""
TEXT_TYPES = {"qwen3_5": "qwen3_5_text", "qwen3_5_moe": "qwen3_5_moe_text", "qwen4_exp": "qwen4_exp_text"}
"""The model type of the text model alone, for families whose own model type has a part for images."""

SIZES: dict[str, dict[str, Any]] = {
    "qwen3_next": {**_QWEN, "intermediate_size": 1408},
    "qwen3_5": {**_QWEN, "intermediate_size": 1536},
    "qwen3_5_moe": _QWEN,
    "qwen4_exp": {
        **_QWEN,
        "hc_lowrank": 80,
        "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 256, "indexer_budget": 512,
        "indexer_compress_ratio": 16,
    },
    "olmo_hybrid": {
        "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 1472, "num_hidden_layers": 32,
        "linear_num_key_heads": 4, "linear_num_value_heads": 4, "linear_key_head_dim": 96, "linear_value_head_dim": 192,
    },
    "lara_mini": {**_QWEN, "intermediate_size": 1536, "head_dim": 128, "sliding_window": 512},
    "kimi_linear": _KIMI,
    "bailing_hybrid": {**_KIMI, "num_expert_group": 1, "topk_group": 1, "num_nextn_predict_layers": 0},
    "glm5_next": {
        **_KIMI,
        "num_experts": None, "n_routed_experts": 16, "qk_nope_head_dim": 256, "v_head_dim": 256, "qk_rope_head_dim": 0,
        "q_lora_rank": 192, "index_n_heads": 4, "index_topk": 512,
    },
    "mamba2": {"hidden_size": 768, "num_heads": 24, "head_dim": 64, "state_size": 128, "n_groups": 1,
               "num_hidden_layers": 24},
    "bamba": {**_MAMBA, "attn_layer_indices": [9, 18, 27]},
    "falcon_h1": {**_MAMBA, "mamba_d_ssm": 1024, "head_dim": 64, "num_attention_heads": 8, "num_key_value_heads": 2,
                  "intermediate_size": 1024, "num_hidden_layers": 36},
    "nemotron_h": {
        "hybrid_override_pattern": "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-",
        "mamba_num_heads": 16, "mamba_head_dim": 64, "ssm_state_size": 128, "n_groups": 1, "chunk_size": 128,
        "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 128, "intermediate_size": 2688,
    },
    "granitemoehybrid": {
        **_MAMBA,
        "layer_types": ["attention" if i % 10 == 5 else "mamba" for i in range(40)],
        "num_hidden_layers": 40, "num_local_experts": 16, "num_experts_per_tok": 4, "intermediate_size": 192,
        "shared_intermediate_size": 384,
    },
    "zamba2": {
        "n_mamba_heads": 16, "mamba_headdim": 64, "mamba_d_state": 64, "mamba_ngroups": 1, "chunk_size": 256,
        "num_attention_heads": 8, "num_key_value_heads": 8, "attention_hidden_size": 1024, "attention_head_dim": 128,
        "intermediate_size": 2048,
    },
}  # fmt: skip
"""The sizes by family of `sleepkern.patch`."""


def sizes_of(family: str) -> dict[str, Any]:
    """The arguments of a family's config class: its default sizes, with a text_config where the family has images."""
    sizes = {**_COMMON, **SIZES[family]}
    return {"text_config": sizes, "vision_config": VISION} if family in WITH_IMAGES else sizes
