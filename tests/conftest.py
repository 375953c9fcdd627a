"""Fixtures shared by all tests."""

from __future__ import annotations

from collections.abc import Iterator

import hypothesis
import pytest
import torch

from sleepkern.rules import RULES, Rule

pytest_plugins = ["helpers.versions"]

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


@pytest.fixture(params=list(RULES.values()), ids=list(RULES))
def rule(request: pytest.FixtureRequest) -> Rule:
    """Each rule in turn."""
    one: Rule = request.param
    return one
