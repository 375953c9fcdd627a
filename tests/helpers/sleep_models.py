"""Small models that sleep, with the adapters of docs/guides for remote code."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from helpers.remote_models import WIDTH, JetForCausalLM, OuroForCausalLM, UniversalTransformerCache
from sleepkern.nn import SleepLM
from sleepkern.sleep import InsertedMixer

GUIDES = Path(__file__).resolve().parents[2] / "docs" / "guides"
BLOCKS = [
    block
    for page in ("train_with_passes.md", "adapt_your_model.md")
    for block in re.findall(r"```python\n(.*?)```", (GUIDES / page).read_text(), re.S)
]
"""A loop of one's own, retrofit, training; Jet, Ouro, blocks of other models."""


def names_of(*blocks: str, **given: Any) -> dict[str, Any]:
    names = dict(given)
    for block in blocks:
        exec(block, names)
    return names


def jet() -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = JetForCausalLM(("jet", "attn", "jet", "jet", "swa")).eval()
    return model, names_of(BLOCKS[3])["JetAdapter"](model)


def ouro(loops: int | None = None, layers: tuple[int, ...] = (0, 2)) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = OuroForCausalLM(layers=3, steps=2).eval()
    mixers = {i: InsertedMixer(i, WIDTH, 2) for i in layers}
    for mixer in mixers.values():
        nn.init.normal_(mixer.mixer.out.weight, std=0.3)
    model.inserted = nn.ModuleDict({str(i): mixer for i, mixer in mixers.items()})
    return model, names_of(BLOCKS[4])["OuroAdapter"](model, UniversalTransformerCache, mixers, loops)


def sleep_lm() -> nn.Module:
    torch.manual_seed(0)
    model = SleepLM(64, width=32, blocks=4, window=16)
    nn.init.normal_(model.lm_head.weight)
    return model
