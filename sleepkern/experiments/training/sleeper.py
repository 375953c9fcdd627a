"""The model and its session as one module, so that whatever wraps a module (DDP, FSDP2, compile) wraps all of it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...nn import SleepLM
from ...sleep import SleepSession
from ...sleep.settings import Eviction, Feedback
from ..tasks import IGNORED, Batch


class Sleeper(nn.Module):
    """Sleeps over the windows of a context, then answers in one pass.

    Args:
        model: what sleeps.
        window, passes, feedback, eviction, settled, checkpoint: of its SleepSession.
    """

    def __init__(
        self,
        model: SleepLM,
        window: int,
        passes: int = 1,
        feedback: Feedback = "raw",
        eviction: Eviction = "hard",
        settled: float | None = None,
        checkpoint: bool = False,
    ) -> None:
        super().__init__()
        self.model, self.window, self.passes = model, window, passes
        self.feedback, self.eviction = feedback, eviction
        self.settled, self.checkpoint = settled, checkpoint

    def forward(self, context: Tensor, question: Tensor) -> Tensor:
        """Logits [B,Tq,vocabulary] of what follows each token of question [B,Tq], after context [B, windows * L]."""
        return self.session().ingest(context).read(question)

    def session(self) -> SleepSession:
        """A fresh one with these settings, which gradients go through wherever autograd is on."""
        return SleepSession(
            self.model,
            self.window,
            self.passes,
            eviction=self.eviction,
            feedback=self.feedback,
            tol=self.settled,
            checkpoint=self.checkpoint,
            differentiable=True,
        )


def loss_of(logits: Tensor, batch: Batch, count: int | None = None) -> Tensor:
    """Cross entropy summed over the targets, over `count` (default: how many there are)."""
    total = F.cross_entropy(
        logits.flatten(0, 1).float(), batch.targets.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    return total / (int((batch.targets != IGNORED).sum()) if count is None else count)


@torch.no_grad()
def right(logits: Tensor, batch: Batch) -> Tensor:
    """Which answers [B,A] are right in all their tokens, each predicted after the right ones before it."""
    rows, most = batch.level.shape
    place = batch.answers.where(batch.answers >= 0, most)  # what belongs to no answer goes behind them
    hits = (logits.argmax(-1) == batch.targets).to(torch.uint8)
    every = torch.ones(rows, most + 1, dtype=torch.uint8, device=hits.device)
    return every.scatter_reduce(1, place, hits, "amin")[:, :most].bool() & (batch.level > 0)
