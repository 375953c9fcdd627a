"""What a run costs, by arithmetic; nothing here is measured."""

from __future__ import annotations

from dataclasses import dataclass

from .configurations import Configuration
from .optimisers import split_parameters


@dataclass(frozen=True)
class Estimate:
    """parameters: of the model. tokens: of all problems, each once. flop: of all steps, forward and backward.

    Counted are two flop a token, pass and weight of the blocks' matrices and of the head, three times for the backward;
    attention and recurrence inside a window of these lengths add a few per cent. flop / (a device's sustained rate) is
    a bound from below on seconds.
    """

    parameters: int
    tokens: float
    flop: float


def work(configuration: Configuration, passes: int) -> tuple[int, int]:
    """(tokens of a problem, tokens that run through the blocks for it: context x passes + question)."""
    batch = configuration.task.batch(1, 0)
    context, question = batch.context.shape[1], batch.question.shape[1]
    return context + question, context * passes + question


def longer(configuration: Configuration, passes: int) -> float:
    """How many times longer one pass may train for the compute of `passes`."""
    return work(configuration, passes)[1] / work(configuration, 1)[1]


def estimate(configuration: Configuration, passes: int, steps: int | None = None) -> Estimate:
    """Of a run with `passes` passes over each window."""
    model = configuration.model()
    problems = configuration.batch * (configuration.steps if steps is None else steps)
    tokens, through = work(configuration, passes)
    matrices = sum(p.numel() for p in split_parameters(model)[0])
    head = model.lm_head.weight.numel() * configuration.task.question_length
    parameters = sum(p.numel() for p in model.parameters())
    return Estimate(parameters, float(problems * tokens), 6.0 * problems * (through * matrices + head))
