"""Which tests fit the transformers that is here, and a line about what ran with it; a plugin of conftest.py."""

from __future__ import annotations

import importlib.metadata
import re
from collections import Counter
from typing import Any

import pytest

_left_out = pytest.StashKey[set[str]]()


def release(version: str) -> tuple[int, ...]:
    """The first two numbers of a version."""
    return tuple(int(part) for part in version.split(".")[:2])


def here() -> str:
    """The version of transformers that Python finds first."""
    return importlib.metadata.version("transformers")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    late = [x for x in items if any(release(mark.args[0]) > release(here()) for mark in x.iter_markers("since"))]
    config.stash[_left_out] = {x.name for x in late}
    if late:
        config.hook.pytest_deselected(items=late)
        items[:] = [x for x in items if x not in late]


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = sorted(session.config.stash.get(_left_out, ()))


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """What a worker of xdist left out."""
    node.config.stash.setdefault(_left_out, set()).update(getattr(node, "workeroutput", {}).get("left_out", ()))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    from sleepkern.integrations.transformers import FAMILIES

    passed = [report.nodeid for report in terminalreporter.stats.get("passed", ())]
    ran = Counter(word for name in passed for word in set(re.findall(r"\w+", name)) & {*FAMILIES})
    if ran:
        counts = ", ".join(f"{family} {ran[family]}" for family in FAMILIES if ran[family])
        terminalreporter.write_line(f"transformers {here()}, tests passed by family: {counts}")
    for name in sorted(config.stash.get(_left_out, ())):
        terminalreporter.write_line(f"transformers {here()} is too old for {name}")
