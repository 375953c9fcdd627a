"""Passes over a window under autograd: run by a backend, and each pass again by the modules in the backward."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from ..backends import modules
from ..backends.interface import BlocksBackend
from ..problems.blocks import BlockProblem, Slept
from ..state import KVState, RecurrentState, State, filled, tensors_of

_Named = dict[str, Tensor]


def sleep_blocks(
    problem: BlockProblem, engine: BlocksBackend, h: Tensor, blocks: Sequence[Any], states: Sequence[State]
) -> Slept:
    """What the backend makes of them, recorded where a gradient of h, states or weights may be asked for."""
    if engine.RECORDED or not torch.is_grad_enabled():
        return engine.run(problem, h, blocks, states)
    tensors, parameters = tensors_of(states), _parameters(blocks)
    if not any(t.requires_grad for t in (h, *tensors, *parameters)):
        return engine.run(problem, h, blocks, states)
    changes = h.new_empty(problem.passes, dtype=torch.float32)
    made = _Recorded.apply(problem, engine, blocks, states, changes, h, *tensors, *parameters)
    return Slept(made[0], _paired(blocks, made[1:]), changes)


class _Recorded(torch.autograd.Function):
    """Passes of one call each; h and what blocks remember between them is kept, and each is run again backwards.

    With the weights of the forward, whatever blocks have by then: they may have been lent for that call only.
    """

    @staticmethod
    def forward(
        ctx: Any,
        problem: BlockProblem,
        engine: BlocksBackend,
        blocks: Sequence[Any],
        states: list[State],
        changes: Tensor,
        h: Tensor,
        *rest: Tensor,
    ) -> tuple[Tensor, ...]:
        single, reinject, carry = problem._replace(passes=1), problem.reinject, problem.carry
        left, kept = [h], []  # h as each pass leaves it, and what was carried into it

        def once(entry: Tensor, before: list[State]) -> tuple[Tensor, list[State], Tensor]:
            out, after, change = engine.run(single, entry, blocks, before)
            kept.append((left[-1], before))
            left.append(out)
            return out, list(after), change[0]

        _, now, changed = modules.repeat(once, h, states, problem.passes, reinject, carry)
        changes.copy_(changed)
        ctx.blocks, ctx.how, ctx.names = blocks, (problem.passes, reinject, carry), _names(blocks)
        ctx.numbers = [layer.numbers() for layer in problem.layers]
        # As saved tensors, and weights among them, so that torch sees it if they are written to before the backward.
        ctx.forms = [[None if s is None else type(s) for s in began] for _, began in [*kept, (h, states)]]
        began = [*kept, (h, states)]
        ctx.save_for_backward(*_parameters(blocks), *(t for x, before in began for t in (x, *tensors_of(before))))
        return (left[-1], *tensors_of(now))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        _check_unchanged(ctx.blocks, ctx.numbers)
        count = len({place for names in ctx.names for place in names.values()})
        weights, tensors = list(ctx.saved_tensors[:count]), iter(ctx.saved_tensors[count:])
        began = [(next(tensors), [None if f is None else f(next(tensors), next(tensors)) for f in forms])
                 for forms in ctx.forms]  # fmt: skip
        *kept, (_, states) = began
        # Aliases, of which those for which nobody asks get no gradient.
        leaves = [
            t.detach().requires_grad_(n)
            for t, n in zip(weights, ctx.needs_input_grad[len(ctx.needs_input_grad) - count :], strict=True)
        ]
        named = [{name: leaves[place] for name, place in names.items()} for names in ctx.names]
        with torch.autocast(grads[0].device.type, enabled=False):
            found = _differentiate(ctx.blocks, named, states, ctx.how, kept, grads, leaves)
        return (None, None, None, None, None, *found)


def _check_unchanged(blocks: Sequence[Any], numbers: list[tuple[Any, ...]]) -> None:
    """
    Raises:
        RuntimeError: a block would compute something else than it did in the forward.
    """
    for block, before in zip(blocks, numbers, strict=True):
        layer = type(block).layer_weights(block)
        if isinstance(layer, str):
            raise RuntimeError(f"blocks were changed between forward and backward: {layer}")
        if layer.numbers() != before:
            raise RuntimeError("numbers of the blocks, such as heads or eps, were changed between forward and backward")


def _differentiate(
    blocks: Sequence[Any],
    named: Sequence[_Named],
    states: list[State],
    how: tuple[int, bool, bool],
    kept: list[tuple[Tensor, list[State]]],
    grads: Sequence[Tensor],
    weights: list[Tensor],
) -> list[Tensor | None]:
    """Gradients of h, of all tensors in states, and of all weights, which blocks have by name."""
    wanted = [p for p in weights if p.requires_grad]
    lent = [partial(_with_weights, block, own) for block, own in zip(blocks, named, strict=True)]
    start, (passes, reinject, carry) = kept[0][0], how
    dstart, dweights = torch.zeros_like(start), [torch.zeros_like(p) for p in wanted]
    dstates = [None if s is None else [torch.zeros_like(t) for t in s] for s in states]
    dh, dafter = grads[0], list(grads[1:])
    for n in reversed(range(passes)):
        h, before = kept[n]
        leaves = [h, start, *tensors_of(before)]
        leaves = [t.detach().requires_grad_() for t in leaves]
        with torch.enable_grad():
            entry = modules.rms_normalize(leaves[0]) + leaves[1] if reinject and n > 0 else leaves[0]
            out, after = modules.one_pass(lent, entry, filled(before, leaves[2:]))
        found = torch.autograd.grad([out, *tensors_of(after)], [*leaves, *wanted], [dh, *dafter], allow_unused=True)
        dweights = [a if b is None else a + b for a, b in zip(dweights, found[len(leaves) :], strict=True)]
        dh = torch.zeros_like(h) if found[0] is None else found[0]
        dstart = dstart if found[1] is None else dstart + found[1]
        dafter = _pass_on(before, found[2 : len(leaves)], after, states, dstates, n, carry)
    by_weight = iter(dweights)
    return [
        dh + dstart,
        *(t for s in dstates if s is not None for t in s),
        *(next(by_weight) if p.requires_grad else None for p in weights),
    ]


def _with_weights(block: Any, named: _Named, *arguments: Any) -> Any:
    """The block's result with other parameters in the place of its own."""
    return functional_call(block, named, arguments)


def _names(blocks: Sequence[Any]) -> list[dict[str, int]]:
    """Gives for each block, by name, the positions of its parameters among all."""
    places = {p: i for i, p in enumerate(_parameters(blocks))}
    return [{name: places[p] for name, p in block.named_parameters()} for block in blocks]


def _parameters(blocks: Sequence[Any]) -> list[Tensor]:
    """Each once, though blocks may share some."""
    return list(dict.fromkeys(p for block in blocks for p in block.parameters()))


def _pass_on(
    before: Sequence[State],
    found: Sequence[Tensor | None],
    after: Sequence[State],
    states: Sequence[State],
    dstates: list[list[Tensor] | None],
    n: int,
    carry: bool,
) -> list[Tensor]:
    """Gradients of what a pass began with: to what the pass before left, and to what there was before the window."""
    grads, earlier = iter(found), []
    for i, (began, made) in enumerate(zip(before, after, strict=True)):
        pair = [None, None] if began is None else [next(grads), next(grads)]
        fast = isinstance(made, RecurrentState)
        # From the pass before: the fast weight, and with `carry` the convolution's inputs; the rest from the window's.
        theirs = [n > 0 and fast and carry, n > 0 and fast]
        own = dstates[i]
        assert made is not None
        for place in range(2):
            found_here = pair[place]
            if not theirs[place] and own is not None and found_here is not None:
                own[place] += found_here
            passed = found_here if theirs[place] else None
            earlier.append(torch.zeros_like(made[place]) if passed is None else passed)
    return earlier


def _paired(blocks: Sequence[Any], tensors: Sequence[Tensor]) -> list[RecurrentState | KVState]:
    pairs = zip(tensors[::2], tensors[1::2], strict=True)
    return [
        RecurrentState(*pair) if block.recurrent else KVState(*pair) for block, pair in zip(blocks, pairs, strict=True)
    ]
