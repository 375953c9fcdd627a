"""Muon for the matrices inside the blocks, AdamW for the rest, and the course of their rates."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...nn import GatedDeltaNet, WindowAttention

MUON_RATE, ADAM_RATE = 0.02, 3e-3
WARM_UP = 50
"""Steps over which the rates rise."""
DECAY = 0.3
"""Share of the steps, at the end, over which they fall to 0."""
LARGEST_NORM = 1.0


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(matrices of linear layers inside blocks, everything else)."""
    inside = [p for name, p in model.named_parameters() if _is_matrix(name, p)]
    others = [p for name, p in model.named_parameters() if not _is_matrix(name, p)]
    return inside, others


def _is_matrix(name: str, parameter: Tensor) -> bool:
    return ".layers." in f".{name}" and parameter.ndim == 2 and "convolution" not in name


def parts_of(model: nn.Module) -> dict[Tensor, list[int]]:
    """The rows of each matrix in a parameter that holds several side by side, which one product multiplies."""
    found: dict[Tensor, list[int]] = {}
    for module in model.modules():
        if isinstance(module, WindowAttention):
            found[module.qkv.weight] = [module.qkv.weight.shape[1]] * 3
        elif isinstance(module, GatedDeltaNet):
            found[module.qkv.weight] = list(module.split)
            found[module.rates.weight] = [module.value_heads] * 2
    return found


class Muon(torch.optim.Muon):
    """torch's Muon, of matrices that may be several side by side, each of which gets an update of its own.

    On a CPU products are made in float32: those in bfloat16 take ten times as long there.
    """

    def __init__(self, matrices: list[nn.Parameter], parts: dict[Tensor, list[int]], **options: Any) -> None:
        super().__init__(matrices, **options)
        self.parts = parts

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step; closure: makes gradients anew and returns the loss, which is then returned here."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, group)
        return loss

    def _update(self, p: Tensor, group: dict[str, Any]) -> None:
        state, grad, momentum = self.state[p], p.grad, group["momentum"]
        assert grad is not None
        if not state:
            state["momentum_buffer"] = torch.zeros_like(grad)
        mean = state["momentum_buffer"].lerp_(grad, 1 - momentum)
        update = grad.lerp(mean, momentum) if group["nesterov"] else mean
        rows = self.parts.get(p, [p.shape[0]])  # type: ignore[call-overload]
        moved = [
            _scaled(part, group["ns_coefficients"]) for part in (update.split(rows) if len(rows) > 1 else [update])
        ]
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.add_(torch.cat(moved) if len(rows) > 1 else moved[0], alpha=-group["lr"])


def _scaled(update: Tensor, coefficients: tuple[float, float, float]) -> Tensor:
    """Orthogonal, and larger where a matrix is tall, as in torch."""
    made = orthogonal(update.bfloat16() if update.is_cuda else update, *coefficients)
    taller: float = max(1.0, update.shape[0] / update.shape[1]) ** 0.5
    return made.to(update.dtype) * taller


def orthogonal(matrix: Tensor, a: float, b: float, c: float, rounds: int = 5) -> Tensor:
    """Near the orthogonal matrix next to this one, by Newton-Schulz: X <- a X + b (X X^T) X + c (X X^T)^2 X."""
    tall = matrix.shape[0] > matrix.shape[1]
    X = matrix.T if tall else matrix
    X = X / X.norm().clamp_min(1e-7)
    for _ in range(rounds):
        G = X @ X.T
        X = torch.addmm(X, torch.addmm(G, G, G, beta=b, alpha=c), X, beta=a)
    return X.T if tall else X


class Optimisers:
    """Both as one."""

    def __init__(self, model: nn.Module) -> None:
        matrices, others = split_parameters(model)
        muon = Muon(matrices, parts_of(model), lr=MUON_RATE, momentum=0.95, nesterov=True, weight_decay=0.0)
        adam = torch.optim.AdamW(others, lr=ADAM_RATE, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
        self.parts: list[torch.optim.Optimizer] = [muon, adam]
        self._parameters = [*matrices, *others]

    def step(self, factor: float) -> Tensor:
        """Clip, step with rates times `factor`, drop gradients; the norm that gradients had before."""
        norm = nn.utils.clip_grad_norm_(self._parameters, LARGEST_NORM)
        for part, rate in zip(self.parts, (MUON_RATE, ADAM_RATE), strict=True):
            for group in part.param_groups:
                group["lr"] = rate * factor
            part.step()
            part.zero_grad(set_to_none=True)
        return norm


def rate_factor(step: int, steps: int) -> float:
    """The factor of the rate at step 0 .. steps-1: a rise, a plain, a linear fall."""
    return min(1.0, (step + 1) / WARM_UP, (steps - step) / max(1.0, DECAY * steps))
