"""The attributes of modeling files, classes and layers that a patch replaces, and their replacements."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

from torch import nn

from sleepkern.rules import KDA

from ..fla import replacement_of
from ..patching import Make, Target
from . import base_model, by_sequence, gated_rms_norm
from . import short_convolution as convolution
from .gated_delta import many_tokens, one_token
from .mamba2 import fused_mixer, fused_scan, one_step, scan

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
"""The functions that a known modeling file defines, by kind of recurrence."""
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


def targets_of_model(model: nn.Module) -> list[Target]:
    """The attributes to replace for a model: globals of its modeling files, and attributes of its layers."""
    names = {type(layer).__module__ for layer in model.modules()}
    modules = [sys.modules[name] for name in sorted(names) if name in sys.modules]
    targets = [target for module in modules for target in (targets_of_module(module) or _targets_on_fla(module))]
    forwards = [target for target in targets if target.name == "forward"]
    for layer in model.modules():
        targets += base_model.hooked_forwards(layer, forwards)
        present = (name for name in _ATTRIBUTES if callable(vars(layer).get(name)))
        targets += [Target(layer, name, _ATTRIBUTES[name]) for name in present]
    return targets


def _targets_on_fla(module: ModuleType) -> list[Target]:
    """Globals of a modeling file that are functions of flash-linear-attention, as remote code and fla's layers have."""

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        return replacement_of(original) or original

    return [Target(module, name, make) for name, x in sorted(vars(module).items()) if callable(x) and replacement_of(x)]


def targets_of_module(module: ModuleType) -> list[Target]:
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
    beside = gated_rms_norm.targets(module) + by_sequence.targets(module)
    return functions + beside + ([] if inline else base_model.targets(module))
