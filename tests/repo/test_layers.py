"""A module imports from lower floors and from its own folder, wherever the import stands and whatever it is for."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
FLOORS = {
    "eager": 0,
    "_C": 1, "addresses": 1, "files": 1, "rules": 1, "settings": 1, "state": 1, "transforms": 1,
    "version": 1,
    "problems": 2,
    "backends": 3,
    "dispatch": 4,
    "autograd": 5,
    "ops": 6,
    "nn": 7, "testing": 7,
    "integrations": 8,
    "sleep": 9,
    "measure": 10,
    "experiments": 11,
    "sleepkern": 12, "tasks": 12, "training": 12,
    "cli": 13,
    "__main__": 14,
}  # fmt: skip
"""Of every folder and file of the package; sleepkern is its face."""
NAMED_TUPLES = {"_make", "_replace", "_asdict", "_fields", "_field_defaults"}
"""Methods of typing.NamedTuple, which are public."""


class Import(NamedTuple):
    """A module, what it imports without the package's name, the name it takes from there ("" for the whole), a line."""

    importer: str
    imported: str
    name: str
    line: int


def modules(package: Path) -> dict[str, Path]:
    """All modules by name, without that of the package; its face is sleepkern."""
    found = {}
    for path in (*package.rglob("*.py"), *package.rglob("*.pyi")):
        parts = path.relative_to(package).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts) or "sleepkern"] = path
    return found


def imports(package: Path) -> Iterator[Import]:
    known = modules(package)
    for importer, path in known.items():
        here = [] if importer == "sleepkern" else importer.split(".")
        folder = here if path.name == "__init__.py" else here[:-1]
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    first, _, rest = alias.name.partition(".")
                    if first == "sleepkern":
                        yield Import(importer, rest or "sleepkern", "", node.lineno)
            elif isinstance(node, ast.ImportFrom):
                base = _base(node, folder)
                if base is not None:
                    for alias in node.names:
                        inside = ".".join([*base, alias.name])
                        whole = inside in known
                        found = inside if whole else ".".join(base) or "sleepkern"
                        yield Import(importer, found, "" if whole else alias.name, node.lineno)


def _base(node: ast.ImportFrom, folder: list[str]) -> list[str] | None:
    named = node.module.split(".") if node.module else []
    if node.level:
        return [*folder[: len(folder) - node.level + 1], *named]
    return named[1:] if named[:1] == ["sleepkern"] else None


def room(module: str) -> str:
    return module.split(".")[0]


def wrong(package: Path) -> list[str]:
    """A sentence for each import that goes upwards or sideways."""
    found = []
    for one in imports(package):
        here, there = room(one.importer), room(one.imported)
        if here != there and FLOORS[there] >= FLOORS[here]:
            found.append(f"{one.importer}:{one.line} (floor {FLOORS[here]}) imports {one.imported} ({FLOORS[there]})")
    return found


def circles(package: Path) -> list[list[str]]:
    """Groups of modules that import each other, directly or by way of others: strongly connected components."""
    graph: dict[str, set[str]] = {module: set() for module in modules(package)}
    for one in imports(package):
        if one.importer != one.imported and one.imported in graph:
            graph[one.importer].add(one.imported)
    reached = {module: _reached(graph, module) for module in graph}
    groups = {frozenset(m for m in graph if m in reached[module] and module in reached[m]) for module in graph}
    return sorted(sorted(group) for group in groups if group)


def _reached(graph: dict[str, set[str]], start: str) -> set[str]:
    """Modules that `start` imports, directly or by way of others."""
    found: set[str] = set()
    left = set(graph[start])
    while left:
        module = left.pop()
        if module not in found:
            found.add(module)
            left |= graph[module]
    return found


def test_every_module_has_a_floor() -> None:
    assert {room(module) for module in modules(ROOT / "sleepkern")} == set(FLOORS)


def test_imports_go_downwards() -> None:
    assert wrong(ROOT / "sleepkern") == []


@pytest.mark.parametrize(
    "line",
    [
        "from ..sleep import session",
        "def f():\n    from .. import ops",
        "if TYPE_CHECKING:\n    from ..nn import SleepLM",
        "import sleepkern.cli.main",
        "from sleepkern import gla",
    ],
)
def test_an_import_upwards_is_found(line: str, tmp_path: Path) -> None:
    for name in ("__init__", "ops", "sleep/__init__", "sleep/session", "nn/__init__", "cli/__init__", "cli/main"):
        (tmp_path / f"{name}.py").parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.py").write_text("")
    (tmp_path / "backends").mkdir()
    (tmp_path / "backends" / "__init__.py").write_text("")
    (tmp_path / "backends" / "cpu.py").write_text(line)
    assert len(wrong(tmp_path)) == 1


def test_no_module_imports_what_imports_it() -> None:
    assert circles(ROOT / "sleepkern") == []


def test_a_circle_is_found(tmp_path: Path) -> None:
    lines = {
        "__init__": "", "sleep/__init__": "", "sleep/session": "def f():\n    from . import graph",
        "sleep/graph": "from .text import x", "sleep/text": "if TYPE_CHECKING:\n    from .session import x",
        "sleep/alone": "from .session import x",
    }  # fmt: skip
    for name, line in lines.items():
        (tmp_path / f"{name}.py").parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.py").write_text(line)
    assert circles(tmp_path) == [["sleep.graph", "sleep.session", "sleep.text"]]


def test_private_names_stay_in_their_folder() -> None:
    """_C, the native module, is none of them."""
    package = ROOT / "sleepkern"
    every = list(imports(package))
    uses = {(one.importer, one.imported, one.name) for one in every}
    for module, path in modules(package).items():
        taken = {one.name or one.imported.split(".")[-1]: one.imported for one in every if one.importer == module}
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in taken:
                uses.add((module, taken[node.value.id], node.attr))
    assert {use for use in uses if _is_private(use[2]) and room(use[0]) != room(use[1])} == set()


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_C" and name not in NAMED_TUPLES


def test_only_the_command_line_runs_the_command_line() -> None:
    for module, path in modules(ROOT / "sleepkern").items():
        if room(module) != "cli":
            assert '"-m", "sleepkern"' not in path.read_text(), module
