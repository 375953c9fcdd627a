"""Which attributes of which modeling files, classes and layers are replaced, and by what."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

from torch import nn

from sleepkern.rules import KDA

from ..fla import stands_for
from ..patching import Make, Patch, Registry, Target
from . import base_model, by_sequence
from . import gated_rms_norm as gated_norm
from . import short_convolution as convolution
from .gated_delta import many_tokens, one_token
from .mamba2 import fused_mixer, fused_scan, one_step, scan

FAMILIES = (
    "qwen3_next", "qwen3_5", "qwen3_5_moe", "qwen4_exp", "olmo_hybrid", "lara_mini",  # gated delta rule
    "kimi_linear", "bailing_hybrid", "glm5_next",  # KDA
    "mamba2", "bamba", "falcon_h1", "nemotron_h", "granitemoehybrid", "zamba2",  # Mamba-2
)  # fmt: skip
"""Patched by name: transformers.models.<family>.modeling_<family>."""

_registry = Registry()


def patch(*families: str | nn.Module) -> Patch:
    """Let models of these families compute with sleepkern until `unpatch` or the with-block's end.

    Args:
        families: names out of `FAMILIES`; or models, which stand for the families that they are made of. Default all
            of `FAMILIES` that the installed transformers has, whose modeling files are then imported (a third of a
            second, once).

    Returns:
        A `Patch`, usable as a with-block. Patches nest and repeat, in any number of threads; each takes back what it
        claimed. `patched` tells what is replaced.

    Raises:
        ImportError: transformers is not installed, or too old for the family (by default: for all of them).
        ValueError: an unknown family, or a model without a recurrence that could be replaced.
    """
    targets = [target for family in families for target in _targets(family)]
    return _registry.claim(targets if families else _targets_of_all())


def unpatch() -> None:
    """Put all original functions back, whatever patches are open."""
    _registry.release_all()


def patched(*families: str | nn.Module) -> tuple[str, ...]:
    """What is replaced at the moment, sorted; empty, so false, where nothing is.

    Args:
        families: names out of `FAMILIES`, or models: only what they are made of. Default whatever is replaced.

    Returns:
        Names such as "transformers.models.bamba.modeling_bamba.mamba2_chunk_scan".

    Raises:
        ImportError: a family that the installed transformers has not.
        ValueError: an unknown family.
    """
    if not families:
        return _registry.names()
    found = (_targets_of_model(x) if isinstance(x, nn.Module) else _targets_of_module(_modeling(x)) for x in families)
    return _registry.names(target for targets in found for target in targets)


_GATED_DELTA: dict[str, Make] = {
    "torch_chunk_gated_delta_rule": many_tokens,
    "torch_recurrent_gated_delta_rule": one_token,
}
_KINDS: tuple[dict[str, Make], ...] = (
    _GATED_DELTA,
    {
        "chunk_kimi_delta_attention": partial(many_tokens, rule=KDA),
        "recurrent_kimi_delta_attention": partial(one_token, rule=KDA),
    },
    {"mamba2_chunk_scan": scan, "mamba2_selective_state_update": one_step},
    {"mamba_chunk_scan_combined": fused_scan},  # transformers 4.57 to 5.10, from mamba_ssm; None without it
)
"""What a modeling file that we know defines, by kind of recurrence."""
_BESIDE: dict[str, Make] = {
    "causal_conv1d_fn": convolution.many_tokens,
    "causal_conv1d_update": convolution.one_token,
    "mamba2_split_conv1d_scan_combined": fused_mixer,
}
_OLDER: dict[str, Make] = {  # of transformers 4.57 to 5.10, from the package fla; None without it
    "chunk_gated_delta_rule": many_tokens,
    "fused_recurrent_gated_delta_rule": one_token,
}
_ATTRIBUTES = {  # of a layer, transformers 4.57 to 5.10
    "chunk_gated_delta_rule": many_tokens,
    "recurrent_gated_delta_rule": one_token,
}


def _targets(family: str | nn.Module) -> list[Target]:
    targets = _targets_of_model(family) if isinstance(family, nn.Module) else _targets_of_module(_modeling(family))
    if targets:
        return targets
    if isinstance(family, nn.Module):
        raise ValueError(f"families: got a {type(family).__name__}; expected a model with a recurrence that is ours")
    raise ImportError(f"families: {family!r} of this version of transformers has no function to replace")


def _targets_of_all() -> list[Target]:
    """Of all families that are there, and have a function to replace."""
    errors, targets = [], []
    for family in FAMILIES:
        try:
            targets += _targets(family)
        except ImportError as error:
            errors.append(error)
    if not targets:
        raise errors[0]
    return targets


def _modeling(family: str) -> ModuleType:
    if family not in FAMILIES:
        raise ValueError(f"families: got {family!r}; expected a model or one of {', '.join(FAMILIES)}")
    try:
        return importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    except ModuleNotFoundError as error:
        raise ImportError(f"families: {family!r} needs a transformers that has it: {error}") from error


def _targets_of_model(model: nn.Module) -> list[Target]:
    names = {type(layer).__module__ for layer in model.modules()}
    modules = [sys.modules[name] for name in sorted(names) if name in sys.modules]
    targets = [target for module in modules for target in (_targets_of_module(module) or _targets_on_fla(module))]
    forwards = [target for target in targets if target.name == "forward"]
    for layer in model.modules():
        targets += base_model.held_by_hooks(layer, forwards)
        present = (name for name in _ATTRIBUTES if callable(vars(layer).get(name)))
        targets += [Target(layer, name, _ATTRIBUTES[name]) for name in present]
    return targets


def _targets_on_fla(module: ModuleType) -> list[Target]:
    """Globals of a modeling file that are functions of flash-linear-attention, as remote code and fla's layers have."""

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        return stands_for(original) or original

    return [Target(module, name, make) for name, x in sorted(vars(module).items()) if callable(x) and stands_for(x)]


def _targets_of_module(module: ModuleType) -> list[Target]:
    """The globals to replace; none unless the file defines the functions of a kind."""
    defined = vars(module)
    makes: dict[str, Make] = {}
    for kind in _KINDS:
        if defined.keys() >= kind.keys():
            makes |= kind | (_OLDER if kind is _GATED_DELTA else {})
    if makes and "is_fast_path_available" not in defined:  # in older versions the convolution has other arguments
        makes |= _BESIDE
    functions = [Target(module, name, makes[name]) for name in sorted(makes) if callable(defined.get(name))]
    if not functions:
        return []
    inline = "mamba_chunk_scan_combined" in makes  # older Mamba-2, whose own code hands seq_idx to its packages
    beside = gated_norm.targets(module) + by_sequence.targets(module)
    return functions + beside + ([] if inline else base_model.targets(module))
