"""Faults that tests plant in csrc/cuda by the name of an anchor, and how one is planted.

An anchor is a comment line, `// mutant: NAME`, directly above the statement that the fault changes. So the text of the
statement may change, and the fault is still planted.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

ANCHOR = re.compile(r"^\s*// mutant: ([a-z0-9-]+)\n", re.M)


class Mutant(NamedTuple):
    """What happens to the statements below an anchor, and which tests (an expression of pytest -k) see it.

    swap is None where the statements are deleted, else a pattern that they match once and its replacement.
    """

    tests: str
    swap: tuple[str, str] | None = None
    statements: int = 1


RECURRENCE = {
    "state-does-not-decay": Mutant("test_replay and 15", (r"\*= .*;", "*= 1.0f;")),
    "token-space-erases-undecayed": Mutant("test_methods and rank", (r"\+ power \* ", "+ ")),
    "no-barrier-before-inversion": Mutant("test_replay and 15"),
    "no-barrier-before-v-is-read": Mutant("test_replay and 15"),
    "no-barrier-before-a-slot-is-refilled": Mutant("test_long_windows"),
    "no-wait-for-a-copy": Mutant("test_replay and 65"),
    "wait-for-the-wrong-phase": Mutant("test_long_windows", (r", [^,]* & 1\)", ", 0)")),
    "no-barrier-before-queries-are-loaded": Mutant("test_replay and 65"),
    "transition-not-transposed": Mutant("test_chain", (r"\btrue\b", "false")),
    "no-barrier-before-dstate-is-read": Mutant("test_chain"),
    "padded-rows-of-a-pool-are-written": Mutant("pool"),
    "residuals-where-tol-is-positive": Mutant("test_a_tol_below", (r"return .*?;", "return tol > 0.0f;")),
    "decay-of-the-row-after": Mutant("test_replay and 63 and kda", (r"\bi \* KP", "(i | 1) * KP")),
}
BLOCKS = {
    "no-cluster-wait-before-partials-are-added": Mutant("test_equals and (two or four)"),
    "one-buffer-for-two-exchanges": Mutant(
        "test_equals and pieces", (r"\(\((.*) - 1 - n\) & 1\)", r"(false && n < \1)")
    ),
    "no-cluster-barrier-before-h-is-read": Mutant("test_equals and (two or four)", statements=2),
    "no-wait-for-weights": Mutant("test_equals and one"),
    "weights-overwrite-the-next-slot": Mutant(
        "test_equals and one", (r"\((slot)\)", r"(\1 + 1 < call.ring ? \1 + 1 : 0)")
    ),
    "no-warp-barrier-before-inversion": Mutant("test_equals and four"),
    "written-values-are-not-decayed": Mutant("test_equals and four and random"),
    "no-barrier-before-the-mixer": Mutant("test_equals and two"),
    "rows-beyond-a-window-are-its-neighbours": Mutant(
        "keep_to_themselves", (r"last\(.*(window).*\) \{\}", r"last(2 * call.tiles - 1 + 0 * \1) {}")
    ),
    "pad-rows-read-beyond-their-window": Mutant("test_equals and odd", (r"return keys < [^;]*;", "return true;")),
}
STATES = {
    "bfloat16-states-are-cut-off": Mutant(
        "test_decode_states and bfloat16",
        (
            r"make_uint2\(.*\)",
            "make_uint2((as_bits(x.x) >> 16) | (as_bits(x.y) & 0xffff0000u), "
            "(as_bits(x.z) >> 16) | (as_bits(x.w) & 0xffff0000u))",
        ),
    ),
    "state-of-another-token": Mutant("test_decode_states and float32", (r" \+ token\b", "")),
}
OVERRUNS = {
    "a-row-beyond-the-state-is-read": Mutant("test_step and 200", (r"first \+ r < K", "first + r <= K")),
    "a-tile-is-one-element-short": Mutant("test_chain and 128", (r"COLUMNS\)", "COLUMNS - 1)")),
    "prefetch-beyond-the-last-weights": Mutant(
        "test_equals and random", (r"\((\w+) < most \? \1 : most\)", r"\1")
    ),
}  # fmt: skip
"""Accesses beyond an array, which only the sanitizers see."""
MUTANTS = RECURRENCE | BLOCKS | STATES | OVERRUNS


def anchors(csrc: Path) -> list[tuple[str, Path]]:
    """Name and file of every anchor."""
    files = [path for path in sorted((csrc / "cuda").rglob("*")) if path.is_file()]
    return [(name, path) for path in files for name in ANCHOR.findall(path.read_text())]


def plant(csrc: Path, name: str) -> Path:
    """Change the statements below the anchor of this name, and return the file that has it."""
    (path,) = (path for found, path in anchors(csrc) if found == name)
    path.write_text(mutated(path.read_text(), name, MUTANTS[name]))
    return path


def mutated(text: str, name: str, mutant: Mutant) -> str:
    """The text with the statements below the anchor of this name deleted or swapped."""
    (start,) = (found.end() for found in ANCHOR.finditer(text) if found[1] == name)
    while (other := ANCHOR.match(text, start)) is not None:  # anchors of one statement follow each other
        start = other.end()
    end = start
    for _ in range(mutant.statements):
        end = _end_of_statement(text, end)
    if mutant.swap is None:
        return text[:start] + text[end:]
    changed, count = re.subn(*mutant.swap, text[start:end])
    assert count == 1, f"{name}: {mutant.swap[0]!r} matches {count} times, expected once, in\n{text[start:end]}"
    return text[:start] + changed + text[end:]


def _end_of_statement(text: str, start: int) -> int:
    """The end of the first line from `start` on that ends a statement or a body."""
    while True:
        end = text.index("\n", start) + 1
        if text[start:end].split("//")[0].rstrip().endswith((";", "}")):
            return end
        start = end
