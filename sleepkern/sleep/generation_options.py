"""What a session's `generate` was asked for: options over a generation_config over that of the model."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

from torch import Tensor

GIVEN = (
    "past_key_values", "cache_params", "position_ids", "cache_position", "inputs", "input_ids", "inputs_embeds",
    "cache_implementation",
)  # fmt: skip
"""What a session sets itself."""
UNDONE = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp", "speculation_type")
"""Guesses at tokens, which would have to be taken out of fast weights again; see also token_healing."""
HEEDED = (
    "max_new_tokens", "max_length", "min_new_tokens", "min_length", "eos_token_id", "pad_token_id", "do_sample",
    "temperature", "top_k", "top_p",
)  # fmt: skip
"""Options of `written`."""
_WITHOUT_EFFECT = (
    "generation_config", "use_cache", "bos_token_id", "decoder_start_token_id", "transformers_version",
    "length_penalty", "early_stopping", "renormalize_logits", "cache_config", "max_cache_len", "prefill_chunk_size",
    "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold", "assistant_lookbehind",
    "target_lookbehind", "max_matching_ngram_size", "compile_config", "disable_compile",
)  # fmt: skip
"""Without beams, an assistant or a cache to be chosen; so are names that begin with an underscore."""
_ONE = (
    "num_beams", "num_return_sequences", "num_beam_groups", "repetition_penalty", "encoder_repetition_penalty",
    "typical_p", "guidance_scale",
)  # fmt: skip
"""Those of which 1 says that nothing is done."""


class Asked(NamedTuple):
    """How to write on. most, least: new tokens; eos ends a row, which `pad` then fills."""

    most: int
    least: int
    eos: tuple[int, ...]
    pad: int
    do_sample: bool
    temperature: float
    top_k: int | None
    top_p: float


def for_the_model(model: Any, options: dict[str, Any]) -> dict[str, Any]:
    """options for a model's own `generate`, whose cache is the session's memory: it is used whatever they say.

    Raises:
        ValueError: an option that a session sets itself, or tokens that would have to be forgotten again.
    """
    given = [name for name in GIVEN if options.get(name) is not None]
    if given:
        raise ValueError(f"options: got {', '.join(given)}; expected none of what a session sets itself")
    every = found(model, options)
    undone = [name for name in (*UNDONE, "token_healing") if every.get(name) not in (None, False)]
    if undone:
        raise ValueError(
            f"options: got {', '.join(undone)}; expected none that takes tokens back, which fast weights cannot"
        )
    config = copy.deepcopy(options.get("generation_config"))
    if config is None:
        return {**options, "use_cache": True, "cache_implementation": None}
    config.use_cache, config.cache_implementation = True, None
    return {**{name: x for name, x in options.items() if name != "use_cache"}, "generation_config": config}


def found(model: Any, options: dict[str, Any]) -> dict[str, Any]:
    """All that was said, the nearest to the caller last."""
    configs = (getattr(model, "generation_config", None), options.get("generation_config"))
    said: dict[str, Any] = {}
    for source in (*(vars(config) for config in configs if config is not None), options):
        said |= {name: x for name, x in source.items() if x is not None and not name.startswith("_")}
    return said


def pad_of(model: Any, options: dict[str, Any]) -> int:
    """What fills a row behind its end: pad_token_id, or the first eos_token_id, or 0."""
    said = found(model, options)
    return int(next((i for name in ("pad_token_id", "eos_token_id") for i in _tokens(name, said.get(name))), 0))


def asked(model: Any, options: dict[str, Any], prompt: int) -> Asked:
    """Of `written`, after a prompt of so many tokens.

    Raises:
        TypeError, ValueError: another option, or one out of range.
    """
    said = found(model, options)
    unknown = [name for name, x in said.items() if name not in (*HEEDED, *_WITHOUT_EFFECT) and not _idle(name, x)]
    if unknown:
        raise ValueError(
            f"options: got {', '.join(unknown)}; expected {', '.join(HEEDED)} or a generation_config of these, for "
            f"beams and the rest are of transformers' own models"
        )
    counts = {name: _count(name, said[name]) for name in HEEDED[:4] if name in said}
    most = counts.get("max_new_tokens", counts.get("max_length", prompt + 20) - prompt)
    if most < 0 or (most == 0 and "max_new_tokens" not in counts):
        raise ValueError(f"max_length: got {counts['max_length']} for ids of {prompt} tokens; expected more")
    least = counts.get("min_new_tokens", counts.get("min_length", prompt) - prompt)
    temperature, top_p, top_k = said.get("temperature", 1.0), said.get("top_p", 1.0), said.get("top_k")
    sampled = bool(said.get("do_sample", False))
    if sampled and not temperature > 0:
        raise ValueError(f"temperature: got {temperature}; expected above 0")
    if sampled and not 0 < top_p <= 1:
        raise ValueError(f"top_p: got {top_p}; expected above 0 and at most 1")
    top_k = None if top_k in (None, 0) else _count("top_k", top_k)
    eos = _tokens("eos_token_id", said.get("eos_token_id"))
    return Asked(most, least, eos, pad_of(model, options), sampled, float(temperature), top_k, float(top_p))


def _idle(name: str, x: Any) -> bool:
    """Whether an option says that nothing is done."""
    return not isinstance(x, Tensor) and (x is False or (name in _ONE and x == 1) or (name not in _ONE and x == 0))


def _count(name: str, x: Any) -> int:
    if isinstance(x, bool) or not isinstance(x, int):
        raise TypeError(f"{name}: got {x!r}; expected a whole number")
    if x < 0:
        raise ValueError(f"{name}: got {x}; expected at least 0")
    return x


def _tokens(name: str, x: Any) -> tuple[int, ...]:
    """One or several, as a number, a list or a tensor."""
    x = x.tolist() if isinstance(x, Tensor) else x
    return tuple(_count(name, i) for i in ([] if x is None else x if isinstance(x, (list, tuple)) else [x]))
