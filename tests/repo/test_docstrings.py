"""The docstring of a public function stands alone: it names each parameter, and sends nobody elsewhere."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import sleepkern
from sleepkern import nn, sleep


def public() -> Iterator[tuple[str, Callable[..., Any]]]:
    """The public functions, the classes that users make, and their methods."""
    for module in (sleepkern, nn, sleep):
        for name in module.__all__:
            found = getattr(module, name)
            made = inspect.isclass(found) and "__init__" in vars(found) and not getattr(found, "_is_protocol", False)
            if inspect.isfunction(found) or made:
                yield f"{module.__name__}.{name}", found
    for name, method in inspect.getmembers(sleep.SleepSession, inspect.isfunction):
        if not name.startswith("_"):
            yield f"sleepkern.sleep.SleepSession.{name}", method


PUBLIC = dict(public())
COMPUTING = (
    "gated_delta_rule", "kda", "delta_rule", "simple_gla", "gla", "recurrent_step", "sleep_ingest", "explain", "patch",
)  # fmt: skip


@pytest.mark.parametrize("name", PUBLIC)
def test_each_parameter_is_named(name: str) -> None:
    text = inspect.getdoc(PUBLIC[name]) or ""
    parameters = [p for p in inspect.signature(PUBLIC[name]).parameters if p not in ("self", "cls")]
    missing = [p for p in parameters if not re.search(rf"\b{p}\b", text)]
    assert not missing, f"{name}: {missing}"


@pytest.mark.parametrize("name", PUBLIC)
def test_no_docstring_sends_elsewhere(name: str) -> None:
    assert not re.search("module docstring|[Ss]ee `?gated_delta_rule", inspect.getdoc(PUBLIC[name]) or "")


@pytest.mark.parametrize("name", [*(f"sleepkern.{name}" for name in COMPUTING), *(n for n in PUBLIC if ".nn." in n)])
def test_arguments_results_and_errors_have_a_section(name: str) -> None:
    function = PUBLIC[name]
    text = inspect.getdoc(function) or ""
    sections = ("Args:",) if inspect.isclass(function) else ("Args:", "Returns:", "Raises:")
    assert all(section in text for section in sections), name
    listed = {n for line in re.findall(r"^    (\w[\w, *]*):", text, re.M) for n in re.split(r"\W+", line)}
    parameters = set(inspect.signature(function).parameters) - {"self"}
    assert parameters <= listed, f"{name}: {parameters - listed}"
