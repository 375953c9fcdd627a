"""The causal language model inside of what is wrapped around it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def unwrapped(model: nn.Module) -> nn.Module:
    """Out of DataParallel, DistributedDataParallel, torch.compile and peft; the text model of one of several parts.

    Raises:
        ValueError: adapters of peft that are tokens before the text, for what they add is not in the model.
    """
    given: Any = model
    if isinstance(given, (nn.DataParallel, DistributedDataParallel)):
        return unwrapped(given.module)
    if "_orig_mod" in given._modules:
        return unwrapped(given._orig_mod)
    if callable(getattr(given, "get_base_model", None)):
        if getattr(getattr(given, "active_peft_config", None), "is_prompt_learning", False):
            raise ValueError(
                f"model: got a {type(model).__name__} with virtual tokens before each text; expected adapters that are "
                "part of its layers, as LoRA's"
            )
        return unwrapped(given.get_base_model())
    return _text_model(given)


def _text_model(model: Any) -> nn.Module:
    """A causal language model of the very modules of a composite one, or the model itself."""
    base = getattr(model, getattr(model, "base_model_prefix", ""), None)
    text, head = getattr(base, "language_model", None), getattr(model, "lm_head", None)
    config = getattr(model, "config", None)
    if not (isinstance(getattr(text, "layers", None), nn.Module) and isinstance(head, nn.Module)) or config is None:
        return model  # type: ignore[no-any-return]
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            alone: Any = AutoModelForCausalLM.from_config(config.get_text_config())
    except ValueError:  # there is no such model of text alone; the stack says what it misses
        return model  # type: ignore[no-any-return]
    setattr(alone, alone.base_model_prefix, text)
    alone.lm_head, alone.generation_config = head, model.generation_config
    alone.training = model.training  # of this shell only: the parts keep theirs
    return alone  # type: ignore[no-any-return]
