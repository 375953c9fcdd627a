"""Checkpoints of trainings, as files that nobody needs to trust."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_TYPES: dict[str, type | tuple[type, ...]] = {
    "run": dict,
    "weights": dict,
    "optimisers": dict,
    "curriculum": dict,
    "done": int,
    "seconds": (int, float),
    "history": list,
    "losses": dict,
}
"""What a checkpoint holds; those of older versions have no losses."""


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Tensors and plain values of a checkpoint, on the CPU; no code that the file might hold is run.

    Raises:
        ValueError: the file is damaged (the checksums of its parts are compared) or is no checkpoint.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
        if broken is not None:
            raise ValueError(f"the checksum of {broken} differs")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load and zipfile raise whatever a damaged file makes them meet
        raise damaged(path, error) from error
    if isinstance(content, dict):
        content = {"losses": {}, **content}
    if not isinstance(content, dict) or content.keys() != _TYPES.keys():
        raise damaged(path, f"expected {', '.join(_TYPES)} in it")
    for name, kind in _TYPES.items():
        if not isinstance(content[name], kind):
            raise damaged(path, f"{name} is of type {type(content[name]).__name__}")
    if content["done"] < 0:
        raise damaged(path, f"{content['done']} steps done")
    return content


def check_weights(path: Path, content: dict[str, Any], model: dict[str, Tensor]) -> None:
    """Refuse weights that are not those of a model by names, shapes and types, and optimisers of other weights.

    Raises:
        ValueError: they are not.
    """
    weights, moments = content["weights"], content["optimisers"].get("state", {})
    stepped = model.keys() if content["done"] else moments.keys()
    for what, got, expected in (("weights", weights, model.keys()), ("optimiser states", moments, stepped)):
        if got.keys() != expected:
            differing = sorted(map(str, got.keys() ^ expected))
            raise damaged(path, f"{what} missing or unknown: {', '.join(differing[:4])}")
    for name, mine in model.items():
        found = weights[name]
        if not isinstance(found, Tensor) or found.shape != mine.shape or found.dtype != mine.dtype:
            raise damaged(path, f"{name} is not a tensor {list(mine.shape)} of {mine.dtype}")


def damaged(path: Path, reason: object) -> ValueError:
    """The error for a checkpoint that cannot be read."""
    first = str(reason).strip().partition("\n")[0] or type(reason).__name__
    return ValueError(f"{path}: got a damaged checkpoint ({first}); expected one that `train` wrote")
