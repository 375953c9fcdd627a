"""The levels of difficulty on which a model is trained, and their weights over time."""

from __future__ import annotations

from typing import Any, Protocol


class Curriculum(Protocol):
    """The weights of a task's levels, which depend on the accuracy so far."""

    every: int
    """Steps between two updates; 0: no updates."""

    def weights(self) -> list[float] | None:
        """A weight for each level, None for equal weights."""

    def update(self, accuracy: dict[int, float]) -> None:
        """Update the weights by the token accuracy of a training batch, by level."""

    def state(self) -> dict[str, Any]:
        """The state, for a checkpoint."""

    def load(self, state: dict[str, Any]) -> None:
        """Restore the state of a checkpoint."""


class Uniform:
    """All levels with equal weights."""

    every = 0

    def weights(self) -> list[float] | None:
        return None

    def update(self, accuracy: dict[int, float]) -> None:
        return None

    def state(self) -> dict[str, Any]:
        return {}

    def load(self, state: dict[str, Any]) -> None:
        return None


class Frontier:
    """A mixture of the levels reached so far, `share` of it at the hardest; a mastered level adds the next one.

    A model that switches to the next level alone forgets the levels before; a mixture keeps them.

    Args:
        levels: the levels, the easiest first.
        share: the share of problems at the hardest level reached.
        mastered: the running mean of the token accuracy at which the next level is added.
        memory: the weight of the old value in the running mean.
    """

    levels: tuple[int, ...]
    share: float
    mastered: float
    memory: float
    reached: int
    mean: float

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

    def update(self, accuracy: dict[int, float]) -> None:
        current = accuracy.get(self.levels[self.reached])
        if current is None:
            return
        self.mean = self.memory * self.mean + (1 - self.memory) * current
        if self.mean > self.mastered and self.reached + 1 < len(self.levels):
            self.reached, self.mean = self.reached + 1, 0.0

    def state(self) -> dict[str, Any]:
        return {"reached": self.reached, "mean": self.mean}

    def load(self, state: dict[str, Any]) -> None:
        self.reached, self.mean = state["reached"], state["mean"]


CURRICULA = ("uniform", "frontier")


def curriculum(name: str, levels: tuple[int, ...]) -> Curriculum:
    """The curriculum of that name.

    Raises:
        ValueError: an unknown name.
    """
    if name not in CURRICULA:
        raise ValueError(f"curriculum: got {name!r}; expected one of {', '.join(CURRICULA)}")
    return Uniform() if name == "uniform" else Frontier(levels)
