"""Retrofitted models of transformers to disk and back.

transformers drops weights that its classes do not have, with no more than a warning. So a retrofitted model is saved
under a model type of its own: transformers refuses to load it, and `load_retrofitted` loads it whole.
"""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

from .inserted_mixer import InsertedMixer, blocks_of, insert, inserted_in

MODEL_TYPE = "sleepkern_retrofit"
_HINT = "(a retrofitted model: sleepkern.sleep.load_retrofitted loads it)"
"""A text where a number is expected: classes of transformers that ignore the model type raise an error at it."""


def load_retrofitted(directory: str | os.PathLike[str], **options: Any) -> Any:
    """Load a model that `retrofit` changed and `save_pretrained` saved.

    Args:
        directory: the folder of the saved model, or the name of a model of the Hugging Face hub.
        options: options of transformers' from_pretrained, such as dtype and device_map.

    Returns:
        The model with its mixers, of transformers' own class, in evaluation mode.

    Raises:
        ValueError: the folder holds no retrofitted model, or lacks weights of the mixers.
    """
    from transformers import PreTrainedConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    content, _ = PreTrainedConfig.get_config_dict(directory)
    found = content.get(MODEL_TYPE)
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
    patch_saving(model)
    return model


def patch_saving(model: Any) -> None:
    """Make `save_pretrained` save the mixers of a retrofitted model too."""
    model.save_pretrained = partial(_save, model)


def _save(
    model: Any,
    save_directory: str | os.PathLike[str],
    is_main_process: bool = True,
    state_dict: dict[str, Any] | None = None,
    push_to_hub: bool = False,
    **options: Any,
) -> None:
    """`save_pretrained` with the mixers in config.json, for `load_retrofitted`."""
    if push_to_hub:
        raise ValueError("push_to_hub: got True; expected False, and then model.push_to_hub(...)")
    type(model).save_pretrained(model, save_directory, is_main_process, state_dict, **options)
    if is_main_process:
        path = Path(save_directory) / "config.json"
        stock = json.loads(path.read_text())
        kind = stock.pop("model_type")
        # Nested, and without its model type, by which a class of transformers would find its own config inside.
        mixers = {str(i): _options(mixer) for i, mixer in inserted_in(blocks_of(model)).items()}
        content = {
            "model_type": MODEL_TYPE,
            "id2label": {_HINT: ""},
            "transformers_version": stock.get("transformers_version"),
            MODEL_TYPE: {"family": kind, "stock": stock, "mixers": mixers},
        }
        partial_file = path.with_suffix(".partial")
        partial_file.write_text(json.dumps(content, indent=2) + "\n")
        partial_file.replace(path)


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
