"""What the sources of Triton's kernels keep to, so that the oldest version promised compiles them too."""

import re
from pathlib import Path

SOURCES = (Path(__file__).resolve().parents[2] / "sleepkern" / "backends" / "triton").glob("*.py")


def test_strings_of_flags_are_passed_on_by_name():
    """Triton 3.6 refuses a string that is a field of a group as the argument of another kernel function."""
    allowed = re.compile(r"PRECISION: tl\.constexpr = FLAGS\.PRECISION|input_precision=FLAGS\.PRECISION")
    wrong = [
        f"{path.name}:{number}"
        for path in SOURCES
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if "FLAGS.PRECISION" in line and not allowed.search(line)
    ]
    assert not wrong
