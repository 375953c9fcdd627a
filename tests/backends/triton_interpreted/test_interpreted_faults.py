# ruff: noqa: E501
"""A fault planted in a kernel is seen. Each runs in a copy of the package, so that no other test meets it."""

from __future__ import annotations

import importlib
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
from helpers.errors import errors

from sleepkern.backends import triton as backend
from sleepkern.rules import GATED_DELTA_RULE, KDA, SIMPLE_GLA, Rule
from sleepkern.testing import TOLERANCE, Shape

FOLDER = Path(backend.__file__).parent
PACKED = Shape(H=1, HV=1, K=16, V=16, lengths=(3, 20, 18))
FAULTS: dict[str, tuple[str, str, str, Rule, dict[str, Any]]] = {
    "state does not decay": ("state_pass.py", "S = kept * S + product", "S = S + product", GATED_DELTA_RULE, {}),
    "erases nothing": ("state_pass.py", "- product(W, S, DT, PRECISION)", "", GATED_DELTA_RULE, {}),
    "blocks merged with the wrong half": ("chunk_factors.py", "& ((half[None, :] & 1) == 0)", "& ((half[None, :] & 1) == 1)",
                                          GATED_DELTA_RULE, {}),
    "inverse of smaller blocks": ("chunk_factors.py", "if (1 << level) < C:", "if level < 0:", GATED_DELTA_RULE,
                                  {"dtype": torch.bfloat16, "correlation": 0.5}),
    "levels of the wrong row": ("chunk_factors_channel.py", "((half | 1) << level) - 1", "(half << level)", KDA,
                                {"decay": "mixed"}),
    "adjoint without scale": ("state_pass_backward.py", "tl.full([C], scale,", "tl.full([C], 1.0,", GATED_DELTA_RULE, {}),
    "adjoint forgets W": ("state_pass_backward.py", "dS -= product(W, dVn", "dS -= 0 * product(W, dVn", GATED_DELTA_RULE, {}),
    "dg without the end of the chunk": ("chunk_backward.py", "through += more_through", "through += 0 * more_through",
                                        SIMPLE_GLA, {}),
    "dg by differences": ("chunk_backward.py", "sum_before(to_end, C) + through", "tl.cumsum(to_end, 0) - to_end + through",
                          SIMPLE_GLA, {"decay": "strong"}),
    "dg of a channel by differences": (
        "chunk_backward.py", "sum_before(to_end, C) + S_dS", "tl.cumsum(to_end, 0) - to_end + S_dS", KDA,
        {"decay": "strong"},
    ),
    "pairs of the wrong rows": ("chunk_factors_channel.py", "behind = i[None, :] >= i[:, None]", "behind = i[None, :] > i[:, None]",
                                KDA, {"decay": "mixed"}),
    "dbeta without k.row": ("chunk_backward.py", "dbeta += k_row", "dbeta += 0 * k_row", GATED_DELTA_RULE, {}),
    "value heads overwrite each other": ("chunk_backward.py", "    if add:\n        dk +=", "    if False:\n        dk +=",
                                         GATED_DELTA_RULE, {"shape": Shape(T=40, H=1, HV=2, K=16, V=16)}),
    "slots of packed sequences": ("common.py", "slot - (begin // C).to(tl.int32) - sequence", "slot - sequence",
                                  SIMPLE_GLA, {"shape": PACKED}),
    "replay starts over": ("state_pass.py", "for _ in range(1, passes):", "for _ in range(2, passes):", GATED_DELTA_RULE,
                           {"passes": 3}),
    "step without decay": ("decode.py", "S *= tl.exp(tl.maximum(tl.load(", "S *= tl.exp(0 * tl.maximum(tl.load(",
                           GATED_DELTA_RULE, {"shape": Shape(T=5, H=1, HV=1, K=16, V=16)}),
    "adjoint does not decay": ("state_pass_backward.py", "dS = kept * dS", "dS = 1.0 * dS", KDA, {}),
    "gradients of another key head": (
        "chunk_backward.py", "p_k += first * k_stride + key_head * K", "p_k += first * k_stride", GATED_DELTA_RULE,
        {"shape": Shape(T=20, H=2, HV=2, K=16, V=16)},
    ),
    "gradient of the length is left in": ("chunk_backward.py", "d = norm[:, None] * (d - x * along[:, None])",
                                          "d = norm[:, None] * d", GATED_DELTA_RULE, {"normalize": True}),
    "closed form of one pass more": ("state_pass.py", "tl.exp((passes - 1) * G)", "tl.exp(passes * G)", SIMPLE_GLA,
                                     {"passes": 3}),
    "window without dstate": ("single_chunk.py", "if HAS_DSTATE:", "if False:", GATED_DELTA_RULE,
                              {"shape": Shape(T=12, H=1, HV=1, K=16, V=16)}),
    "minus infinity as it is": (
        "common.py", "g = tl.maximum(load_row_values(p_g, stride, rows, C), FORGET)",
        "g = load_row_values(p_g, stride, rows, C)", GATED_DELTA_RULE, {"forget": True},
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # a fault may make infinities and NaN
@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_seen(name: str, tmp_path: Path) -> None:
    file, old, new, rule, options = FAULTS[name]
    options = {"shape": Shape(T=40, H=1, HV=1, K=16, V=16), "dtype": torch.float32, **options}
    shape, dtype = options.pop("shape"), options.pop("dtype")
    sound = max(errors(rule, shape, dtype, **options).values())
    with faulty(tmp_path, file, old, new):
        found = errors(rule, shape, dtype, **options)
    assert sound <= TOLERANCE[dtype]
    assert max(found.values()) > TOLERANCE[dtype], found


@contextmanager
def faulty(folder: Path, file: str, old: str, new: str) -> Iterator[None]:
    """The Triton backend launches the kernels of a copy, in which `old` reads `new`."""
    copy = folder / "faulty_kernels"
    shutil.copytree(FOLDER, copy)
    text = (copy / file).read_text()
    assert text.count(old) == 1, f"{file}: {old!r} is there {text.count(old)} times, expected once"
    (copy / file).write_text(text.replace(old, new))
    for module in copy.glob("*.py"):
        source = module.read_text().replace("from ...problem", "from sleepkern.problems.recurrence")
        module.write_text(source.replace("from ..tensors", "from sleepkern.backends.torch_common"))
    (copy / "__init__.py").write_text("")
    sys.path.insert(0, str(folder))
    try:
        launch: ModuleType = importlib.import_module("faulty_kernels.launch")
        with mock.patch.object(backend, "_launch", return_value=launch):
            yield
    finally:
        sys.path.remove(str(folder))
        for name in [n for n in sys.modules if n.partition(".")[0] == "faulty_kernels"]:
            del sys.modules[name]
