"""The cost of a run, by arithmetic and without a measurement."""

from __future__ import annotations

from dataclasses import dataclass

from .configurations import Configuration
from .optimisers import split_parameters


@dataclass(frozen=True)
class Estimate:
    """The cost of a run.

    parameters  parameters of the model
    tokens      tokens of all problems, each counted once
    flop        operations of all steps, forward and backward

    flop counts two operations a token, pass and weight of the blocks' matrices and of the head, times three with the
    backward. Attention and recurrence in a window of these lengths add a few per cent. flop / (a device's sustained
    rate) is a lower bound on the seconds.
    """

    parameters: int
    tokens: float
    flop: float


def work(configuration: Configuration, passes: int) -> tuple[int, int]:
    """Tokens of a problem, and tokens that the blocks process for it: context x passes + question."""
    batch = configuration.task.batch(1, 0)
    context, question = batch.context.shape[1], batch.question.shape[1]
    return context + question, context * passes + question


def compute_ratio(configuration: Configuration, passes: int) -> float:
    """The compute of a step with `passes` passes over that of a step with one pass."""
    return work(configuration, passes)[1] / work(configuration, 1)[1]


def compute_matched_steps(configuration: Configuration, passes: int, steps: int) -> int:
    """Steps with one pass that cost as much as `steps` steps with `passes` passes, to the nearest hundred."""
    return round(steps * compute_ratio(configuration, passes) / 100) * 100


def estimate(configuration: Configuration, passes: int, steps: int | None = None) -> Estimate:
    """The cost of a run with `passes` passes over each window."""
    model = configuration.model()
    problems = configuration.batch * (configuration.steps if steps is None else steps)
    tokens, processed = work(configuration, passes)
    matrices = sum(p.numel() for p in split_parameters(model)[0])
    head = model.lm_head.weight.numel() * configuration.task.question_length
    parameters = sum(p.numel() for p in model.parameters())
    return Estimate(parameters, float(problems * tokens), 6.0 * problems * (processed * matrices + head))
