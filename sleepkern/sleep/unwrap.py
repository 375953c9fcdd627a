"""The causal language model inside of its wrappers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside of DataParallel, DistributedDataParallel, torch.compile and peft; of a composite, its text
    model.

    Raises:
        ValueError: the adapters of peft are virtual tokens before the text, which are not in the model.
    """
    given: Any = model
    if isinstance(given, (nn.DataParallel, DistributedDataParallel)):
        return unwrap(given.module)
    if "_orig_mod" in given._modules:
        return unwrap(given._orig_mod)
    if callable(getattr(given, "get_base_model", None)):
        if getattr(getattr(given, "active_peft_config", None), "is_prompt_learning", False):
            raise ValueError(
                f"model: got a {type(model).__name__} with virtual tokens before each text; expected adapters that are "
                "part of its layers, as LoRA's"
            )
        return unwrap(given.get_base_model())
    return _text_model(given)


def _text_model(model: Any) -> nn.Module:
    """A causal language model that shares the text modules of a composite one, or the model itself."""
    base = getattr(model, getattr(model, "base_model_prefix", ""), None)
    text, head = getattr(base, "language_model", None), getattr(model, "lm_head", None)
    config = getattr(model, "config", None)
    if not (isinstance(getattr(text, "layers", None), nn.Module) and isinstance(head, nn.Module)) or config is None:
        return model  # type: ignore[no-any-return]
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            alone: Any = AutoModelForCausalLM.from_config(config.get_text_config())
    except ValueError:  # transformers has no such model of text alone; the adapter names the missing parts
        return model  # type: ignore[no-any-return]
    setattr(alone, alone.base_model_prefix, text)
    alone.lm_head, alone.generation_config = head, model.generation_config
    alone.training = model.training  # the mode of this shell only; the parts keep their modes
    return alone  # type: ignore[no-any-return]
