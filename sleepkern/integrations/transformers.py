"""Gated DeltaNet models of Hugging Face transformers on sleepkern's kernels.

    from sleepkern.integrations.transformers import patch, unpatch

    with patch():                 # Qwen3-Next, every model of the process, also those already built
        model.generate(...)
    patch("qwen3_5", "olmo_hybrid")
    patch(model)                  # the families that this model is made of
    unpatch()

The modeling files call module-level functions for the recurrence of many tokens and of one, and
for the short convolution before it. `patch` puts functions over `sleepkern.gated_delta_rule` and
`sleepkern.recurrent_step`, and a convolution that suits them, in their place. Weights and code stay
as they are. Layers of transformers 4.57 to 5.10 keep the functions that they found when they were
built: there, patch before building, or `patch(model)`, which also sets them in the model's layers.

Each call is looked at on its own: what sleepkern does not do (float64, torch.export, a device
without a kernel) goes to the original function, with the reason in the debug log.

New with the patch: packed sequences on the CPU. Pass `cu_seq_lens_q`, `position_ids` that restart
with each sequence and `use_cache=False`, as for flash attention; the short convolution then stops
at the borders too. Without the patch such a call raises.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

from torch import nn

from .patching import Patch, Registry, Target
from .transformers_functions import many_tokens, one_token, short_convolution

FAMILIES = ("qwen3_next", "qwen3_5", "qwen3_5_moe", "olmo_hybrid")
"""Patched by name: transformers.models.<family>.modeling_<family>, all with the same globals."""

_registry = Registry()


def patch(*families: str | nn.Module) -> Patch:
    """Let models of these families compute with sleepkern until `unpatch` or the with-block's end.

    Args:
        families: names out of `FAMILIES`, default "qwen3_next"; or models, which stand for the
            families that they are made of.

    Returns:
        A `Patch`, usable as a with-block. Patches nest and repeat; each takes back what it claimed.

    Raises:
        ImportError: transformers is not installed, or too old for the family.
        ValueError: an unknown family, or a model without a gated delta rule that could be replaced.
    """
    targets = [target for family in families or ("qwen3_next",) for target in _targets(family)]
    return _registry.claim(targets)


def unpatch() -> None:
    """Put all original functions back, whatever patches are open."""
    _registry.release_all()


_GLOBALS = {
    "torch_chunk_gated_delta_rule": many_tokens,
    "torch_recurrent_gated_delta_rule": one_token,
    "causal_conv1d_fn": short_convolution,
    # transformers 4.57 to 5.10, from the package fla; None without it
    "chunk_gated_delta_rule": many_tokens,
    "fused_recurrent_gated_delta_rule": one_token,
}
_DEFINED = {"torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"}
_ATTRIBUTES = {  # of a layer, transformers 4.57 to 5.10
    "chunk_gated_delta_rule": many_tokens,
    "recurrent_gated_delta_rule": one_token,
}


def _targets(family: str | nn.Module) -> list[Target]:
    if isinstance(family, nn.Module):
        return _targets_of_model(family)
    if family not in FAMILIES:
        raise ValueError(f"families: got {family!r}; expected a model or one of {', '.join(FAMILIES)}")
    try:
        module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    except ModuleNotFoundError as error:
        raise ImportError(f"families: {family!r} needs a transformers that has it: {error}") from error
    return _targets_of_module(module)


def _targets_of_model(model: nn.Module) -> list[Target]:
    names = {type(layer).__module__ for layer in model.modules()}
    modules = [sys.modules[name] for name in sorted(names) if name in sys.modules]
    targets = [target for module in modules for target in _targets_of_module(module)]
    for layer in model.modules():
        present = (name for name in _ATTRIBUTES if callable(vars(layer).get(name)))
        targets += [Target(layer, name, _ATTRIBUTES[name]) for name in present]
    if not targets:
        raise ValueError(f"families: got a {type(model).__name__}; expected a model with a gated delta rule")
    return targets


def _targets_of_module(module: ModuleType) -> list[Target]:
    """The globals to replace; none unless the file defines the torch functions, known to us."""
    defined = vars(module)
    if not defined.keys() >= _DEFINED:
        return []
    names = set(_GLOBALS)
    if "is_fast_path_available" in defined:
        # transformers 4.57 to 5.10: a convolution of other arguments
        names.remove("causal_conv1d_fn")
    return [Target(module, x, _GLOBALS[x]) for x in sorted(names) if callable(defined.get(x))]
