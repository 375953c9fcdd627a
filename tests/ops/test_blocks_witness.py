"""Blocks that were changed between two calls: a witness of what they were is not believed, whatever was changed."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from helpers.block_stacks import all_of, model
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.nn.utils import parametrize

from sleepkern.backends.native import witness
from sleepkern.backends.native.witness import known_layers
from sleepkern.nn import GatedDeltaNet, HybridBlock, SleepLM
from sleepkern.ops import blocks as ops
from sleepkern.sleep.blocks import forget_packed, one_by_one, sleep_blocks
from sleepkern.testing import relative_error
from sleepkern.testing.tolerances import BLOCKS

pytestmark = pytest.mark.skipif(not witness._usable, reason="this torch has no exchange table of tensors")
_MEMORY = np.zeros((24, 24), dtype=np.float32)
"""The storage that weights of several owners take in turn, so that they have one address."""


def placed(seed: int) -> Tensor:
    """Other numbers at the same address, in a storage of its own."""
    _MEMORY[:] = np.random.default_rng(seed).standard_normal(_MEMORY.shape)
    return torch.from_numpy(_MEMORY)


def made() -> tuple[SleepLM, Tensor]:
    lm = model(24, 2, {})
    lm.blocks()[0].mixer.out.weight = nn.Parameter(placed(0))
    lm.blocks()[1].mlp_norm.weight = nn.Parameter(torch.rand(48)[:24])
    return lm, torch.randn(2, 9, 24)


def known(lm: SleepLM, h: Tensor) -> bool:
    """Calls until what was read of the blocks is remembered, and whether it is."""
    for _ in range(2):
        sleep_blocks(h, lm.blocks())
    return known_layers(lm.blocks(), h) is not None


def attempt(run: Callable[[], Any]) -> list[Tensor] | str:
    try:
        return all_of(run())
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def equal(a: list[Tensor] | str, b: list[Tensor] | str) -> bool:
    if isinstance(a, str) or isinstance(b, str):
        return a == b
    return all(x.dtype == y.dtype and torch.allclose(x, y, rtol=1e-5, atol=1e-6) for x, y in zip(a, b, strict=True))


def afresh(lm: SleepLM, h: Tensor, run: Callable[[], Any]) -> list[Tensor] | str:
    """The result without anything that was remembered."""
    forget_packed(lm.blocks())
    with mock.patch.object(ops, "known_layers", return_value=None):
        return attempt(run)


def of_block(n: int, path: str) -> Callable[[SleepLM], Any]:
    return lambda lm: lm.get_submodule(f"layers.{n}.{path}")


OUT, UP, RATES, NORM = (
    of_block(0, "mixer.out"),
    of_block(2, "mlp.up"),
    of_block(1, "mixer.rates"),
    of_block(1, "mlp_norm"),
)
Change = Callable[[SleepLM, ExitStack], Any]


def set_to(part: Callable[[SleepLM], Any], name: str, value: Any) -> Change:
    return lambda lm, _: setattr(part(lm), name, value)


def weight_to(part: Callable[[SleepLM], Any], value: Callable[[Tensor], Tensor]) -> Change:
    """Another tensor of the parameter's `.data`."""

    def change(lm: SleepLM, _: ExitStack) -> None:
        part(lm).weight.data = value(part(lm).weight.detach())

    return change


def written(lm: SleepLM, _: ExitStack) -> None:
    with torch.no_grad():
        UP(lm).weight.mul_(2)


def replaced(lm: SleepLM, _: ExitStack) -> None:
    UP(lm).weight = nn.Parameter(2 * UP(lm).weight.detach())


def replaced_at_its_address(lm: SleepLM, _: ExitStack) -> None:
    OUT(lm).weight = None
    gc.collect()
    OUT(lm).weight = nn.Parameter(placed(1))


def data_in_another_storage(lm: SleepLM, _: ExitStack) -> None:
    OUT(lm).weight.data = torch.empty(0)
    OUT(lm).weight.data = placed(1)


def wrapped_anew(lm: SleepLM, _: ExitStack) -> None:
    """The count of writes starts at 0 again, on memory that was written to."""
    with torch.no_grad():
        OUT(lm).weight.mul_(2)
    alias = OUT(lm).weight.data
    OUT(lm).weight = None
    OUT(lm).weight = nn.Parameter(alias)


def swapped(lm: SleepLM, _: ExitStack) -> None:
    torch.utils.swap_tensors(UP(lm).weight, nn.Parameter(UP(lm).weight.detach() * 2))


def swapped_on_its_memory(lm: SleepLM, _: ExitStack) -> None:
    """The same object and memory, and as many writes, but not all of them counted there."""
    weight, alias = UP(lm).weight, nn.Parameter(UP(lm).weight.data)
    with torch.no_grad():
        for _ in range(weight._version):
            alias.mul_(1)
        weight.mul_(2)
    torch.utils.swap_tensors(weight, alias)


def made_in_inference_mode(lm: SleepLM, _: ExitStack) -> None:
    with torch.inference_mode():
        UP(lm).weight = nn.Parameter(UP(lm).weight.clone())


def freed(lm: SleepLM, _: ExitStack) -> None:
    UP(lm).weight.untyped_storage().resize_(0)


def part_anew(lm: SleepLM, _: ExitStack) -> None:
    """Modules that may get the addresses of those in whose place they are."""
    del lm.layers[2].mlp.up
    gc.collect()
    lm.layers[2].mlp.up = nn.Linear(24, 72, bias=False)


def weight_hook(lm: SleepLM, _: ExitStack) -> None:
    UP(lm).weight.register_hook(lambda g: 2 * g)


def other_class(lm: SleepLM, _: ExitStack) -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    UP(lm).__class__ = Doubled


def other_block_class(lm: SleepLM, _: ExitStack) -> None:
    class Doubled(HybridBlock):
        def forward(self, *given: Any) -> Any:
            h, state = super().forward(*given)
            return 2 * h, state

    lm.layers[1].__class__ = Doubled


def parametrised(lm: SleepLM, _: ExitStack) -> None:
    class Double(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            return 2 * w

    parametrize.register_parametrization(UP(lm), "weight", Double())


def patched(on: Any, name: str, value: Any) -> Change:
    return lambda lm, stack: stack.enter_context(mock.patch.object(on, name, value, create=True))


def global_hook(register: Callable[..., Any]) -> Change:
    return lambda lm, stack: stack.callback(register(lambda module, *given: None).remove)


_linear = nn.Linear.forward
CHANGES: dict[str, Change] = {
    "nothing": lambda lm, _: None,
    "written in place": written,
    "replaced": replaced,
    "replaced at its address": replaced_at_its_address,
    "data in another storage": data_in_another_storage,
    "data elsewhere": weight_to(UP, lambda t: 2 * t),
    "data elsewhere in its storage": weight_to(NORM, lambda t: t.as_strided((24,), (1,), 24)),
    "wrapped anew": wrapped_anew,
    "swapped": swapped,
    "swapped on its memory": swapped_on_its_memory,
    "transposed": weight_to(OUT, lambda t: t.T),
    "resized": weight_to(UP, lambda t: t.repeat(2, 1)),
    "resized in its memory": weight_to(UP, lambda t: t[:40]),
    "one dimension more": weight_to(UP, lambda t: t[None]),
    "another type": weight_to(UP, lambda t: t.bfloat16()),
    "another type at its address": weight_to(UP, lambda t: t.view(torch.bfloat16).as_strided((72, 24), (24, 1))),
    "all of another type": lambda lm, _: lm.bfloat16(),
    "on another device": lambda lm, _: lm.to("meta"),
    "opposite in memory": weight_to(UP, lambda t: torch._neg_view(t)),
    "freed": freed,
    "made in inference mode": made_in_inference_mode,
    "a plain tensor": lambda lm, _: UP(lm)._parameters.update(weight=2 * UP(lm).weight.detach()),
    "none": set_to(UP, "weight", None),
    "a bias": lambda lm, _: UP(lm).register_parameter("bias", nn.Parameter(torch.ones(72))),
    "another parameter": lambda lm, _: UP(lm).register_parameter("more", nn.Parameter(torch.ones(72))),
    "a buffer": lambda lm, _: UP(lm).register_buffer("more", torch.ones(72)),
    "a hook of a weight": weight_hook,
    "a forward hook": lambda lm, _: UP(lm).register_forward_hook(lambda m, x, y: 2 * y),
    "a forward hook before": lambda lm, _: UP(lm).register_forward_pre_hook(lambda m, x: (2 * x[0],)),
    "a backward hook": lambda lm, _: UP(lm).register_full_backward_hook(lambda m, x, y: None),
    "a backward hook before": lambda lm, _: UP(lm).register_full_backward_pre_hook(lambda m, y: None),
    "a global hook": global_hook(register_module_forward_hook),
    "a global hook before": global_hook(register_module_forward_pre_hook),
    "a part anew": part_anew,
    "a part of another class": lambda lm, _: setattr(lm.layers[2].mlp, "up", nn.Identity()),
    "no part": lambda lm, _: setattr(lm.layers[2].mlp, "up", None),
    "one part more": lambda lm, _: setattr(lm.layers[2].mlp, "more", nn.Identity()),
    "parts exchanged": lambda lm, _: lm.layers[1]._modules.update(
        mlp_norm=lm.layers[1].mixer_norm, mixer_norm=lm.layers[1].mlp_norm),
    "another class": other_class,
    "another class of a block": other_block_class,
    "parametrised": parametrised,
    "forward of an instance": lambda lm, _: setattr(UP(lm), "forward", lambda x: 2 * _linear(UP(lm), x)),
    "forward of a class": patched(nn.Linear, "forward", lambda self, x: 2 * _linear(self, x)),
    "_recur of an instance": lambda lm, _: setattr(
        lm.layers[1].mixer, "_recur", lambda *given: GatedDeltaNet._recur(lm.layers[1].mixer, *given)),
    "layer_weights of a class": patched(HybridBlock, "layer_weights", lambda self: "as a test says"),
    "a property in the place of a number": patched(GatedDeltaNet, "decay_bias", property(lambda self: 1.0)),
    "eps": set_to(NORM, "eps", 0.3),
    "eps of torch's choice": set_to(NORM, "eps", 1e-5),
    "eps that is none": set_to(NORM, "eps", "small"),
    "decay_bias": set_to(of_block(1, "mixer"), "decay_bias", 1.0),
    "strength": set_to(of_block(1, "mixer"), "strength", 2.0),
    "heads": set_to(of_block(0, "mixer"), "heads", 4),
    "heads of a kind that is none": set_to(of_block(0, "mixer"), "heads", 2.0),
    "split": set_to(of_block(1, "mixer"), "split", (24, 23, 25)),
    "normalized_shape": set_to(NORM, "normalized_shape", (12,)),
    "evaluated": lambda lm, _: lm.eval(),
    "a note": set_to(UP, "note", "of the caller"),
}  # fmt: skip
HARMLESS = ("nothing", "a global hook", "a global hook before")
"""Changes that the witness need not see: none of the blocks, and what each call looks at beside it."""


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_stack_is_read_anew(name: str) -> None:
    lm, h = made()
    assert known(lm, h)
    with ExitStack() as stack:
        CHANGES[name](lm, stack)
        assert (known_layers(lm.blocks(), h) is not None) is (name in HARMLESS)
        found = [attempt(lambda: sleep_blocks(h, lm.blocks())) for _ in range(4)]
        assert all(equal(one, afresh(lm, h, lambda: sleep_blocks(h, lm.blocks()))) for one in found)
        refusals = [attempt(lambda: sleep_blocks(h, lm.blocks(), backend="cpu")) for _ in range(2)]
        assert all(equal(one, afresh(lm, h, lambda: sleep_blocks(h, lm.blocks(), backend="cpu"))) for one in refusals)
    if isinstance(found[0], list):
        with ExitStack() as stack:
            lm, again = made()
            CHANGES[name](lm, stack)
            assert relative_error(found[0][0], one_by_one(h, lm.blocks()).h.double()) < BLOCKS


def test_other_stacks_with_the_same_first_block() -> None:
    lm, h = made()
    assert known(lm, h)
    first, second, third = lm.blocks()
    for stack in ([first, third, second], [first, second], [first], [first, second, second], [first, second, third]):
        for _ in range(3):
            found = sleep_blocks(h, stack).h
            assert relative_error(found, one_by_one(h, stack).h.double()) < BLOCKS


def test_blocks_at_the_addresses_of_others() -> None:
    """The first block stays, and the others are made anew again and again."""
    lm, h = made()
    for seed in range(5):
        assert known(lm, h)
        del lm.layers[2], lm.layers[1]
        gc.collect()
        torch.manual_seed(seed)
        lm.layers.extend(model(24, 2, {}, "GA", 2).layers)
        assert known_layers(lm.blocks(), h) is None
        assert relative_error(sleep_blocks(h, lm.blocks()).h, one_by_one(h, lm.blocks()).h.double()) < BLOCKS


def test_windows_of_another_type_or_device() -> None:
    lm, h = made()
    assert known(lm, h)
    assert known_layers(lm.blocks(), h.bfloat16()) is None
    assert known_layers(lm.blocks(), h.to("meta")) is None
    with pytest.raises(ValueError, match="weights are torch.float32 on cpu, h is torch.bfloat16"):
        sleep_blocks(h.bfloat16(), lm.blocks(), backend="cpu")


def test_the_record_itself_compares_the_list() -> None:
    lm, h = made()
    assert known(lm, h)
    blocks = lm.blocks()
    record = witness._witnesses[blocks[0]][3]._record
    assert record.holds(blocks) and record.holds(tuple(blocks))
    for others in (blocks[:2], [*blocks, blocks[0]], [], 3, None, iter(blocks), [*blocks[:2], 3]):
        assert not record.holds(others)


def test_nothing_is_kept_alive() -> None:
    lm, h = made()
    assert known(lm, h)
    part, weight = torch.utils.weak.WeakTensorKeyDictionary(), UP(lm).weight
    part[weight] = True
    del weight
    UP(lm).weight = nn.Parameter(torch.randn(72, 24))
    gc.collect()
    assert not list(part.keys())
    stack = len(witness._witnesses)
    del lm
    gc.collect()
    assert len(witness._witnesses) == stack - 1


def test_calls_read_no_weights_in_the_steady_state() -> None:
    lm, h = made()
    assert known(lm, h)
    reads = mock.Mock(wraps=witness.layers_of)
    with mock.patch("sleepkern.problems.blocks.layers_of", reads), mock.patch.object(witness, "layers_of", reads):
        sleep_blocks(h, lm.blocks(), passes=3)
    assert reads.call_count == 0


def test_weights_that_change_at_each_call_are_not_recorded_at_each_call() -> None:
    """Weights that change with each call get no record, which would cost time and never be of use."""
    lm, h = made()
    with mock.patch.object(witness, "Witness", wraps=witness.Witness) as recorded:
        for _ in range(4):
            sleep_blocks(h, lm.blocks())
            UP(lm).weight.mul_(1.1)
    assert recorded.call_count == 0


def test_the_record_refuses_what_it_cannot_watch() -> None:
    lm, _ = made()
    block = lm.layers[0]
    weights = [p.detach() for p in block.parameters()]
    with pytest.raises(ValueError, match="a parameter that is not among the weights"):
        witness._C.ModuleWitness([block], list(block.modules()), weights, weights, ["forward"])
    with pytest.raises(ValueError, match="weights without a counter each"):
        witness._C.ModuleWitness([block], list(block.modules()), weights, [], ["forward"])
    parameters, other = list(block.parameters()), torch.ones(2).mul_(2)
    with pytest.raises(ValueError, match="a weight with another's counter"):
        witness._C.ModuleWitness([block], list(block.modules()), parameters, [other] * len(parameters), [])
    with pytest.raises(ValueError, match="a weight that is not plain"):
        witness._C.ModuleWitness([block], [], [None], [None], [])
    with pytest.raises(ValueError, match="a name that is no string"):
        witness._C.ModuleWitness([], [], [], [], [1])
    with pytest.raises((TypeError, ValueError)):
        witness._C.ModuleWitness([3], [3], [], [], [])
