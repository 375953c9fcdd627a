"""Retrofitted models of transformers to disk and back.

transformers itself drops weights that its classes do not have, with no more than a warning. So what is saved is of a
model type of its own: transformers refuses to load it, and `load_retrofitted` loads it whole.
"""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from .retrofit import InsertedMixer, insert, inserted_in

MODEL_TYPE = "sleepkern_retrofit"
_SAYS = "(a retrofitted model: sleepkern.sleep.load_retrofitted loads it)"
"""Written where a number has to stand: a class of transformers that is not chosen by model type stops at it."""


def load_retrofitted(directory: str | os.PathLike[str], **options: Any) -> Any:
    """A model as `retrofit` made it and its `save_pretrained` saved it.

    Args:
        directory: what it was saved to, or the name of a model of the Hugging Face hub.
        options: of transformers' from_pretrained, such as dtype and device_map.

    Returns:
        The model, of transformers' own class, in evaluation mode, with its mixers.

    Raises:
        ValueError: what lies there is no retrofitted model, or not all of one.
    """
    from transformers import PreTrainedConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    written, _ = PreTrainedConfig.get_config_dict(directory)
    found = written.get(MODEL_TYPE)
    if not isinstance(found, dict) or found.keys() != {"family", "stock", "mixers"}:
        raise ValueError(f"directory: got {str(directory)!r}; expected one to which a retrofitted model was saved")
    config = CONFIG_MAPPING[found["family"]].from_dict(found["stock"])
    stock: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    mixers = {int(i): options for i, options in found["mixers"].items()}

    def begin(self: Any, *given: Any, **named: Any) -> None:
        stock.__init__(self, *given, **named)
        insert(self, mixers)

    whole: Any = type(stock.__name__, (stock,), {"__init__": begin, "__module__": stock.__module__})
    model, report = whole.from_pretrained(directory, **{**options, "config": config, "output_loading_info": True})
    missing = sorted(name for name in report["missing_keys"] if ".inserted." in name)
    if missing:
        raise ValueError(f"directory: got {str(directory)!r} without {missing[0]} and {len(missing) - 1} more weights")
    model.__class__ = stock
    keep_whole(model)
    return model


def keep_whole(model: Any) -> None:
    """Have `save_pretrained` save all of a retrofitted model."""
    model.save_pretrained = partial(_save, model)


def _save(
    model: Any,
    save_directory: str | os.PathLike[str],
    is_main_process: bool = True,
    state_dict: dict[str, Any] | None = None,
    push_to_hub: bool = False,
    **options: Any,
) -> None:
    """As `save_pretrained` of transformers, for `load_retrofitted`."""
    if push_to_hub:
        raise ValueError("push_to_hub: got True; expected False, and then model.push_to_hub(...)")
    type(model).save_pretrained(model, save_directory, is_main_process, state_dict, **options)
    if is_main_process:
        place = Path(save_directory) / "config.json"
        stock = json.loads(place.read_text())
        kind = stock.pop("model_type")
        # Nested, and without its model type, by which a class of transformers would find its own config in there.
        mixers = {str(i): _options(mixer) for i, mixer in inserted_in(_blocks(model)).items()}
        written = {
            "model_type": MODEL_TYPE,
            "id2label": {_SAYS: ""},
            "transformers_version": stock.get("transformers_version"),
            MODEL_TYPE: {"family": kind, "stock": stock, "mixers": mixers},
        }
        partial_file = place.with_suffix(".partial")
        partial_file.write_text(json.dumps(written, indent=2) + "\n")
        partial_file.replace(place)


def _blocks(model: Any) -> nn.ModuleList:
    blocks: nn.ModuleList = getattr(model, model.base_model_prefix).layers
    return blocks


def _options(inserted: InsertedMixer) -> dict[str, Any]:
    mixer = inserted.mixer
    return {
        "heads": mixer.heads,
        "value_heads": mixer.value_heads,
        "key_width": mixer.key_width,
        "value_width": mixer.value_width,
        "convolution": mixer.convolution.weight.shape[1],
        "decay_bias": mixer.decay_bias,
        "negative": mixer.strength == 2.0,
    }
