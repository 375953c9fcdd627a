"""Fixtures shared by all tests."""

from __future__ import annotations

from collections.abc import Iterator

import hypothesis
import pytest
import torch

from sleepkern.rules import RULES, Rule
from sleepkern.testing import rules_of

pytest_plugins = ["helpers.instruction_sets", "helpers.versions"]

# `make test` takes the first; --hypothesis-profile=full the second.
hypothesis.settings.register_profile("quick", max_examples=40, deadline=None, derandomize=True, database=None)
hypothesis.settings.register_profile("full", max_examples=1500, deadline=None, print_blob=True)
hypothesis.settings.load_profile("quick")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Two busy cores and a thread pool make timings and waits erratic; tests that want threads ask for them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip a test of a rule by a backend that does not declare the rule in its SUPPORTS.

    The rule is the parameter `rule`. The backends are the parameter `backend` and those of the mark `computed_by`.
    """
    for item in items:
        parameters = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        if "rule" not in parameters:
            continue
        rule, backend = parameters["rule"], parameters.get("backend")
        marked = [name for mark in item.iter_markers("computed_by") for name in mark.args]
        named = [] if backend is None else [getattr(backend, "NAME", backend)]
        for name in (*named, *marked):
            if (rule.name if isinstance(rule, Rule) else rule) not in rules_of(name):
                item.add_marker(pytest.mark.skip(reason=f"{name} does not declare {rule}"))


@pytest.fixture(params=list(RULES.values()), ids=list(RULES))
def rule(request: pytest.FixtureRequest) -> Rule:
    """Each rule in turn."""
    one: Rule = request.param
    return one
