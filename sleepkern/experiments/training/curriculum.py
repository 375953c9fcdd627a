"""Which difficulties are trained on, and when."""

from __future__ import annotations

from typing import Any, Protocol


class Curriculum(Protocol):
    """Weights of a task's levels, moved by how well training goes."""

    every: int
    """Steps between two looks at the accuracy; 0: never."""

    def weights(self) -> list[float] | None:
        """One for each level, None for equal ones."""

    def look(self, accuracy: dict[int, float]) -> None:
        """Token accuracy by level, of a training batch."""

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""

    def load(self, state: dict[str, Any]) -> None:
        """From a checkpoint."""


class Uniform:
    """All levels, always."""

    every = 0

    def weights(self) -> list[float] | None:
        return None

    def look(self, accuracy: dict[int, float]) -> None:
        return None

    def state(self) -> dict[str, Any]:
        return {}

    def load(self, state: dict[str, Any]) -> None:
        return None


class Frontier:
    """A mixture of the levels reached so far, `share` of it at the hardest; one more when that is mastered.

    A hard switch to the next level would undo what was learned; a mixture does not.

    Args:
        levels: the easiest first.
        share: of problems at the frontier.
        mastered: running mean of the token accuracy at which it moves.
        memory: of the running mean, from one look to the next.
    """

    every = 5

    def __init__(
        self, levels: tuple[int, ...], share: float = 0.3, mastered: float = 0.95, memory: float = 0.8
    ) -> None:
        self.levels, self.share, self.mastered, self.memory = levels, share, mastered, memory
        self.reached, self.mean = 0, 0.0

    def weights(self) -> list[float] | None:
        open_levels = self.reached + 1
        even = [(1 - self.share) / open_levels] * open_levels + [0.0] * (len(self.levels) - open_levels)
        even[self.reached] += self.share
        return even

    def look(self, accuracy: dict[int, float]) -> None:
        seen = accuracy.get(self.levels[self.reached])
        if seen is None:
            return
        self.mean = self.memory * self.mean + (1 - self.memory) * seen
        if self.mean > self.mastered and self.reached + 1 < len(self.levels):
            self.reached, self.mean = self.reached + 1, 0.0

    def state(self) -> dict[str, Any]:
        return {"reached": self.reached, "mean": self.mean}

    def load(self, state: dict[str, Any]) -> None:
        self.reached, self.mean = state["reached"], state["mean"]


CURRICULA = ("uniform", "frontier")


def curriculum(name: str, levels: tuple[int, ...]) -> Curriculum:
    """By its name.

    Raises:
        ValueError: no such curriculum.
    """
    if name not in CURRICULA:
        raise ValueError(f"curriculum: got {name!r}; expected one of {', '.join(CURRICULA)}")
    return Uniform() if name == "uniform" else Frontier(levels)
