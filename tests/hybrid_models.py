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
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import sleepkern

CHUNK, STEP = "torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"
CONV = "causal_conv1d_fn"
MODEL_TYPES = {"qwen3_5": "qwen3_5_text", "qwen3_5_moe": "qwen3_5_moe_text"}
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
CLOSE = 1e-5
"""Relative, float32 logits after four layers; stock itself moves by 2e-6 when read in pieces."""


def build(family: str, **changes: Any) -> nn.Module:
    """A tiny random model that remembers: random gates forget within a token and hide faults."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[MODEL_TYPES.get(family, family)](**{**SIZES, **changes})
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("A_log"):
            nn.init.constant_(parameter, -3.0)
    return model


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

    for name in ("gated_delta_rule", "recurrent_step"):
        monkeypatch.setattr(sleepkern, name, functools.partial(spy, name, getattr(sleepkern, name)))
    return seen
