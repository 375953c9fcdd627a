"""A fault planted in a kernel is seen. Each fault runs in a copy of the package, so that no other test meets it."""

from __future__ import annotations

import importlib
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, Protocol
from unittest import mock

import pytest
import torch
from helpers.errors import errors
from helpers.states_along import along_errors, decode_errors
from variants import with_variants

from sleepkern.backends import triton as backend
from sleepkern.backends.triton import launch as sound_launch
from sleepkern.backends.triton.plan_table import Variant
from sleepkern.rules import GATED_DELTA_RULE, KDA, SIMPLE_GLA, Rule
from sleepkern.testing import TOLERANCE, Shape

pytestmark = pytest.mark.mutation

FOLDER = Path(backend.__file__).parent
ANCHOR = re.compile(r"^ *# mutant: (.+)\n", re.MULTILINE)
MIXER = {"short_convolution.py", "gated_rms_norm.py"}
"""Kernels whose faults are in test_interpreted_mixer_faults.py."""


class Planted(Protocol):
    """What `planted` wants to know of a fault."""

    @property
    def old(self) -> str | None: ...
    @property
    def new(self) -> str: ...


class Fault(NamedTuple):
    """What happens to the line below `# mutant: name`, and a call whose results it must spoil."""

    old: str | None
    """A regular expression that the line holds; None deletes the line."""
    new: str = ""
    rule: Rule = GATED_DELTA_RULE
    shape: Shape = Shape(T=40, H=1, HV=1, K=16, V=16)
    dtype: torch.dtype = torch.float32
    options: dict[str, Any] = {}  # noqa: RUF012  (nothing writes to it)
    variants: dict[str, Variant] = {}  # noqa: RUF012  (the same)
    measure: Callable[..., dict[str, float]] = errors
    """What makes the call and measures its results."""


DECAYS: dict[str, Variant] = {"state_pass": "decays", "state_pass_backward": "decays"}
SEGMENTS: dict[str, Variant] = {"state_pass": "segments"}
SHORT = Shape(B=2, T=2, H=1, HV=1, K=16, V=16)
LONG = Shape(T=128, H=1, HV=1, K=16, V=16)
IF, DIFFERENCE = r"if .*:", (r"sum_before\((\w+), \w+\)", r"tl.cumsum(\1, 0) - \1")
FAULTS = {
    "state-does-not-decay": Fault(r"= \w+ \* S \+", "= S +"),
    "erases-nothing": Fault(r" - product\(.*\)"),
    "blocks-merged-with-the-wrong-half": Fault(r" == 0\)$", " == 1)"),
    "inverse-of-smaller-blocks": Fault(IF, "if level < 0:", dtype=torch.bfloat16, options={"correlation": 0.5}),
    "levels-of-the-wrong-row": Fault(r"= .*", "= half << level", KDA, options={"decay": "mixed"}),
    "backward-without-scale": Fault("scale,", "1.0,"),
    "backward-without-w": Fault(None),
    "dg-without-the-end-of-the-chunk": Fault(None, rule=SIMPLE_GLA),
    "dg-by-differences": Fault(*DIFFERENCE, SIMPLE_GLA, options={"decay": "strong"}),
    "dg-of-a-channel-by-differences": Fault(*DIFFERENCE, KDA, options={"decay": "strong"}),
    "pairs-of-the-wrong-rows": Fault(" >= ", " > ", KDA, options={"decay": "mixed"}),
    "dbeta-without-k-row": Fault(None),
    "value-heads-overwrite-each-other": Fault(IF, "if False:", shape=Shape(T=40, H=1, HV=2, K=16, V=16)),
    "slots-of-packed-sequences": Fault(
        r" - \(.*\)\.to\(tl\.int32\)", "", SIMPLE_GLA, Shape(H=1, HV=1, K=16, V=16, lengths=(3, 20, 18))
    ),
    "replay-starts-over": Fault(r"range\(1,", "range(2,", options={"passes": 3}),
    "decode-without-decay": Fault(r"tl\.exp\(", "tl.exp(0 * ", shape=Shape(T=5, H=1, HV=1, K=16, V=16)),
    "backward-does-not-decay": Fault(None, rule=KDA),
    "gradients-of-another-key-head": Fault(r" \+ at_key$", "", shape=Shape(T=20, H=2, HV=2, K=16, V=16)),
    "gradient-of-the-length-is-left-in": Fault(r"\(d - .*\)", "d", options={"normalize": True}),
    "closed-form-of-one-pass-more": Fault(r"\(([\w.]+) - 1\)", r"\1", SIMPLE_GLA, options={"passes": 3}),
    "backward-without-dstate": Fault(IF, "if False:", shape=Shape(T=12, H=1, HV=1, K=16, V=16)),
    "stored-decays-of-another-head": Fault(
        r" \+ at_rows", " + first", shape=Shape(T=40, H=1, HV=2, K=16, V=16), variants=DECAYS
    ),
    "stored-decays-to-the-start": Fault(r"G_end - G", "G", variants=DECAYS),
    "raw-decay-without-rate": Fault(r"-rate \* ", "-", options={"raw": True}),
    "raw-gate-gradient-as-it-is": Fault(None, options={"raw": True}),
    "split-without-dbeta-of-values": Fault(None, variants={"chunk_backward": "products"}),
    "split-without-dg-of-values": Fault(None, variants={"chunk_backward": "products"}),
    "maps-from-zero": Fault(r"1\.0, 0\.0", "0.0, 0.0", shape=LONG, variants=SEGMENTS),
    "joins-without-the-bias": Fault(r" \+ B$", "", shape=LONG, variants=SEGMENTS),
    "transitions-take-values": Fault(r"col < 0, 0, rows", "col < 0, rows, rows", shape=LONG, variants=SEGMENTS),
    "state-of-the-wrong-chunk": Fault(
        r"chunk // EVERY", "tl.maximum(chunk - 1, 0) // EVERY", options={"upstream": "states"}, measure=along_errors
    ),
    "no-state-at-the-end-of-a-sequence": Fault(r" \| \(.*\)", "", options={"state_every": 32}, measure=along_errors),
    "states-of-packed-sequences": Fault(
        r"offsets \+ sequence", "offsets", shape=Shape(H=1, HV=1, K=16, V=16, lengths=(3, 18)), measure=along_errors
    ),
    "backward-without-dstates": Fault(IF, "if False:", options={"upstream": "states"}, measure=along_errors),
    "padded-rows-are-read": Fault(r"tl\.where\(.*\)", "K", shape=SHORT, measure=decode_errors),
    "state-of-another-token": Fault(r" \+ token\b", "", shape=SHORT, measure=decode_errors),
    "bfloat16-states-are-cut-off": Fault(
        r"\bS,",
        "(S.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True),",
        shape=SHORT,
        options={"states": torch.bfloat16},
        measure=decode_errors,
    ),
    "minus-infinity-as-it-is": Fault(r"tl\.maximum\((.*), \w+\)", r"\1", options={"forget": True}),
}


def test_every_anchor_has_its_fault() -> None:
    files = [file for file in FOLDER.glob("*.py") if file.name not in MIXER]
    anchors = [name for file in files for name in ANCHOR.findall(file.read_text())]
    assert sorted(anchors) == sorted(FAULTS)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # a fault may make infinities and NaN
@pytest.mark.parametrize(
    "name", [name if i % 4 == 0 else pytest.param(name, marks=pytest.mark.hardening) for i, name in enumerate(FAULTS)]
)
def test_a_planted_fault_is_seen(name: str, tmp_path: Path) -> None:
    fault = FAULTS[name]
    with with_variants(sound_launch, fault.variants):
        sound = max(fault.measure(fault.rule, fault.shape, fault.dtype, **fault.options).values())
    with faulty(tmp_path, name, fault):
        found = fault.measure(fault.rule, fault.shape, fault.dtype, **fault.options)
    assert sound <= TOLERANCE[fault.dtype]
    assert max(found.values()) > TOLERANCE[fault.dtype], found


@contextmanager
def faulty(
    folder: Path, name: str, fault: Planted, backend: ModuleType = backend, launches: str = "launch"
) -> Iterator[None]:
    """The Triton backend launches the kernels of a copy that has the fault, by the copy of its module of launches."""
    copy = folder / "faulty_kernels"
    shutil.copytree(FOLDER, copy, ignore=shutil.ignore_patterns("__pycache__"))
    for module in copy.glob("*.py"):
        source = planted(module.read_text(), name, fault)
        source = re.sub(r"^from \.\.\.(?=\w)", "from sleepkern.", source, flags=re.MULTILINE)
        source = re.sub(r"^from \.\.(?=\w)", "from sleepkern.backends.", source, flags=re.MULTILINE)
        source = re.sub(r"^from \.\.\. (?=import)", "from sleepkern ", source, flags=re.MULTILINE)
        module.write_text(source)
    (copy / "__init__.py").write_text("")
    sys.path.insert(0, str(folder))
    try:
        launch: ModuleType = importlib.import_module(f"faulty_kernels.{launches}")
        changed = with_variants(launch, fault.variants) if isinstance(fault, Fault) else nullcontext()
        with changed, mock.patch.object(backend, "_launch", return_value=launch):
            yield
    finally:
        sys.path.remove(str(folder))
        for loaded in [n for n in sys.modules if n.partition(".")[0] == "faulty_kernels"]:
            del sys.modules[loaded]


def planted(source: str, name: str, fault: Planted) -> str:
    """A module's text with the fault in the line below its anchor, if the module has the anchor."""
    lines = source.splitlines(keepends=True)
    for i in [i for i, line in enumerate(lines) if line.strip() == f"# mutant: {name}"]:
        line = lines[i + 1].rstrip("\n")
        changed = "" if fault.old is None else re.sub(fault.old, fault.new, line, count=1)
        assert changed != line, f"{name}: {fault.old!r} is not in {line!r}"
        lines[i + 1] = changed + "\n"
    return "".join(lines)
