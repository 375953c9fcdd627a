"""The house rules that a machine can check."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [
    path
    for folder in ("sleepkern", "csrc", "tests", "benchmarks", "docs", "examples", "packaging")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".py", ".h", ".cpp", ".cu", ".cuh")
]


def test_no_file_is_longer_than_400_lines() -> None:
    long = {str(p.relative_to(ROOT)): n for p in SOURCES if (n := len(p.read_text().splitlines())) > 400}
    assert not long


def test_test_files_have_names_of_their_own() -> None:
    """pytest imports test files by their base name, so two of one name cannot run together."""
    names = [path.name for path in SOURCES if path.name.startswith("test_")]
    assert len(names) == len(set(names)), sorted(name for name in set(names) if names.count(name) > 1)


LONG_FUNCTIONS = {
    "sleepkern/backends/triton/chunk_backward.py chunk_backward",
    "sleepkern/backends/triton/chunk_backward.py key_columns",
    "sleepkern/backends/triton/chunk_factors.py chunk_grams",
    "sleepkern/backends/triton/state_pass.py scan_chunks",
    "sleepkern/backends/triton/state_pass_backward.py scan_chunks_backward",
}
"""Triton kernels of at most 80 lines, whose body is one tile's way through memory."""


def lines_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """The lines of a function without those of its docstring."""
    text = function.body[0] if ast.get_docstring(function) is not None else None
    return function.end_lineno - function.lineno + 1 - (text.end_lineno - text.lineno + 1 if text else 0)  # type: ignore[operator]


def test_no_function_is_longer_than_50_lines() -> None:
    long: dict[str, int] = {}
    for path in (ROOT / "sleepkern").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (n := lines_of(node)) > 50:
                long[f"{path.relative_to(ROOT)} {node.name}"] = n
    assert set(long) == LONG_FUNCTIONS and max(long.values(), default=0) <= 80


def test_nothing_is_left_to_do() -> None:
    marker = re.compile(r"\b(" + "|".join(("TO" + "DO", "FIX" + "ME", "X" * 3, "HA" + "CK")) + r")\b")
    assert not [str(p.relative_to(ROOT)) for p in SOURCES if marker.search(p.read_text())]


def test_readme_names_only_targets_that_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = set(re.findall(r"(?:`|^ {4})make ([a-z-]+)", (ROOT / "README.md").read_text(), re.M))
    assert {"demo", "test", "wheel", "gpu-check"} <= named <= targets


def test_make_knows_its_targets() -> None:
    targets = "demo test test-hardening bench lint docs tables wheel wheel-check wheel-check-arm64 gpu-check"
    for target in targets.split():
        done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_a_source_archive_has_what_make_and_the_tests_need(tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "--quiet", "egg_info", "--egg-base", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    listed = set((tmp_path / "sleepkern.egg-info" / "SOURCES.txt").read_text().splitlines())
    needed = [*SOURCES, *(ROOT / "docs").rglob("*.md"), *(ROOT / "docs").rglob("*.svg")]
    needed += [*(ROOT / "benchmarks").rglob("*.json"), *(ROOT / "docs" / "site").glob("*.css")]
    names = {str(path.relative_to(ROOT)) for path in needed}
    names |= {"README.md", "Makefile", "CMakeLists.txt", "pyproject.toml", "setup.py", ".ci/run", ".clang-format"}
    names |= {".clangd", "compile_flags.txt"}
    names |= {f"requirements{part}.txt" for part in ("", "-fla", "-oldest", "-peers", "-docs")}
    names |= {"mkdocs.yml", "MANIFEST.in"}
    names |= {"benchmarks/README.md"}
    assert not names - listed
    assert not [name for name in listed if name.endswith((".so", ".pyc"))]


def test_the_readme_of_the_benchmarks_names_results_that_exist() -> None:
    named = re.findall(r"`([\w.-]+\.json)`", (ROOT / "benchmarks" / "README.md").read_text())
    assert named and all((ROOT / "benchmarks" / "results" / name).is_file() for name in named)
