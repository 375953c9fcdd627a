"""The forward of a base model, which translates every name of packed sequences to the names that its layers read.

A modeling file hands some names on to its recurrences and drops others, and its attention goes by position_ids alone.
So the replacement translates before the layers run: to offsets for recurrences and convolutions (cu_seq_lens_q), and to
position_ids that restart for the attention mask. Names that disagree, and models that mix sequences, raise an error.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from types import MethodType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sleepkern.eager import assert_async

from .. import caches
from ..patching import Make, Target
from .packing import LENGTHS, OFFSETS, SegmentTree, offsets_of, sequence_indices

_NAMES = (*OFFSETS, "seq_idx")
_HELD = "_old_forward"
_MASKS_WITHOUT_POSITIONS = ("granitemoehybrid",)
"""Families whose files make attention's mask without position_ids, so that it never sees packed sequences."""


def targets(module: ModuleType) -> list[Target]:
    """The forwards of the base models that a modeling file defines, and of heads that drop the names of sequences."""
    defined = [x for _, x in sorted(vars(module).items()) if getattr(x, "__module__", None) == module.__name__]
    bases = [x for x in defined if isinstance(x, type) and x.__name__.endswith("Model") and _reads_text(x)]
    older = "is_fast_path_available" in vars(module)
    make = functools.partial(forward, hands_on=not older, masks=_family(module) in _MASKS_WITHOUT_POSITIONS)
    found = [Target(x, "forward", make if older else _also_recorded(make)) for x in bases]
    heads = [x for x in defined if getattr(x, "__name__", "") == "Mamba2ForCausalLM"]
    found += [Target(x, "forward", forward_names) for x in heads]
    return found if older or not caches.records_past() else found + _takes_drafts(defined)


def _takes_drafts(defined: list[Any]) -> list[Target]:
    """The flags by which `generate` refuses drafts, which a patched model's cache can take back.

    For a model named Mamba, `generate` calls the cache by another name than its code for drafts. There the flag stays.
    """
    refuses = [x for x in defined if isinstance(x, type) and "_is_stateful" in vars(x) and "Mamba" not in x.__name__]
    return [Target(x, "_is_stateful", lambda _: False) for x in refuses]  # type: ignore[arg-type,return-value]


def _also_recorded(make: Make) -> Make:
    return lambda original: recorded_forward(make(original))


def hooked_forwards(layer: nn.Module, of_classes: list[Target]) -> list[Target]:
    """The targets for a layer whose forward accelerate's hooks took from the class before the patch."""
    made = (x for x in of_classes if x.holder is type(layer) and isinstance(vars(layer).get(_HELD), MethodType))
    return [Target(layer, _HELD, functools.partial(_bound, x.make)) for x in made]


def _bound(make: Make, method: Any) -> Any:
    return MethodType(make(method.__func__), method.__self__)


@functools.lru_cache(maxsize=256)  # signatures take long, and a server may patch for each request
def _reads_text(model: type) -> bool:
    """Tells whether a base model embeds tokens; in a model of several media, an inner model does."""
    taken = inspect.signature(model.forward).parameters if "forward" in vars(model) else {}  # type: ignore[attr-defined]
    return "inputs_embeds" in taken and not any(name.startswith("pixel_values") for name in taken)


def _family(module: ModuleType) -> str:
    return module.__name__.rpartition(".modeling_")[2]


class _CarriedArguments(dict[str, Any]):
    """Arguments that travel as attention_mask through a head that drops the names of packed sequences."""


def forward_names(original: Callable[..., Any]) -> Callable[..., Any]:
    """The replacement of the forward of Mamba2ForCausalLM."""
    order = _order(original)

    @functools.wraps(original)
    def forward_with_names(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(order, args, strict=False)), **kwargs}
        names = {name: given[name] for name in (*_NAMES, *LENGTHS) if given.get(name) is not None}
        if (positions := _positions(given)) is not None:
            names["position_ids"] = positions
        if not names or torch.compiler.is_exporting():
            return original(self, *args, **kwargs)
        mask = _CarriedArguments(names, attention_mask=given.get("attention_mask"))
        return original(self, **{**given, "attention_mask": mask})

    return forward_with_names


def recorded_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    """The replacement of the forward of a base model whose cache may roll back (rollback_layers.py)."""
    order = _order(original)

    @functools.wraps(original)
    def forward_recorded(self: Any, *args: Any, **kwargs: Any) -> Any:
        cache = next((kwargs[name] for name in caches.NAMES if kwargs.get(name) is not None), None)
        if cache is None and len(args) > 1:
            cache = caches.cache_among(args)
        if not _records(cache) or torch.compiler.is_exporting():
            return original(self, *args, **kwargs)
        if torch.compiler.is_compiling():
            raise ValueError(
                "past_key_values: got a cache that rolls back in a compiled model; expected the model itself"
            )
        from .rollback_layers import recording_into

        given = {**dict(zip(order, args, strict=False)), **kwargs}
        text = given["inputs_embeds"] if given.get("input_ids") is None else given["input_ids"]
        with recording_into(cache, text.shape[1], _first_position(given)):
            return original(self, *args, **kwargs)

    return forward_recorded


def _first_position(given: dict[str, Any]) -> int | None:
    """The first of position_ids [1,T]; None for several rows, which may be padded, and for other forms."""
    x = given.get("position_ids")
    return int(x[0, 0]) if isinstance(x, Tensor) and x.ndim == 2 and x.shape[0] == 1 and x.numel() > 1 else None


def _records(cache: Any) -> bool:
    """Tells whether the recurrent layers of a cache, all alike, keep what they need to roll back, or are told to."""
    first = next((x for x in getattr(cache, "layers", ()) if hasattr(x, "recurrent_states")), None)
    return first is not None and (hasattr(first, "rolls_back") or getattr(first, "record_past", False))


def forward(original: Callable[..., Any], hands_on: bool, masks: bool) -> Callable[..., Any]:
    """The replacement of the forward of a base model.

    Args:
        hands_on: whether its layers hand offsets on to their recurrences.
        masks: whether attention's mask of packed sequences has to be made here.
    """
    order = _order(original)

    @functools.wraps(original)
    def forward_packed(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(order, args, strict=False)), **kwargs}
        if torch.compiler.is_exporting() or isinstance(given.get("cu_seq_lens_k"), dict):  # or paged attention's order
            return original(self, *args, **kwargs)
        carried = isinstance(given.get("attention_mask"), _CarriedArguments)
        if carried:
            given |= given["attention_mask"]
        if isinstance(given.get("cu_seq_lens_q"), SegmentTree):
            return original(self, **_tree_arguments(self, given, hands_on, "position_ids" in order))
        packed = _packed(given)
        if packed is None and not carried and not any(name in kwargs for name in _NAMES):
            return original(self, *args, **kwargs)
        if not hands_on and packed is not None:
            if packed.offsets.device.type != "cpu":  # there packages may see to it
                return original(self, *args, **kwargs)
            raise ValueError(
                f"packed sequences: got several in a row for a {type(self).__name__} of this version of transformers, "
                "whose layers do not keep them apart on a CPU; expected one a row"
            )
        others = {name: x for name, x in given.items() if name not in (*_NAMES, *LENGTHS)}
        if "position_ids" not in order:
            others.pop("position_ids", None)
        if packed is None:
            return original(self, **others)
        return original(self, **others | _packed_arguments(self, packed, given, "position_ids" in order, masks))

    return forward_packed


def _tree_arguments(model: Any, given: dict[str, Any], hands_on: bool, has_positions: bool) -> dict[str, Any]:
    """The arguments of a row of segments that go on from each other, whose mask the caller made (token_tree.py).

    Raises:
        ValueError: the call has a cache, or the layers do not hand offsets on.
    """
    if not hands_on:
        raise ValueError(
            f"cu_seq_lens_q: got a tree of segments for a {type(model).__name__} of this version of transformers; "
            "expected one sequence a row, as its layers do not keep segments apart"
        )
    if _past(given) is not None or given.get("use_cache"):
        raise ValueError("use_cache: got a cache with a tree of segments; expected False")
    others = given | {"use_cache": False}
    if not has_positions:
        others.pop("position_ids", None)
    return others


@functools.lru_cache(maxsize=256)
def _order(original: Callable[..., Any]) -> list[str]:
    """The names of the positional arguments after self."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return [x.name for x in inspect.signature(original).parameters.values() if x.kind is kind][1:]


class _Packed(NamedTuple):
    offsets: Tensor
    """[n + 1] int32 among the tokens of all rows."""
    rows: int
    T: int


def _packed(given: dict[str, Any]) -> _Packed | None:
    """None where every row is one sequence.

    Raises:
        ValueError: names that do not fit the tokens or each other.
    """
    named = {name: given[name] for name in _NAMES if given.get(name) is not None}
    positions = _positions(given)
    if not named and (positions is None or given.get("attention_mask") is not None):
        return None
    text: Tensor = given["inputs_embeds"] if given.get("input_ids") is None else given["input_ids"]
    rows, T = text.shape[:2]
    if torch.compiler.is_compiling():
        offsets = _unchecked_offsets(named, positions, rows, T)
        return None if offsets is None else _Packed(offsets.to(text.device, torch.int32), rows, T)
    starts = _agreed_starts(named, positions, rows, T)
    if starts == list(range(0, rows * T, T)):
        return None
    return _Packed(torch.tensor([*starts, rows * T], dtype=torch.int32, device=text.device), rows, T)


def _positions(given: dict[str, Any]) -> Tensor | None:
    """position_ids [B,T] or [1,T] of text without a past; of the four that vision models give, those of text."""
    x = given.get("position_ids")
    if x is None or x.shape[-1] < 2 or x.is_meta or _past(given) is not None:
        return None
    if x.ndim == 3:
        return x[0] if x.shape[0] == 4 else None  # type: ignore[no-any-return]
    return x.view(-1, x.shape[-1])  # type: ignore[no-any-return]


def _past(given: dict[str, Any]) -> str | None:
    """The name of the argument that holds a cache; None without a cache."""
    return next((x for x in given if caches.is_cache(given[x]) or (x in caches.NAMES and given[x] is not None)), None)


def _unchecked_offsets(named: dict[str, Any], positions: Tensor | None, rows: int, T: int) -> Tensor | None:
    """Offsets in a compiled graph, which cannot compare values; there positions alone may not restart."""
    for name in OFFSETS:
        if name in named:
            return torch.as_tensor(named[name])
    if "seq_idx" in named:
        return offsets_of(rows, T, seq_idx=named["seq_idx"])
    assert positions is not None
    goes_on = (positions.diff(dim=-1) == 1).all()
    assert_async(goes_on, "position_ids: restart in a compiled model; expected cu_seq_lens_q beside them")
    return None


def _agreed_starts(named: dict[str, Any], positions: Tensor | None, rows: int, T: int) -> list[int]:
    """The starts of the sequences among the tokens of all rows, by every argument that names them.

    Raises:
        ValueError: two arguments disagree, or an argument is malformed.
    """
    found = {name: _starts_of_offsets(name, x, rows, T) for name, x in named.items() if name in OFFSETS}
    if "seq_idx" in named:
        index = torch.as_tensor(named["seq_idx"])
        if index.shape not in ((rows, T), (1, T), (T,)):
            raise ValueError(f"seq_idx: got shape {list(index.shape)}; expected [B,T] = {[rows, T]}")
        found["seq_idx"] = _starts_of_marks(index.view(-1, T).diff(dim=-1) != 0, rows, T), rows * T
    if positions is not None and positions.shape[1] == T:
        found["position_ids"] = _starts_of_marks(positions.diff(dim=-1) != 1, rows, T), rows * T
    (first, (starts, end)), *others = found.items()
    for name, (more, its_end) in others:
        both = min(end, its_end)
        if [x for x in more if x < both] != [x for x in starts if x < both]:
            raise ValueError(
                f"{name}: got sequences that start at tokens {_shortened(more)}; expected those of {first}, "
                f"{_shortened(starts)}"
            )
        if end < its_end:  # after its last offset, an argument leaves padding, which another may divide
            starts, end = more, its_end
    return starts


def _starts_of_offsets(name: str, x: Any, rows: int, T: int) -> tuple[list[int], int]:
    """The starts, and the end of the last sequence; padding after that end counts as a sequence."""
    offsets = torch.as_tensor(x).flatten().tolist()
    end, total = (offsets[-1] if offsets else 0), rows * T
    rising = all(a <= b for a, b in zip(offsets, offsets[1:], strict=False))
    starts = sorted({*offsets[:-1], *([end] if end < total else [])})
    if len(offsets) < 2 or offsets[0] != 0 or not rising or end > total or isinstance(end, float):
        raise ValueError(f"{name}: got {_shortened(offsets)}; expected offsets of sequences, from 0 to {total} tokens")
    starts = [x for x in starts if x < total]
    if not set(range(0, total, T)) <= set(starts):
        raise ValueError(f"{name}: got {_shortened(offsets)}; expected every row of {T} tokens to start a sequence")
    return starts, end


def _starts_of_marks(new: Tensor, rows: int, T: int) -> list[int]:
    """The starts; new [B or 1,T-1] says of each token but the first of a row whether it starts a sequence."""
    first = new.new_ones(new.shape[0], 1)
    return torch.cat([first, new], dim=1).expand(rows, -1).flatten().nonzero()[:, 0].tolist()  # type: ignore[no-any-return]


def _shortened(x: Iterable[Any]) -> str:
    shown = list(x)
    return str(shown) if len(shown) <= 8 else f"[{', '.join(map(str, shown[:6]))}, ..., {shown[-1]}]"


def _packed_arguments(
    model: Any, packed: _Packed, given: dict[str, Any], has_positions: bool, masks: bool
) -> dict[str, Any]:
    """The arguments with which the layers keep the sequences apart.

    Raises:
        ValueError: the call has a cache, or the model reads tokens across sequences.
    """
    offsets, rows, T = packed
    past = _past(given)
    if past is not None or given.get("use_cache"):
        raise ValueError(
            f"{past or 'use_cache'}: got {'a cache' if past else True} with packed sequences, of which no cache can be "
            f"kept; expected {None if past else False}"
        )
    if getattr(model.config, "ple_layer_ids", None):
        raise ValueError(
            f"packed sequences: got several in a row for a {type(model).__name__} with ple_layer_ids, whose embeddings "
            "of n-grams read tokens across sequences; expected one a row"
        )
    apart: dict[str, Any] = {"use_cache": False, "cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets}
    apart["attention_mask"] = _mask(given.get("attention_mask"))
    if torch.compiler.is_compiling():
        apart |= {name: given[name] for name in LENGTHS if name in given}
    else:
        apart |= dict.fromkeys(LENGTHS, int(offsets.diff().max()))
    if has_positions:
        apart["position_ids"] = _restarted_positions(given.get("position_ids"), packed)
    if masks and apart["attention_mask"] is None:
        from transformers.masking_utils import create_causal_mask

        shaped = model.get_input_embeddings().weight.new_zeros(()).expand(rows, T, 1)
        mask = create_causal_mask(model.config, shaped, None, None, position_ids=_restarted_positions(None, packed))
        apart["attention_mask"] = {"full_attention": mask, "linear_attention": None}
    return apart


def _mask(mask: Any) -> Any:
    """None for a mask [B,T] that hides nothing; a mask of another form stays as it is."""
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        return mask
    everything = (mask == 1).all()
    if torch.compiler.is_compiling():
        assert_async(everything, "attention_mask: hides tokens of packed sequences; expected None")
    elif not everything:
        raise ValueError("attention_mask: got one that hides tokens of packed sequences; expected None, or ones")
    return None


def _restarted_positions(positions: Tensor | None, packed: _Packed) -> Tensor:
    """position_ids that restart with each sequence: those of the call, or new ones."""
    if positions is not None and not (positions.ndim == 3 and positions.shape[0] == 3):
        return positions
    offsets, rows, T = packed
    tokens = torch.arange(rows * T, device=offsets.device).view(rows, T)
    text = tokens - offsets[sequence_indices(offsets, rows, T).long()]
    return text if positions is None else torch.cat([text[None], positions])
