"""N passes of a stack of hybrid blocks over a window, in one call (arXiv 2605.26099).

h(0) = h;   (h(n), S(n)) = Blocks(h(n-1), S(n-1)),  n = 1..N
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.nn.modules import module as _module

from ..backends import cpu_blocks, cuda_blocks, modules
from ..backends.tensors import on_device_of
from ..dispatch import asked_for
from ..state import KVState, RecurrentState, State
from . import arguments, fitting

if TYPE_CHECKING:
    from ..nn import HybridBlock

_Named = dict[str, Tensor]


class Slept(NamedTuple):
    """Result of `sleep_blocks`.

    h        [B,L,d] after the last pass
    states   what each block remembers: a RecurrentState of gated DeltaNet, a KVState of attention
    changes  [N] for each pass the norm of what it changed in the fast weights, relative to their norm after it
    """

    h: Tensor
    states: list[RecurrentState | KVState]
    changes: Tensor


def sleep_blocks(
    h: Tensor,
    blocks: Sequence[HybridBlock],
    states: Sequence[State] | None = None,
    passes: int = 1,
    feedback: Literal["raw", "reinject"] = "raw",
    conv_state: Literal["rewind", "carry"] = "rewind",
) -> Slept:
    """Run blocks `passes` times over a window, exactly as the modules do one by one.

    Args:
        h: [B,L,d] the window, embedded.
        blocks: of `sleepkern.nn`, one after the other.
        states: what each block remembers from before the window, default nothing. Attention sees its part in every
            pass; fast weights go on from pass to pass.
        passes: N.
        feedback: a pass after the first starts from "raw", what the one before left, or "reinject", that normalised,
            plus h.
        conv_state: before the window, the short convolutions of a pass after the first see "rewind", what preceded the
            window, or "carry", the window's own end.

    On the CPU all of it is one call of C++: groups of sequences go through all passes and blocks without leaving the
    caches. Products with weights multiply in bfloat16 where h is that, or float32 of which
    torch.set_float32_matmul_precision("medium") allows it, and the processor does it in one instruction; those of
    float32 go in part by Winograd's inner product where additions run beside multiplications, with the errors of
    plain ones (docs/sleep_blocks.md). On a GPU it is one launch, whose products multiply in bfloat16. With gradients
    h and the fast weights are kept between passes only, and each pass is run again in the backward. What `why_not`
    names runs module by module. Weights are packed once, and again when they have changed, but for writes that torch
    does not count: see `forget_packed`.

    Raises:
        TypeError: an argument of another type.
        ValueError: an argument out of range, or a tensor whose memory was freed.
    """
    blocks, states = arguments.check(h, blocks, states, passes, feedback, conv_state)
    if any(t.is_neg() for t in (h, *_tensors_of(states))):  # a sign that is not in memory yet
        h, states = h.resolve_neg(), _filled(states, [t.resolve_neg() for t in _tensors_of(states)])
    with on_device_of(h):
        return _run_where_it_may(h, blocks, states, passes, feedback, conv_state)


def _run_where_it_may(
    h: Tensor,
    blocks: Sequence[HybridBlock],
    states: list[State],
    passes: int,
    feedback: Literal["raw", "reinject"],
    conv_state: Literal["rewind", "carry"],
) -> Slept:
    if why_not(h, blocks) is not None:
        return one_by_one(h, blocks, passes, states, feedback, conv_state)
    arguments.check_sizes(h, blocks, states)
    tensors = _tensors_of(states)
    if not all(fitting.readable(t) for t in tensors):
        return one_by_one(h, blocks, passes, states, feedback, conv_state)
    how = _How(passes, feedback == "reinject", conv_state == "carry")
    parameters = _parameters(blocks) if torch.is_grad_enabled() else []
    if torch.is_grad_enabled() and any(t.requires_grad for t in (h, *tensors, *parameters)):
        changes = h.new_empty(passes, dtype=torch.float32)
        made = _Recorded.apply(blocks, states, how, changes, h, *tensors, *parameters)
        return Slept(made[0], _paired(blocks, made[1:]), changes)
    return _run(h, blocks, states, how)


def forget_packed(blocks: Sequence[HybridBlock]) -> None:
    """Have `sleep_blocks` pack the weights of these blocks anew.

    It does so by itself where a block has other weights or numbers than before, or torch has counted a write to one of
    its parameters. Torch does not count writes by way of a parameter's `.data` (`p.data.mul_(2)`, `p.data += d`, which
    merging an adapter may do), of its numpy array, or of another process that shares its memory: call this after them.
    """
    for block in blocks:
        cpu_blocks.forget(block)
        cuda_blocks.forget(block)


def why_not(h: Tensor, blocks: Sequence[HybridBlock]) -> str | None:
    """None where `sleep_blocks` is one call of C++ or one launch, else the sentence why it runs module by module."""
    if cpu_blocks._C is None:
        return "the compiled module sleepkern._C is not there"
    device = h.device.type
    if not asked_for(device):  # the backends of sleep_blocks have the names of their devices
        return "SLEEPKERN_BACKEND asks for another backend"
    if device not in ("cpu", "cuda") or h.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"one call for {h.dtype} on {h.device} is not there, only for at most 32 bits on CPU and GPU"
    if torch.compiler.is_compiling() or torch.is_autocast_enabled(device) or torch._C._len_torch_dispatch_stack() > 0:
        return "a compiled graph, autocast or a dispatch mode wants to see the operators"
    if torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
        return "a transform of torch.func or forward mode wants to see the operators"
    if _module._global_forward_hooks or _module._global_forward_pre_hooks:
        return "modules have hooks, which want to be called"
    if not fitting.readable(h):
        return f"h is a {type(h).__name__} that is not numbers at an address"
    for block in blocks:
        reason = fitting.why_not(block, h)
        if reason is not None:
            return reason
    return cuda_blocks.why_not(h, blocks) if device == "cuda" else cpu_blocks.why_not(blocks)


class _How(NamedTuple):
    passes: int
    reinject: bool
    carry: bool


def _run(h: Tensor, blocks: Sequence[HybridBlock], states: Sequence[State], how: _How) -> Slept:
    """In one launch, or by C++, in float32 but for products with weights; results in the types that modules leave."""
    if h.device.type == "cuda":
        return Slept(*cuda_blocks.run(h, blocks, states, *how))
    out, after, changes = cpu_blocks.packed(blocks, h.dtype).run(h.float(), blocks, states, *how)
    return Slept(out.to(h.dtype), [_like(x, h.dtype) for x in after], changes)


def _like(x: RecurrentState | KVState, dtype: torch.dtype) -> RecurrentState | KVState:
    if isinstance(x, RecurrentState):
        return RecurrentState(x.conv.to(dtype), x.state)
    return KVState(x.keys.to(dtype), x.values.to(dtype))


def one_by_one(
    h: Tensor,
    blocks: Sequence[HybridBlock],
    passes: int = 1,
    states: Sequence[State] | None = None,
    feedback: Literal["raw", "reinject"] = "raw",
    conv_state: Literal["rewind", "carry"] = "rewind",
) -> Slept:
    """`sleep_blocks` module by module, on any device, for any type, recorded by autograd as it comes."""
    began = [None] * len(blocks) if states is None else list(states)
    out, after, changes = modules.run(blocks, h, began, passes, feedback == "reinject", conv_state == "carry")
    return Slept(out, after, changes)  # type: ignore[arg-type]


class _Recorded(torch.autograd.Function):
    """Passes of one call each; h and what blocks remember between them is kept, and each is run again backwards.

    With the weights of the forward, whatever blocks have by then: they may have been lent for that call only.
    """

    @staticmethod
    def forward(
        ctx: Any,
        blocks: Sequence[HybridBlock],
        states: list[State],
        how: _How,
        changes: Tensor,
        h: Tensor,
        *rest: Tensor,
    ) -> tuple[Tensor, ...]:
        left, kept = [h], []  # h as each pass leaves it, and what was carried into it

        def once(entry: Tensor, before: list[State]) -> tuple[Tensor, list[State], Tensor]:
            out, after, change = _run(entry, blocks, before, how._replace(passes=1))
            kept.append((left[-1], before))
            left.append(out)
            return out, list(after), change[0]

        _, now, changed = modules.repeat(once, h, states, *how)
        changes.copy_(changed)
        ctx.blocks, ctx.how, ctx.names = blocks, how, _names(blocks)
        ctx.numbers = [fitting.numbers_of(block) for block in blocks]
        # As saved tensors, and weights among them, so that torch sees it if they are written to before the backward.
        ctx.forms = [[None if s is None else type(s) for s in began] for _, began in [*kept, (h, states)]]
        began = [*kept, (h, states)]
        ctx.save_for_backward(*_parameters(blocks), *(t for x, before in began for t in (x, *_tensors_of(before))))
        return (left[-1], *_tensors_of(now))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        if ctx.numbers != [fitting.numbers_of(block) for block in ctx.blocks]:
            raise RuntimeError("numbers of the blocks, such as heads or eps, were changed between forward and backward")
        count = 1 + max(place for names in ctx.names for place in names.values())
        weights, tensors = list(ctx.saved_tensors[:count]), iter(ctx.saved_tensors[count:])
        began = [(next(tensors), [None if f is None else f(next(tensors), next(tensors)) for f in forms])
                 for forms in ctx.forms]  # fmt: skip
        *kept, (_, states) = began
        # Aliases, of which those for which nobody asks get no gradient.
        leaves = [t.detach().requires_grad_(n) for t, n in zip(weights, ctx.needs_input_grad[-count:], strict=True)]
        named = [{name: leaves[place] for name, place in names.items()} for names in ctx.names]
        with torch.autocast(grads[0].device.type, enabled=False):
            found = _differentiate(ctx.blocks, named, states, ctx.how, kept, grads, leaves)
        return (None, None, None, None, *found)


def _differentiate(
    blocks: Sequence[HybridBlock],
    named: Sequence[_Named],
    states: list[State],
    how: _How,
    kept: list[tuple[Tensor, list[State]]],
    grads: Sequence[Tensor],
    weights: list[Tensor],
) -> list[Tensor | None]:
    """Gradients of h, of all tensors in states, and of all weights, which blocks have by name."""
    wanted = [p for p in weights if p.requires_grad]
    lent = [partial(_with_weights, block, own) for block, own in zip(blocks, named, strict=True)]
    start = kept[0][0]
    dstart, dweights = torch.zeros_like(start), [torch.zeros_like(p) for p in wanted]
    dstates = [None if s is None else [torch.zeros_like(t) for t in s] for s in states]
    dh, dafter = grads[0], list(grads[1:])
    for n in reversed(range(how.passes)):
        h, before = kept[n]
        leaves = [h, start, *_tensors_of(before)]
        leaves = [t.detach().requires_grad_() for t in leaves]
        with torch.enable_grad():
            entry = modules.rms_normalize(leaves[0]) + leaves[1] if how.reinject and n > 0 else leaves[0]
            out, after = modules.one_pass(lent, entry, _filled(before, leaves[2:]))
        found = torch.autograd.grad([out, *_tensors_of(after)], [*leaves, *wanted], [dh, *dafter], allow_unused=True)
        dweights = [a if b is None else a + b for a, b in zip(dweights, found[len(leaves) :], strict=True)]
        dh = torch.zeros_like(h) if found[0] is None else found[0]
        dstart = dstart if found[1] is None else dstart + found[1]
        dafter = _pass_on(before, found[2 : len(leaves)], after, states, dstates, n, how.carry)
    by_weight = iter(dweights)
    return [
        dh + dstart,
        *(t for s in dstates if s is not None for t in s),
        *(next(by_weight) if p.requires_grad else None for p in weights),
    ]


def _with_weights(block: HybridBlock, named: _Named, *arguments: Any) -> Any:
    """The block's result with other parameters in the place of its own."""
    return functional_call(block, named, arguments)


def _names(blocks: Sequence[HybridBlock]) -> list[dict[str, int]]:
    """For each block by name the places of its parameters among all."""
    places = {p: i for i, p in enumerate(_parameters(blocks))}
    return [{name: places[p] for name, p in block.named_parameters()} for block in blocks]


def _parameters(blocks: Sequence[HybridBlock]) -> list[Tensor]:
    """Each once, though blocks may share some."""
    return list(dict.fromkeys(p for block in blocks for p in block.parameters()))


def _tensors_of(states: Sequence[State]) -> list[Tensor]:
    return [t for state in states if state is not None for t in state]


def _filled(states: Sequence[State], tensors: list[Tensor]) -> list[State]:
    """The same states with other tensors in them."""
    fresh = iter(tensors)
    return [None if s is None else type(s)(next(fresh), next(fresh)) for s in states]


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


def _paired(blocks: Sequence[HybridBlock], tensors: Sequence[Tensor]) -> list[RecurrentState | KVState]:
    pairs = zip(tensors[::2], tensors[1::2], strict=True)
    return [
        RecurrentState(*pair) if block.recurrent else KVState(*pair) for block, pair in zip(blocks, pairs, strict=True)
    ]
