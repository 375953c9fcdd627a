"""A model and its session as one module, for wrappers of modules (DDP, FSDP2, torch.compile)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...nn import SleepLM
from ...sleep import SleepSession
from ...sleep.settings import Eviction, Feedback
from ..tasks import IGNORED, Batch


class SleepModule(nn.Module):
    """A model that sleeps over the windows of a context, then answers in one pass.

    Args:
        model: the model that sleeps.
        window, passes, feedback, eviction, tol, checkpoint: arguments of its SleepSession.
    """

    model: SleepLM
    window: int
    passes: int
    feedback: Feedback
    eviction: Eviction
    tol: float | None
    checkpoint: bool

    def __init__(
        self,
        model: SleepLM,
        window: int,
        passes: int = 1,
        feedback: Feedback = "raw",
        eviction: Eviction = "hard",
        tol: float | None = None,
        checkpoint: bool = False,
    ) -> None:
        super().__init__()
        self.model, self.window, self.passes = model, window, passes
        self.feedback, self.eviction = feedback, eviction
        self.tol, self.checkpoint = tol, checkpoint

    def forward(self, context: Tensor, question: Tensor) -> Tensor:
        """Logits [B,Tq,vocabulary] for the tokens after each of question [B,Tq], after context [B, windows * L]."""
        return self.session().ingest(context).read(question)

    def session(self) -> SleepSession:
        """A new session with these settings; where autograd is on, it keeps what gradients need."""
        return SleepSession(
            self.model,
            self.window,
            self.passes,
            eviction=self.eviction,
            feedback=self.feedback,
            tol=self.tol,
            checkpoint=self.checkpoint,
            differentiable=True,
        )


def loss_of(logits: Tensor, batch: Batch, count: int | None = None) -> Tensor:
    """The cross entropy summed over the targets, divided by `count` (default: the number of targets)."""
    total = F.cross_entropy(
        logits.flatten(0, 1).float(), batch.targets.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    return total / (int((batch.targets != IGNORED).sum()) if count is None else count)


@torch.no_grad()
def correct_answers(logits: Tensor, batch: Batch) -> Tensor:
    """Which answers [B,A] are correct in all tokens; each token is predicted after the correct tokens before it."""
    rows, most = batch.level.shape
    index = batch.answers.where(batch.answers >= 0, most)  # tokens of no answer go into an extra column
    hits = (logits.argmax(-1) == batch.targets).to(torch.uint8)
    every = torch.ones(rows, most + 1, dtype=torch.uint8, device=hits.device)
    return every.scatter_reduce(1, index, hits, "amin")[:, :most].bool() & (batch.level > 0)
