"""Bad inputs of every kind, with the sentence that refuses each: for the checks in Python and for those in C++."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from sleepkern import rules
from sleepkern.testing import Shape, make_inputs

Change = Callable[[dict[str, Any]], dict[str, Any]]
RULE = rules.GATED_DELTA_RULE
SHAPE = Shape(B=2, T=5, H=2, HV=4, K=8, V=6)
PACKED = Shape(H=2, HV=4, K=8, V=6, lengths=(2, 3))


def offsets(*values: int) -> torch.Tensor:
    return torch.tensor(values)


class BadInput(NamedTuple):
    """A call that is refused.

    error    the class of what is raised
    message  a pattern that the sentence matches from its start
    change   from the arguments of a right call to those that are replaced
    """

    error: type[Exception]
    message: str
    change: Change


def refused_calls() -> dict[str, tuple[BadInput, dict[str, Any]]]:
    """Each row of BAD and BAD_PACKING with all arguments of its call."""
    tables = ((BAD, SHAPE), (BAD_PACKING, PACKED))
    found = {}
    for table, shape in tables:
        for name, row in table.items():
            x = make_inputs(RULE, shape)
            found[name] = (BadInput(*row), {**x, **row[2](x)})
    return found


BAD: dict[str, tuple[type[Exception], str, Change]] = {
    "q not a tensor": (TypeError, r"q: got list; expected a torch.Tensor", lambda x: {"q": [1.0]}),
    "q missing": (TypeError, r"q: got NoneType; expected a torch.Tensor", lambda x: {"q": None}),
    "k rank": (ValueError, r"k: got shape \[2, 5, 16\]; expected \[B, T, H, K\]", lambda x: {"k": x["k"].flatten(2)}),
    "q shape": (ValueError, r"q: got shape \[2, 5, 2, 7\]; expected \[2, 5, 2, 8\]", lambda x: {"q": x["q"][..., :7]}),
    "v tokens": (
        ValueError,
        r"v: got shape \[2, 4, 4, 6\]; expected \[2, 5, HV, V\]",
        lambda x: {"v": x["v"][:, :4]},
    ),
    "heads": (
        ValueError,
        r"v: got HV = 3 value heads; expected a multiple of H = 2",
        lambda x: {"v": x["v"][:, :, :3]},
    ),
    "no heads": (
        ValueError,
        r"k: got shape \[2, 5, 0, 8\]; expected H and K of at least 1",
        lambda x: {n: x[n][:, :, :0] for n in "qk"},
    ),
    "g shape": (
        ValueError,
        r"g: got shape \[2, 5, 4, 8\]; expected \[2, 5, 4\]",
        lambda x: {"g": x["g"][..., None].expand(-1, -1, -1, 8)},
    ),
    "g missing": (ValueError, r"g: gated_delta_rule needs it, got None", lambda x: {"g": None}),
    "g positive": (ValueError, r"g: got a log decay of 0.5; expected g <= 0", lambda x: {"g": x["g"] * 0 + 0.5}),
    "g integer": (TypeError, r"g: got torch.int64; expected one of", lambda x: {"g": x["g"].long()}),
    "beta missing": (ValueError, r"beta: gated_delta_rule needs it, got None", lambda x: {"beta": None}),
    "beta shape": (
        ValueError,
        r"beta: got shape \[2, 5, 2\]; expected \[2, 5, 4\]",
        lambda x: {"beta": x["beta"][..., :2]},
    ),
    "types": (
        TypeError,
        r"v: got torch.bfloat16; expected torch.float32, the type of k",
        lambda x: {"v": x["v"].bfloat16()},
    ),
    "integers": (TypeError, r"k: got torch.int32; expected one of", lambda x: {n: x[n].int() for n in "qkv"}),
    "device": (ValueError, r"q: got device meta; expected cpu, where k is", lambda x: {"q": x["q"].to("meta")}),
    "state shape": (
        ValueError,
        r"initial_state: got shape \[1, 4, 8, 6\]; expected \[2, 4, 8, 6\]",
        lambda x: {"initial_state": x["initial_state"][:1]},
    ),
    "state transposed": (
        ValueError,
        r"initial_state: got shape \[2, 4, 6, 8\]; expected \[2, 4, 8, 6\]",
        lambda x: {"initial_state": x["initial_state"].transpose(2, 3)},
    ),
    "state type": (
        TypeError,
        r"initial_state: got torch.float16; expected torch.float32",
        lambda x: {"initial_state": x["initial_state"].half()},
    ),
    "packed batch": (
        ValueError,
        r"cu_seqlens: got a batch of B = 2; expected B = 1",
        lambda x: {"cu_seqlens": offsets(0, 5)},
    ),
}

BAD_PACKING: dict[str, tuple[type[Exception], str, Change]] = {
    "falling": (ValueError, r"cu_seqlens: got \[0, 6, 5\]; expected offsets that start at 0, never fall and end at",
                lambda x: {"cu_seqlens": offsets(0, 6, 5)}),
    "start": (ValueError, r"cu_seqlens: got \[1, 2, 5\]; expected offsets that start at 0",
              lambda x: {"cu_seqlens": offsets(1, 2, 5)}),
    "end": (ValueError, r"cu_seqlens: got \[0, 2, 4\]; expected .* end at T = 5",
            lambda x: {"cu_seqlens": offsets(0, 2, 4)}),
    "type": (TypeError, r"cu_seqlens: got torch.float32; expected torch.int32 or torch.int64",
             lambda x: {"cu_seqlens": x["cu_seqlens"].float()}),
    "rank": (ValueError, r"cu_seqlens: got shape \[1, 3\]; expected \[n \+ 1\]",
             lambda x: {"cu_seqlens": x["cu_seqlens"][None]}),
    "count": (ValueError, r"initial_state: got shape \[2, 4, 8, 6\]; expected \[1, 4, 8, 6\]",
              lambda x: {"cu_seqlens": offsets(0, 5)}),
}  # fmt: skip
