"""The stub of the compiled module says what the module has: the same names, the same parameters, both ways."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest

from sleepkern.backends.native.module import _C

STUB = ast.parse((Path(__file__).resolve().parents[2] / "sleepkern" / "_C.pyi").read_text())
OF_ENUMS = {"name", "value", "__init__"}
"""What every enumeration of pybind11 has, which the stub repeats where the package uses it."""


def named(nodes: list[ast.stmt], kind: type[ast.AST]) -> dict[str, Any]:
    """The definitions of one kind by name."""
    return {node.name: node for node in nodes if isinstance(node, kind)}  # type: ignore[attr-defined]


def variables(nodes: list[ast.stmt]) -> set[str]:
    return {node.target.id for node in nodes if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)}


def of_cuda(name: str) -> bool:
    return name.startswith(("cuda_", "Cuda", "try_fast_decode", "try_fast_replay")) and name != "cuda_devices"


def public(names: Any) -> set[str]:
    return {name for name in names if not name.startswith("_") and (_C.has_cuda or not of_cuda(name))}


def parameters(function: ast.FunctionDef) -> list[str]:
    arguments = function.args
    return [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]


def in_docstring(text: str) -> list[str]:
    """The names of a signature `f(a: int, *, b: int, /) -> None`, the first line of a docstring."""
    inside = text.split("\n")[0].partition("(")[2].rpartition(") -> ")[0]
    inside = re.sub(r"\[[^\[\]]*\]", "", re.sub(r"\[[^\[\]]*\]", "", inside))
    return [part.partition(":")[0].strip() for part in inside.split(",") if part.strip() not in ("", "*", "/")]


FUNCTIONS = named(STUB.body, ast.FunctionDef)
CLASSES = named(STUB.body, ast.ClassDef)


def test_the_stub_has_the_names_of_the_module() -> None:
    assert public({*FUNCTIONS, *CLASSES, *variables(STUB.body)}) == public(dir(_C))
    assert {name for name in public(FUNCTIONS) if not callable(getattr(_C, name))} == set()


@pytest.mark.parametrize("name", sorted(public(FUNCTIONS)))
def test_a_function_has_the_parameters_of_the_module(name: str) -> None:
    assert parameters(FUNCTIONS[name]) == in_docstring(getattr(_C, name).__doc__)


@pytest.mark.parametrize("name", sorted(public(CLASSES)))
def test_a_class_has_the_attributes_of_the_module(name: str) -> None:
    body = CLASSES[name].body
    methods = named(body, ast.FunctionDef)
    stub = {n for n in {*variables(body), *methods} if not n.startswith("_")}
    found = {n for n in dir(getattr(_C, name)) if not n.startswith("_")}
    assert stub - OF_ENUMS == found - OF_ENUMS


def test_the_parser_of_signatures() -> None:
    assert in_docstring("f(*, a: tuple[int, int], b: list[tuple[int, int]], /) -> None\n\nMore, and more") == ["a", "b"]
    assert in_docstring("f() -> bool") == []
