"""The adapter of a model, by what the model is."""

from __future__ import annotations

from torch import nn

from ...nn import SleepLM
from ..protocols import ModelAdapter
from ..unwrap import unwrap
from .sleep_lm import SleepLMAdapter


def adapter_of(model: nn.Module | ModelAdapter) -> ModelAdapter:
    """The adapter of a SleepLM, or of a causal language model of transformers; an adapter is returned as it is.

    Raises:
        TypeError, ValueError: the model is neither of these, nor a wrapper around one.
    """
    if isinstance(model, ModelAdapter):
        return model
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model: got a {type(model).__name__}; expected a module, or a ModelAdapter "
            "(docs/guides/adapt_your_model.md)"
        )
    model = unwrap(model)
    if isinstance(model, SleepLM):
        return SleepLMAdapter(model)
    from .transformers_models import TransformersAdapter  # needs transformers

    return TransformersAdapter(model)
