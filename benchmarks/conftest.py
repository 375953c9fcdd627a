"""Every benchmark runs on one thread, the only setting in which a busy machine gives steady numbers, and as often as
half a second allows: a median of many rounds can be compared, a mean of a few cannot."""

from collections.abc import Callable
from time import perf_counter

import pytest

from sleepkern.measure.timing import threads

SECONDS = 0.5
FEWEST, MOST = 5, 500


@pytest.fixture(autouse=True)
def one_thread():
    with threads(1):
        yield


@pytest.fixture
def rounds() -> Callable[[Callable[[], object]], int]:
    """How many rounds a call gets, by one that is timed; it also warms up."""

    def count(call: Callable[[], object]) -> int:
        began = perf_counter()
        call()
        return max(FEWEST, min(MOST, int(SECONDS / max(perf_counter() - began, 1e-6))))

    return count
