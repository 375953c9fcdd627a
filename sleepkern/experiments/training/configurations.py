"""What can be trained: a task, a model, and how long, one row each. Costs: `python -m sleepkern train --list`."""

from __future__ import annotations

from dataclasses import dataclass

from ...nn import SleepLM
from ..tasks import Arithmetic, Depo, NamedDepo, Rule110, Task


@dataclass(frozen=True)
class Configuration:
    """A task, the model for it, and its training.

    width, heads, blocks, pattern, factor: of SleepLM. decay_bias: of its GatedDeltaNet; higher for more tokens.
    batch: problems a step, over all processes. steps: default length. curriculum: a name of `curriculum.py`.
    look: steps between two measurements. problems: test problems measured at each level.
    """

    task: Task
    width: int
    heads: int
    blocks: int
    batch: int
    steps: int
    pattern: str = "AG"
    factor: int = 2
    decay_bias: float = 4.0
    curriculum: str = "uniform"
    look: int = 100
    problems: int = 256

    def model(self) -> SleepLM:
        """A fresh one, of torch's random numbers as they stand."""
        return SleepLM(
            self.task.vocabulary,
            self.width,
            self.heads,
            self.blocks,
            max(self.task.window, self.task.question_length),
            self.pattern,
            self.factor,
            {"decay_bias": self.decay_bias},
            self.task.kinds,
        )


def _to(n: int) -> tuple[int, ...]:
    return tuple(range(1, n + 1))


# fmt: off
CONFIGURATIONS: dict[str, dict[str, Configuration]] = {
    "depo": {
        #                                                              width heads blocks batch steps
        "mini":  Configuration(Depo(9, _to(4), 8),                        64,  2,    2,     64,  1600),
        "gpu":   Configuration(Depo(17, _to(8), 16),                     128,  4,    4,   1024,  4000, look=250),
        "paper": Configuration(NamedDepo(75),                            768, 12,   12,    256, 50000, factor=4,
                               decay_bias=6.0, look=1000),
    },
    "rule110": {
        "mini":  Configuration(Rule110(16, 1, _to(8)),                    64,  2,    2,     64,  2400,
                               curriculum="frontier"),
        "gpu":   Configuration(Rule110(24, 4, _to(16)),                  256,  4,    4,   1024,  2000, decay_bias=6.0,
                               curriculum="frontier", look=250),
        "paper": Configuration(Rule110(24, 4, (32,)),                    256,  4,    4,   1024, 25000, decay_bias=6.0,
                               factor=4, look=1000),
    },
    "arithmetic": {
        "mini":  Configuration(Arithmetic(5, _to(4), 11, 2),              64,  2,    2,     64,  2400),
        "gpu":   Configuration(Arithmetic(11, _to(8), 23, 2),            256,  4,    4,   1024,  4000, decay_bias=6.0,
                               look=250),
        "paper": Configuration(Arithmetic(31, _to(16), 23, 4),           768, 12,   12,    256, 50000, decay_bias=6.0,
                               factor=4, look=1000),
    },
}
# fmt: on


def configuration(task: str, size: str) -> Configuration:
    """A configuration of the table.

    Raises:
        ValueError: not in it.
    """
    if task not in CONFIGURATIONS:
        raise ValueError(f"task: got {task!r}; expected one of {', '.join(CONFIGURATIONS)}")
    if size not in CONFIGURATIONS[task]:
        raise ValueError(f"size: got {size!r}; expected one of {', '.join(CONFIGURATIONS[task])}")
    return CONFIGURATIONS[task][size]
