"""What `bench_model` finds."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Phase:
    """Prefill or decode with and without the patch.

    stock_tokens_per_second, patched_tokens_per_second  medians, tokens of all sequences together
    ratio               how many times as fast the patched model is: the median over turns of their ratio
    turns               how often both were timed
    stock_peak_bytes, patched_peak_bytes  the most memory at once beside the weights; None where it is not measured
    """

    stock_tokens_per_second: float
    patched_tokens_per_second: float
    ratio: float
    turns: int
    stock_peak_bytes: int | None = None
    patched_peak_bytes: int | None = None


@dataclass(frozen=True)
class SleepCost:
    """A sleep over one window of the patched model.

    passes    N, how often the blocks run over the window
    seconds   median
    relative  seconds over those of the first number of passes: the median over turns of their ratio
    """

    passes: int
    seconds: float
    relative: float


@dataclass(frozen=True)
class LengthRow:
    """One length of a prompt.

    tokens       T, of each sequence
    error        relative difference of the logits with the patch from those without, of T tokens and of some after
                 them. Where it is above the tolerance of the type, it is their difference from the logits of the same
                 weights in a wider type
    stock_error  the difference of the stock model's logits from the wider type, where that was run; else None
    tolerance    the largest error that counts as right: that of the type, or twice the stock error, at most 0.2
    prefill, decode  None where the check is red
    kv_bytes     bytes of the cache's keys and values after T tokens
    recurrent_bytes  bytes of its fast weights and of its inputs of short convolutions
    sleep        one entry for each number of passes; empty where no session takes the model, or the check is red
    """

    tokens: int
    error: float
    stock_error: float | None
    tolerance: float
    prefill: Phase | None = None
    decode: Phase | None = None
    kv_bytes: int | None = None
    recurrent_bytes: int | None = None
    sleep: tuple[SleepCost, ...] = ()

    @property
    def passed(self) -> bool:
        """Tells whether the check of the logits is green."""
        return self.error <= self.tolerance


@dataclass(frozen=True)
class ModelReport:
    """A model with and without the patch.

    model          what was named: a family, a config or a folder
    class_name     the class of transformers
    parameters     how many
    layer_types    the kind of each layer, as the config names it; "" where it names none
    weights        "random", or the folder that they come from
    batch          sequences at once
    dtype          of the weights
    decoded        tokens of a timed decode, of each sequence
    replaced       what the patch replaces of this model, as `sleepkern.patched` names it
    left           why calls went to the original functions under the patch; empty where none did
    no_sleep       why no SleepSession takes this model; None where one does
    environment    device, versions, threads, date
    """

    environment: dict[str, Any]
    model: str
    class_name: str
    parameters: int
    layer_types: tuple[str, ...]
    weights: str
    batch: int
    dtype: str
    decoded: int
    replaced: tuple[str, ...]
    left: tuple[str, ...]
    no_sleep: str | None
    rows: tuple[LengthRow, ...]

    @property
    def passed(self) -> bool:
        """Tells whether the logits were right at every length."""
        return all(row.passed for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """The report as a dict, ready for JSON."""
        return {**asdict(self), "passed": self.passed}
