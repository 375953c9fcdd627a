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
from checking import errors

from sleepkern.backends import triton as backend
from sleepkern.rules import GATED_DELTA_RULE, KDA, SIMPLE_GLA, Rule
from sleepkern.testing import TOLERANCE, Shape

FOLDER = Path(backend.__file__).parent
PACKED = Shape(H=1, HV=1, K=16, V=16, lengths=(3, 20, 18))
FAULTS: dict[str, tuple[str, str, str, Rule, dict[str, Any]]] = {
    "state does not decay": ("ingest.py", "S = kept * S + product", "S = S + product", GATED_DELTA_RULE, {}),
    "erases nothing": ("ingest.py", "- product(W, S, DT, PRECISION)", "", GATED_DELTA_RULE, {}),
    "scores with their diagonal": (
        "prepare.py", "tl.where(i[:, None] > i[None, :], kk * D", "tl.where(i[:, None] >= i[None, :], kk * D",
        GATED_DELTA_RULE, {},
    ),
    "inverse of smaller blocks": ("prepare.py", "if (BLOCK << level) < C:", "if level < 0:", GATED_DELTA_RULE,
                                  {"dtype": torch.bfloat16, "correlation": 0.5}),
    "levels of the wrong row": ("prepare.py", "((half | 1) << level) - 1", "(half << level)", KDA,
                                {"decay": "mixed"}),
    "adjoint without scale": ("adjoint.py", "tl.full([C], scale,", "tl.full([C], 1.0,", GATED_DELTA_RULE, {}),
    "adjoint forgets W": ("adjoint.py", "dS -= product(W, dVn", "dS -= 0 * product(W, dVn", GATED_DELTA_RULE, {}),
    "dg without the end of the chunk": ("gradients.py", "end += at_end", "end += 0 * at_end", SIMPLE_GLA, {}),
    "dbeta without k.row": ("gradients.py", "dbeta += k_row", "dbeta += 0 * k_row", GATED_DELTA_RULE, {}),
    "value heads overwrite each other": ("gradients.py", "    if add:\n        dk +=", "    if False:\n        dk +=",
                                         GATED_DELTA_RULE, {"shape": Shape(T=40, H=1, HV=2, K=16, V=16)}),
    "slots of packed sequences": ("tiles.py", "slot - (begin // C).to(tl.int32) - sequence", "slot - sequence",
                                  SIMPLE_GLA, {"shape": PACKED}),
    "replay starts over": ("ingest.py", "for _ in range(1, passes):", "for _ in range(2, passes):", GATED_DELTA_RULE,
                           {"passes": 3}),
    "step without decay": ("decode.py", "S *= tl.exp(tl.maximum(tl.load(", "S *= tl.exp(0 * tl.maximum(tl.load(",
                           GATED_DELTA_RULE, {"shape": Shape(T=5, H=1, HV=1, K=16, V=16)}),
}  # fmt: skip


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
    assert old in text, f"{file} no longer has {old!r}"
    (copy / file).write_text(text.replace(old, new))
    for module in copy.glob("*.py"):
        source = module.read_text().replace("from ...problem", "from sleepkern.problem")
        module.write_text(source.replace("from ..tensors", "from sleepkern.backends.tensors"))
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
