"""The model that a user names: a family, a config.json or a folder with one; built offline, with weights of its own."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...files import read_json
from ...integrations.transformers import FAMILIES, patch
from ..model_cases import quiet_transformers, slow_decay
from .default_sizes import LAYERS, TEXT_TYPES, sizes_of
from .layers import layer_types, with_layers
from .wording import one_line

EXPECTED = f"a config.json, a folder that holds one, or one of {', '.join(FAMILIES)}"


@dataclass(frozen=True)
class ModelSource:
    """What is needed to build a model; it can be sent to another process.

    name        what the user named
    config      a config of transformers
    weights     the folder with the weights; None for random ones
    parameters  how many the model has
    class_name  the class of transformers
    """

    name: str
    config: Any
    weights: Path | None = None
    parameters: int = 0
    class_name: str = ""

    @property
    def text(self) -> Any:
        """The config of the text model."""
        return self.config.get_text_config()


def find_model(name: str, layers: int | None = None) -> ModelSource:
    """The model that `name` means: a family of `patch`, a config.json, or a folder that holds one.

    Args:
        name: a family comes first; "./mamba2" is the folder of that name.
        layers: keep as many layers; the weights are then random. Default LAYERS of a family, else all.

    Raises:
        ImportError: transformers is not installed, or has no such family.
        ValueError: nothing of that name, no config of transformers, a model without a recurrence that `patch`
            replaces, or another number of layers than the model has.
    """
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise ImportError("model: transformers is not installed; expected pip install 'sleepkern[models]'") from error
    with offline(), quiet_transformers():
        if name in FAMILIES:
            found = ModelSource(name, _default_config(name))
            layers = min(LAYERS, len(layer_types(found.text))) if layers is None else layers
        else:
            found = _from_path(name)
        if layers is not None:
            found = replace(found, config=_cut(found.config, layers), weights=None)
        return _described(found)


def build(source: ModelSource, dtype: torch.dtype = torch.float32, device: str = "cpu") -> nn.Module:
    """The model, in eval mode. Random weights are the same each time, and their decay is slow.

    Code that a folder holds does not run.

    Raises:
        ValueError: the weights of the folder are not those of the config.
    """
    with offline(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if source.weights is None:
            model = _auto(source.config).from_config(source.config, dtype=dtype, trust_remote_code=False)
            slow_decay(model)
        else:
            model = _loaded(source, dtype)
    return model.eval().to(device)  # type: ignore[no-any-return]


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """Keep transformers and its hub client from the network, whatever has been imported."""
    constants: Any = sys.modules.get("huggingface_hub.constants")
    before, known = os.environ.get("HF_HUB_OFFLINE"), getattr(constants, "HF_HUB_OFFLINE", None)
    os.environ["HF_HUB_OFFLINE"] = "1"
    if constants is not None:
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        if before is None:
            del os.environ["HF_HUB_OFFLINE"]
        else:
            os.environ["HF_HUB_OFFLINE"] = before
        if constants is not None:
            constants.HF_HUB_OFFLINE = known


def _default_config(family: str) -> Any:
    from transformers import __version__
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_type = TEXT_TYPES.get(family, family)
    if model_type not in CONFIG_MAPPING:
        raise ImportError(f"model: {family!r} needs a transformers that has it; {__version__} is installed")
    return CONFIG_MAPPING[model_type](**sizes_of(family))


def _from_path(name: str) -> ModelSource:
    path = Path(name)
    if not name or not path.exists():
        raise ValueError(f"model: got {name!r}, which is no file or folder; expected {EXPECTED}")
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"model: got {name}, a folder without config.json; expected {EXPECTED}")
    try:
        content = read_json(file)
    except (OSError, UnicodeError) as error:
        raise ValueError(f"model: {file} cannot be read: {error}; expected a config of transformers") from error
    if not isinstance(content, dict) or not isinstance(content.get("model_type"), str):
        raise ValueError(f"model: got {file} without a model_type; expected a config of transformers")
    weights = path if path.is_dir() and any(path.glob("*.safetensors")) else None
    return ModelSource(name, _config_of(content, file), weights)


def _config_of(content: dict[str, Any], file: Path) -> Any:
    from transformers import __version__
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_type = content["model_type"]
    if model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"model: got {file} of the model type {model_type!r}, which transformers {__version__} does not have; "
            f"expected one of {', '.join(FAMILIES)}"
        )
    try:
        return CONFIG_MAPPING[model_type].from_json_file(str(file))
    except Exception as error:  # a config's own checks raise whatever they like
        raise ValueError(f"model: transformers refuses {file}: {_line(error)}") from error


def _cut(config: Any, layers: int) -> Any:
    text = config.get_text_config()
    cut = with_layers(text, layers)
    if text is config:
        return cut
    sizes = config.to_dict()
    return type(config).from_dict({**sizes, "text_config": cut.to_dict()})


def _auto(config: Any) -> Any:
    """The class that builds the text model, or the whole model where there is none of text alone."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    return AutoModelForCausalLM if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else AutoModelForImageTextToText


def _described(source: ModelSource) -> ModelSource:
    """The same source with its number of parameters and its class, which a model on the device meta has too."""
    model_type = source.config.model_type
    try:
        with torch.device("meta"):
            model = _auto(source.config).from_config(source.config, trust_remote_code=False)
    except Exception as error:  # any size that does not fit another one
        raise ValueError(f"model: transformers builds no model of {source.name}: {_line(error)}") from error
    try:
        patch(model).undo()
    except ValueError as error:
        raise ValueError(
            f"model: got {source.name} of the model type {model_type!r}, in which sleepkern.patch finds nothing to "
            f"replace; expected one of {', '.join(FAMILIES)}"
        ) from error
    count = sum(parameter.numel() for parameter in model.parameters())
    return replace(source, parameters=count, class_name=type(model).__name__)


def _loaded(source: ModelSource, dtype: torch.dtype) -> Any:
    try:
        model, told = _auto(source.config).from_pretrained(
            source.weights, config=source.config, dtype=dtype, local_files_only=True, use_safetensors=True,
            output_loading_info=True, trust_remote_code=False,
        )  # fmt: skip
    except Exception as error:  # files of the user
        raise ValueError(f"model: the weights in {source.weights} cannot be loaded: {_line(error)}") from error
    missing = sorted(told["missing_keys"])
    if missing:
        raise ValueError(
            f"model: the weights in {source.weights} lack {len(missing)} tensors of its config, such as {missing[0]}"
        )
    return model


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {one_line(error)}"


def needed_bytes(source: ModelSource, dtype: torch.dtype, batch: int, tokens: int) -> int:
    """About the bytes that `bench_model` takes at once.

    They are the weights, their copy in float32 for the check of a shorter type, activations of a layer, and a cache.
    The copy in float64 that a float32 model needs where its logits differ is left out, for most models need none.
    """
    text = source.text
    weights = source.parameters * (dtype.itemsize if dtype == torch.float32 else dtype.itemsize + 4)
    layer = 4 * 64 * batch * tokens * int(text.hidden_size)
    return weights + layer + 2 * dtype.itemsize * batch * tokens * int(text.hidden_size) * len(layer_types(text))
