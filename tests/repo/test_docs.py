"""The pages of docs: examples run, links lead somewhere, and the API pages have every public name."""

from __future__ import annotations

import importlib
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.hf_models import build

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
EXAMPLES = [page for page in PAGES if "```python" in page.read_text()]
PACKAGES = (
    "sleepkern", "sleepkern.ops", "sleepkern.nn", "sleepkern.sleep", "sleepkern.integrations.transformers",
    "sleepkern.integrations.fla", "sleepkern.integrations.serving", "sleepkern.testing", "sleepkern.measure",
    "sleepkern.experiments.tasks", "sleepkern.experiments.training",
)  # fmt: skip
SAID_IN_TEXT = {"rules", "__version__", "ssd", "FUNCTIONS", "Result", "FAMILIES", "run"}
"""Names that a page has in a sentence: a module, aliases, tables, and `run`, which is step 1 inside."""


def given(page: Path) -> dict[str, Any]:
    """The names that a page takes for granted."""
    attention_only = page.name == "train_with_passes.md"
    names = {"model": build("qwen3" if attention_only else "qwen3_next"), "ids": torch.randint(1, 64, (1, 1100))}
    names["question"] = torch.tensor([[1, 2, 3]])
    return names | {"questions": torch.tensor([[1, 2, 3], [0, 4, 5]]), "mask": torch.tensor([[1, 1, 1], [0, 1, 1]])}


@pytest.mark.parametrize("page", EXAMPLES, ids=lambda page: str(page.relative_to(DOCS)))
def test_examples_run(page: Path) -> None:
    names = given(page)
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.S):
        exec(block, names)


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", re.sub(r"```.*?```|`[^`]*`", "", page.read_text(), flags=re.S))
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []


def documented() -> dict[str, list[str]]:
    """The names after `:::` in the API pages, and those of their `members`, by their last part."""
    found: dict[str, list[str]] = {}
    for page in sorted((DOCS / "api").glob("*.md")):
        for path, options in re.findall(r"^::: ([\w.]+)\n((?: {4}.*\n)*)", page.read_text() + "\n", re.M):
            members = re.search(r"^ +members: \[(.*)\]", options, re.M)
            names = [f"{path}.{name.strip()}" for name in members.group(1).split(",")] if members else [path]
            for name in names:
                found.setdefault(name.rpartition(".")[2], []).append(name)
    return found


def resolve(path: str) -> Any:
    """The object of a dotted path."""
    parts = path.split(".")
    for n in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:n]))
        except ImportError:
            continue
        for part in parts[n:]:
            found = getattr(found, part)
        return found
    raise ImportError(path)


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_has_an_entry(package: str) -> None:
    module, pages = importlib.import_module(package), documented()
    assert [name for name in module.__all__ if name not in pages and name not in SAID_IN_TEXT] == []
    for name in set(module.__all__) & set(pages):
        assert any(resolve(path) is getattr(module, name) for path in pages[name]), name


def test_what_is_said_in_text_is_said() -> None:
    text = "".join(page.read_text() for page in (DOCS / "api").glob("*.md"))
    assert [name for name in SAID_IN_TEXT - {"run"} if name not in text] == []


def test_every_page_is_in_the_navigation() -> None:
    listed = set(re.findall(r"([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M))
    assert listed == {str(page.relative_to(DOCS)) for page in PAGES}


def test_a_file_of_another_host_or_a_missing_one_is_found(tmp_path: Path) -> None:
    check = runpy.run_path(str(DOCS / "site" / "check.py"))["wrongly_loaded"]
    (tmp_path / "own.js").touch()
    (tmp_path / "good.html").write_text('<a href="https://arxiv.org">x</a><script src="own.js"></script>')
    (tmp_path / "bad.html").write_text(
        '<link rel="stylesheet" href="https://fonts.example/x.css"><img src="//a/b.png"><script src="x.js">'
    )
    (tmp_path / "bad.css").write_text("@import 'https://fonts.example/y.css';")
    assert {name: len(addresses) for name, addresses in check(tmp_path).items()} == {"bad.html": 3, "bad.css": 1}
