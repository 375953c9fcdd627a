"""No function of csrc is longer than 60 lines, and no CUDA kernel longer than 80."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIMIT, KERNEL_LIMIT = 60, 80
LONG: dict[str, str] = {}
"""Longer ones as "file: name", with the reason why each is not split, such as registers that a split would cost."""
TEXT = re.compile(r'"(?:\\.|[^"\\\n])*"|//[^\n]*')
FUNCTION = re.compile(r"\)\s*(const|noexcept|->[^;{]*)*\s*$|\)\s*(const\s*)?:\s[^;]*$")
SCOPE = re.compile(r"^\s*(template\s*<[^{]*>\s*)?(class|struct|enum|namespace|union|extern)\b[^()]*$")


def functions(text: str) -> Iterator[tuple[str, int]]:
    """The head of each function that has a body, and its lines from the head to the closing brace."""
    text = TEXT.sub(lambda found: " " * len(found[0]), text)
    text = re.sub(r"^[ \t]*#[^\n]*(\\\n[^\n]*)*", lambda found: re.sub(r"[^\n]", " ", found[0]), text, flags=re.M)
    open_braces: list[tuple[bool, int, str]] = []
    start = 0
    for brace in re.finditer(r"[{};]", text):
        head = text[start : brace.start()]
        if brace[0] == "{":
            inside = any(function for function, _, _ in open_braces)
            is_function = not inside and not SCOPE.match(head) and FUNCTION.search(head) is not None
            open_braces.append((is_function, brace.start() - len(head.lstrip()), head.strip()))
        elif brace[0] == "}" and open_braces:
            is_function, first, head = open_braces.pop()
            if is_function:
                yield head, text.count("\n", first, brace.start()) + 1
        start = brace.end()


def name_of(head: str) -> str:
    """The name before the parameters."""
    head = re.sub(r"SLEEPKERN_KERNEL\((?:[^()]|\([^()]*\))*\)", "", head)
    found = re.search(r"([\w:~]+|operator\S*)\s*\(", head)
    return found[1] if found else head


def test_functions_are_short() -> None:
    found: dict[str, int] = {}
    for path in sorted((ROOT / "csrc").rglob("*.*")):
        for head, lines in functions(path.read_text()):
            if lines > (KERNEL_LIMIT if "SLEEPKERN_KERNEL" in head else LIMIT):
                found[f"{path.relative_to(ROOT)}: {name_of(head)}"] = lines
    assert set(found) == set(LONG), found


def test_functions_are_found() -> None:
    names = {name_of(head) for path in (ROOT / "csrc").rglob("*.*") for head, _ in functions(path.read_text())}
    assert len(names) > 500
    assert {"single_chunk_kernel", "attend", "upper_gram", "WeightStream", "weight_order", "bind_layer"} <= names


def test_a_long_function_is_found() -> None:
    body = "  x += 1;  // }\n" * 58
    text = f"namespace a {{\ntemplate <class T>\nint f(T x) {{\n{body}  return x;\n}}\n}}\n"
    assert list(functions(text)) == [("template <class T>\nint f(T x)", 62)]
