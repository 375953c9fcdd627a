"""Every benchmark runs on one thread, the only setting in which a busy machine gives steady
numbers."""

import pytest

from sleepkern.measure.timing import threads


@pytest.fixture(autouse=True)
def one_thread():
    with threads(1):
        yield
