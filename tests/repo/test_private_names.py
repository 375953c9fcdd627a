"""Private names of torch are in sleepkern/eager.py alone, so that a new version of torch is one file's work."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / "sleepkern"
ALLOWED = {
    "eager.py": None,
    "ops/fast_path.py": {"forward_ad._current_level"},  # a function around it costs a call where each one counts
}
"""The private names that each file may use; None allows all."""


def private(tree: ast.AST) -> Iterator[str]:
    """Names such as torch._C and torch.utils._pytree, imported or read."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            path = ast.unparse(node)
            root, *names = path.split(".")
            if root in ("torch", "forward_ad") and any(n.startswith("_") and not n.startswith("__") for n in names):
                yield path
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").split(".")[0] == "torch":
            for path in (f"{node.module}.{alias.name}" for alias in node.names):
                if any(name.startswith("_") for name in path.split(".")) and not path.startswith("torch.__"):
                    yield path


def test_torchs_private_names_are_in_one_file() -> None:
    found = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        name = file.relative_to(PACKAGE).as_posix()
        allowed = ALLOWED.get(name, set())
        if allowed is not None and (names := set(private(ast.parse(file.read_text()))) - allowed):
            found[name] = sorted(names)
    assert not found


def test_private_names_are_recognised() -> None:
    text = "import torch\nfrom torch.utils import _pytree\ntorch._C._x()\ntorch.__version__\ntorch.randn(2)\n"
    assert sorted(private(ast.parse(text))) == ["torch._C", "torch._C._x", "torch.utils._pytree"]
