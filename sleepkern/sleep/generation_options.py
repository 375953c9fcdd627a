"""The options of a session's `generate`: arguments, before a generation_config, before that of the model."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

from torch import Tensor

SET_BY_SESSION = (
    "past_key_values", "cache_params", "position_ids", "cache_position", "inputs", "input_ids", "inputs_embeds",
    "cache_implementation",
)  # fmt: skip
"""Options that a session sets itself."""
TAKES_TOKENS_BACK = (
    "assistant_model",
    "prompt_lookup_num_tokens",
    "assistant_early_exit",
    "use_mtp",
    "speculation_type",
)
"""Options that guess tokens and take some back, which fast weights cannot; token_healing is another."""
SUPPORTED = (
    "max_new_tokens", "max_length", "min_new_tokens", "min_length", "eos_token_id", "pad_token_id", "do_sample",
    "temperature", "top_k", "top_p",
)  # fmt: skip
"""Options that `generation.generate` follows."""
_IGNORED = (
    "generation_config", "use_cache", "bos_token_id", "decoder_start_token_id", "transformers_version",
    "length_penalty", "early_stopping", "renormalize_logits", "cache_config", "max_cache_len", "prefill_chunk_size",
    "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold", "assistant_lookbehind",
    "target_lookbehind", "max_matching_ngram_size", "compile_config", "disable_compile",
)  # fmt: skip
"""Options without effect where there are no beams, no assistant and no choice of a cache."""
_OFF_AT_ONE = (
    "num_beams", "num_return_sequences", "num_beam_groups", "repetition_penalty", "encoder_repetition_penalty",
    "typical_p", "guidance_scale",
)  # fmt: skip
"""Options that do nothing at 1; all others do nothing at 0."""


class GenerationOptions(NamedTuple):
    """How tokens are generated.

    most, least  bounds on the number of new tokens
    eos          tokens that end a row
    pad          token that fills a row after its end
    do_sample    whether tokens are sampled, with the temperature, the top_k largest logits and the top_p mass
    """

    most: int
    least: int
    eos: tuple[int, ...]
    pad: int
    do_sample: bool
    temperature: float
    top_k: int | None
    top_p: float


def model_options(model: Any, options: dict[str, Any]) -> dict[str, Any]:
    """The options for a model's own `generate`, which uses the session's cache whatever the options say.

    Raises:
        ValueError: an option that a session sets itself, or one that takes tokens back.
    """
    given = [name for name in SET_BY_SESSION if options.get(name) is not None]
    if given:
        raise ValueError(f"options: got {', '.join(given)}; expected none of what a session sets itself")
    every = merged_options(model, options)
    undone = [name for name in (*TAKES_TOKENS_BACK, "token_healing") if every.get(name) not in (None, False)]
    if undone:
        raise ValueError(
            f"options: got {', '.join(undone)}; expected none that takes tokens back, which fast weights cannot"
        )
    config = copy.deepcopy(options.get("generation_config"))
    if config is None:
        return {**options, "use_cache": True, "cache_implementation": None}
    config.use_cache, config.cache_implementation = True, None
    return {**{name: x for name, x in options.items() if name != "use_cache"}, "generation_config": config}


def merged_options(model: Any, options: dict[str, Any]) -> dict[str, Any]:
    """All options by name; arguments override their generation_config, which overrides that of the model."""
    configs = (getattr(model, "generation_config", None), options.get("generation_config"))
    merged: dict[str, Any] = {}
    for source in (*(vars(config) for config in configs if config is not None), options):
        merged |= {name: x for name, x in source.items() if x is not None and not name.startswith("_")}
    return merged


def pad_token(model: Any, options: dict[str, Any]) -> int:
    """The token that fills a row after its end: pad_token_id, or the first eos_token_id, or 0."""
    merged = merged_options(model, options)
    return int(next((i for name in ("pad_token_id", "eos_token_id") for i in _tokens(name, merged.get(name))), 0))


def resolve_options(model: Any, options: dict[str, Any], prompt: int) -> GenerationOptions:
    """The options of `generation.generate` after a prompt of so many tokens.

    Raises:
        TypeError, ValueError: an unknown option, or one out of range.
    """
    merged = merged_options(model, options)
    unknown = [name for name, x in merged.items() if name not in (*SUPPORTED, *_IGNORED) and not _does_nothing(name, x)]
    if unknown:
        raise ValueError(
            f"options: got {', '.join(unknown)}; expected {', '.join(SUPPORTED)} or a generation_config of these, for "
            f"beams and the rest are of transformers' own models"
        )
    counts = {name: _count(name, merged[name]) for name in SUPPORTED[:4] if name in merged}
    most = counts.get("max_new_tokens", counts.get("max_length", prompt + 20) - prompt)
    if most < 0 or (most == 0 and "max_new_tokens" not in counts):
        raise ValueError(f"max_length: got {counts['max_length']} for ids of {prompt} tokens; expected more")
    least = counts.get("min_new_tokens", counts.get("min_length", prompt) - prompt)
    temperature, top_p, top_k = merged.get("temperature", 1.0), merged.get("top_p", 1.0), merged.get("top_k")
    sampled = bool(merged.get("do_sample", False))
    if sampled and not temperature > 0:
        raise ValueError(f"temperature: got {temperature}; expected above 0")
    if sampled and not 0 < top_p <= 1:
        raise ValueError(f"top_p: got {top_p}; expected above 0 and at most 1")
    top_k = None if top_k in (None, 0) else _count("top_k", top_k)
    eos = _tokens("eos_token_id", merged.get("eos_token_id"))
    return GenerationOptions(
        most, least, eos, pad_token(model, options), sampled, float(temperature), top_k, float(top_p)
    )


def _does_nothing(name: str, x: Any) -> bool:
    """Tells whether an option has the value that turns it off."""
    return not isinstance(x, Tensor) and (
        x is False or (name in _OFF_AT_ONE and x == 1) or (name not in _OFF_AT_ONE and x == 0)
    )


def _count(name: str, x: Any) -> int:
    if isinstance(x, bool) or not isinstance(x, int):
        raise TypeError(f"{name}: got {x!r}; expected a whole number")
    if x < 0:
        raise ValueError(f"{name}: got {x}; expected at least 0")
    return x


def _tokens(name: str, x: Any) -> tuple[int, ...]:
    """The tokens of an option, which is a number, a list, a tensor or None."""
    x = x.tolist() if isinstance(x, Tensor) else x
    return tuple(_count(name, i) for i in ([] if x is None else x if isinstance(x, (list, tuple)) else [x]))
