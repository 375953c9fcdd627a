"""Patches of the families of models that sleepkern knows, by name or by model."""

from __future__ import annotations

import importlib
from types import ModuleType

from torch import nn

from ..patching import Patch, Registry, Target
from .targets import targets_of_model, targets_of_module

FAMILIES: tuple[str, ...] = (
    "qwen3_next", "qwen3_5", "qwen3_5_moe", "qwen4_exp", "olmo_hybrid", "lara_mini",  # gated delta rule
    "kimi_linear", "bailing_hybrid", "glm5_next",  # KDA
    "mamba2", "bamba", "falcon_h1", "nemotron_h", "granitemoehybrid", "zamba2",  # Mamba-2
)  # fmt: skip
"""Patched by name: transformers.models.<family>.modeling_<family>."""

_registry = Registry()


def patch(*families: str | nn.Module) -> Patch:
    """Make models of these families compute with sleepkern until `unpatch` or the end of the with-block.

    Args:
        families: names out of `FAMILIES`; or models, which stand for the families that they are made of. Default all
            of `FAMILIES` that the installed transformers has, whose modeling files are then imported (a third of a
            second, once).

    Returns:
        A `Patch`, usable as a with-block. Patches nest and repeat, in any number of threads; each releases its own
        claims. `patched` lists what is replaced.

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
    """The names of all replaced attributes, sorted; empty where nothing is replaced.

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
    found = (targets_of_model(x) if isinstance(x, nn.Module) else targets_of_module(_modeling(x)) for x in families)
    return _registry.names(target for targets in found for target in targets)


def _targets(family: str | nn.Module) -> list[Target]:
    targets = targets_of_model(family) if isinstance(family, nn.Module) else targets_of_module(_modeling(family))
    if targets:
        return targets
    if isinstance(family, nn.Module):
        raise ValueError(
            f"families: got a {type(family).__name__}; expected a model with a recurrence that sleepkern has"
        )
    raise ImportError(f"families: {family!r} of this version of transformers has no function to replace")


def _targets_of_all() -> list[Target]:
    """The targets of all families that the installed transformers has, and that have a function to replace."""
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
