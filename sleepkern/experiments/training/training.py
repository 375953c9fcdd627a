"""A training: its batches, steps, measurements and checkpoints."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...files import replacing
from ...sleep.settings import Eviction, Feedback
from ..tasks import IGNORED, Batch, Task
from .checkpoints import check_weights, damaged, read_checkpoint
from .configurations import Configuration
from .curriculum import Curriculum, curriculum
from .distributed import Placement
from .optimisers import Optimisers, rate_factor
from .sleep_module import SleepModule, correct_answers, loss_of

Callback = Callable[["Training"], None]


@dataclass(frozen=True)
class Run:
    """How a configuration is trained. Logs and checkpoints store these fields by name.

    passes, feedback, eviction, checkpoint: arguments of SleepSession; settled is its `tol`.
    seed: seed of the weights and the problems, 0 to 2**63 - 1.
    steps: number of steps, default that of the configuration.
    """

    configuration: Configuration
    passes: int = 1
    feedback: Feedback = "reinject"
    eviction: Eviction = "hard"
    settled: float | None = None
    checkpoint: bool = False
    seed: int = 0
    steps: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed: got {self.seed}; expected 0 to 2**63 - 1")

    @property
    def length(self) -> int:
        """The number of steps."""
        return self.configuration.steps if self.steps is None else self.steps

    def to_dict(self) -> dict[str, Any]:
        """The run as JSON, for logs and checkpoints."""
        found = asdict(replace(self, steps=self.length))
        found["configuration"]["task"] |= {"name": type(self.configuration.task).__name__}
        return found


def is_loss_step(step: int) -> bool:
    """Tells whether a training keeps the loss of a step: 1, 2, 5, 10, 20, 50, 100 and so on."""
    while step >= 10 and step % 10 == 0:
        step //= 10
    return step in (1, 2, 5)


class Training:
    """A model in training. Training is deterministic: an interrupted run goes on as if it had not been interrupted.

    Args:
        run: the configuration and its settings.
        placement: the device and the processes; default the CPU in this process.
    """

    run: Run
    task: Task
    placement: Placement
    sleep_module: SleepModule
    module: nn.Module
    optimisers: Optimisers
    curriculum: Curriculum
    done: int
    seconds: float
    history: list[dict[str, Any]]
    losses: dict[int, float]

    def __init__(self, run: Run, placement: Placement | None = None) -> None:
        self.run, self.task = run, run.configuration.task
        self.placement = placement or Placement(torch.device("cpu"))
        if run.configuration.batch % self.placement.processes:
            raise ValueError(
                f"batch: got {run.configuration.batch}; expected a multiple of {self.placement.processes} processes"
            )
        torch.manual_seed(run.seed)
        self.sleep_module = SleepModule(
            run.configuration.model(), self.task.window, run.passes, run.feedback, run.eviction, run.settled,
            run.checkpoint,
        )  # fmt: skip
        self.module = self.placement.wrap(self.sleep_module)
        self.optimisers = Optimisers(self.sleep_module)
        self.curriculum = curriculum(run.configuration.curriculum, self.task.levels)
        self.done = 0
        self.seconds = 0.0
        self.history = []
        self.losses = {}
        self._tests: dict[int, Batch] = {}

    def step(self) -> Tensor:
        """Make one step, and return the loss of this process; the mean over processes is the loss of the batch."""
        whole = self.task.batch(
            self.run.configuration.batch, self.run.seed, self.done, "train", self.curriculum.weights()
        )
        targets = int((whole.targets != IGNORED).sum())
        batch = whole.part(self.placement.shard(len(whole.context))).to(self.placement.device)
        with self.placement.precision():
            logits = self.module(batch.context, batch.question)
        loss = loss_of(logits, batch, targets) * self.placement.processes
        loss.backward()
        self.optimisers.step(rate_factor(self.done, self.run.length))
        if self.curriculum.every and self.done % self.curriculum.every == 0:
            self.curriculum.update(self._token_accuracy(logits.detach(), batch))
        self.done += 1
        return loss.detach()

    @torch.no_grad()
    def measure(self) -> dict[int, float]:
        """The share of correct answers to the test problems, by level."""
        size, found = self.run.configuration.batch, {}
        for level in self.task.test_levels:
            hits = torch.zeros(2, dtype=torch.int64, device=self.placement.device)
            tests = self._test(level)
            for start in range(0, len(tests.context), size):
                rows = tests.part(slice(start, start + size))
                batch = rows.part(self.placement.shard(len(rows.context))).to(self.placement.device)
                with self.placement.precision():
                    logits = self.module(batch.context, batch.question)
                hits += torch.stack([correct_answers(logits, batch).sum(), (batch.level > 0).sum()])
            correct, total = self.placement.sum_over_processes(hits).tolist()
            found[level] = correct / total
        return found

    def train(
        self,
        until: int | None = None,
        on_eval: Callback | None = None,
        on_step: Callback | None = None,
        seconds: float | None = None,
    ) -> None:
        """Train to step `until` (default the end), or for so many seconds, which the step under way may exceed.

        on_step is called after every step, on_eval after every measurement. With several processes `seconds` ends
        the slice of all of them at the same step.
        """
        last = self.run.length if until is None else until
        began = start = time.perf_counter()
        while self.done < last:
            loss = self.step()
            if is_loss_step(self.done):
                self.losses[self.done] = self._mean(loss)
            if on_step is not None:
                on_step(self)
            if self.done % self.run.configuration.look == 0 or self.done == self.run.length:
                lost = self._mean(loss)
                self.seconds += time.perf_counter() - began  # without measurements
                self.history.append(
                    {"step": self.done, "loss": lost, "seconds": self.seconds, "accuracy": self.measure()}
                )
                if on_eval is not None:
                    on_eval(self)
                began = time.perf_counter()
            if seconds is not None and self._any_process(time.perf_counter() - start >= seconds):
                break
        self.seconds += time.perf_counter() - began

    def _mean(self, loss: Tensor) -> float:
        """The loss of the whole batch, from those of the processes."""
        return float(self.placement.sum_over_processes(loss)) / self.placement.processes

    def _any_process(self, here: bool) -> bool:
        """Tells whether something holds in a process, in all of them alike."""
        if self.placement.processes == 1:
            return here
        flag = torch.tensor([int(here)], device=self.placement.device)
        return bool(self.placement.sum_over_processes(flag)[0] > 0)

    @property
    def tokens(self) -> int:
        """The tokens of a step's problems, each counted once whatever N is."""
        lengths = self._test(self.task.test_levels[0])
        return self.run.configuration.batch * (lengths.context.shape[1] + lengths.question.shape[1])

    def save(self, path: Path) -> None:
        """Write a checkpoint, from which any number of processes can go on."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict  # a second of imports

        whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights, optimisers = get_state_dict(self.sleep_module, self.optimisers.parts, options=whole)
        if not self.placement.is_main:
            return
        content = {
            "run": self.run.to_dict(),
            "weights": weights,
            "optimisers": optimisers,
            "curriculum": self.curriculum.state(),
            "done": self.done,
            "seconds": self.seconds,
            "history": self.history,
            "losses": self.losses,
        }
        with replacing(path) as partial:
            torch.save(content, partial)

    def load(self, path: Path) -> None:
        """Go on from a checkpoint. After an error this training is unusable.

        Raises:
            ValueError: the checkpoint is damaged, or of another run.
        """
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

        whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
        content = read_checkpoint(path)
        if content["run"] != self.run.to_dict():
            expected = self.run.to_dict()
            differing = sorted(name for name in expected if content["run"].get(name) != expected[name])
            raise ValueError(f"{path}: got a checkpoint of a run with other {', '.join(differing)}; expected the same")
        if content["done"] > self.run.length:
            raise ValueError(f"{path}: got {content['done']} steps done; expected at most {self.run.length}")
        check_weights(path, content, self.sleep_module.state_dict())
        try:
            self.curriculum.load(content["curriculum"])
            set_state_dict(
                self.sleep_module, self.optimisers.parts, model_state_dict=content["weights"],
                optim_state_dict=content["optimisers"], options=whole,
            )  # fmt: skip
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise damaged(path, error) from error
        self.done, self.seconds, self.history = content["done"], content["seconds"], content["history"]
        self.losses = content["losses"]

    def _test(self, level: int) -> Batch:
        if level not in self._tests:
            weights = [float(other == level) for other in self.task.levels]
            self._tests[level] = self.task.batch(self.run.configuration.problems, level, 0, "test", weights)
        return self._tests[level]

    def _token_accuracy(self, logits: Tensor, batch: Batch) -> dict[int, float]:
        answers = batch.answers.clamp_min(0)
        level = batch.level.gather(1, answers).where(batch.answers >= 0, 0)
        hits = logits.argmax(-1) == batch.targets
        counts = torch.stack([torch.stack([(hits & (level == n)).sum(), (level == n).sum()]) for n in self.task.levels])
        rows = zip(self.task.levels, self.placement.sum_over_processes(counts).tolist(), strict=True)
        return {n: got / asked for n, (got, asked) in rows if asked}
