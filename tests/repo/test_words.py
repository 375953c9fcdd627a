"""Words that docs/glossary.md replaces do not come back, in identifiers of the sources and in the docs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BANNED = {
    "turned", "asks", "asking", "foresee", "foresees", "foreseen", "couplings", "readers", "writers", "walk", "walks",
    "walker", "taker", "express", "readout", "readouts", "strip", "strips", "settles", "settling", "lam", "gam",
}  # fmt: skip
"""Parts of identifiers."""
ELSEWHERE = {"strip", "rstrip", "lstrip", "walk"}
"""Names of Python's own libraries, as calls of methods: text.strip(), os.walk(), ast.walk()."""
ALIASES = {"settled"}
"""Public names that stay for a release."""
PHRASES = (
    r"\bturned\b", r"\bforesee", r"\breadouts?\b", r"\bcouplings\b", r"\bexpress lane\b", r"\basks for\b",
    r"\bat hand\b", r"\bwalks? (over|back)\b", r"\btakes? turns\b",
)  # fmt: skip
"""What the docs do not say."""


def words_of(identifier: str) -> set[str]:
    """The parts of a name, split at underscores and capitals."""
    return {part.lower() for part in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", identifier)}


def offenders(text: str, comment: str) -> Iterator[str]:
    """Identifiers of a source with a banned part; its comments and strings do not count."""
    text = re.sub(r'"""(?:.|\n)*?"""|"(?:\\.|[^"\\\n])*"|' + r"'(?:\\.|[^'\\\n])*'", '""', text)
    text = re.sub(comment, "", text)
    for found in re.finditer(r"(\.\s*)?\b([A-Za-z_]\w*)", text):
        name = found.group(2)
        if found.group(1) and name in ELSEWHERE:
            continue
        if BANNED & words_of(name) and name not in ALIASES:
            yield name


def sources() -> dict[str, str]:
    """Every source with the pattern of its comments."""
    found = {}
    for folder in ("sleepkern", "csrc", "tests", "benchmarks", "docs", "examples"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".pyi") and path != Path(__file__).resolve():
                found[str(path.relative_to(ROOT))] = r"#.*"
            elif path.suffix in (".h", ".cpp", ".cu", ".cuh"):
                found[str(path.relative_to(ROOT))] = r"//.*"
    return found


def test_identifiers() -> None:
    found = {name: set(offenders((ROOT / name).read_text(), comment)) for name, comment in sources().items()}
    assert {name: words for name, words in found.items() if words} == {}


@pytest.mark.parametrize("path", [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))], ids=lambda p: p.name)
def test_docs(path: Path) -> None:
    text = path.read_text()
    if path.name == "glossary.md":
        text = text[: text.index("## Words that are not used")]
    assert [phrase for phrase in PHRASES if re.search(phrase, text)] == []


NO_SUBJECT = re.compile(r'"""(Of|And|But|With|From|By|As|So|Where|Then|In|On|For|To|At|Under|Without|Whether) ')


def test_docstrings_have_a_subject_or_a_verb() -> None:
    """A docstring that begins with a preposition continues a sentence that is not there."""
    allowed = {
        "sleepkern/integrations/transformers/packing.py",
        "sleepkern/measure/environment.py",
    }  # "Where X is: ..."
    sources = (ROOT / "sleepkern").rglob("*.py")
    found = {str(path.relative_to(ROOT)) for path in sources if NO_SUBJECT.search(path.read_text())}
    assert found <= allowed


def test_an_offender_is_found() -> None:
    code = "k_turned = load(x)  # walk\nname.strip()\nclass Taker: ...\nasksFor = 'readout'\n"
    assert set(offenders(code, r"#.*")) == {"k_turned", "Taker", "asksFor"}
