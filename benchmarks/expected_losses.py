"""Keep the losses of small runs as what large ones are expected to lose: `python -m benchmarks.expected_losses LOG...`.

LOG is a log.json of `train --batch`, on a CPU, of a few hundred steps at most.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from sleepkern.experiments.training.expected import FILE, store
from sleepkern.files import read_json


def main() -> None:
    """Store the losses of each log."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("logs", nargs="+", type=Path)
    for path in parser.parse_args().logs:
        store(read_json(path))
        print(f"{FILE.name} has the losses of {path}")


if __name__ == "__main__":
    main()
