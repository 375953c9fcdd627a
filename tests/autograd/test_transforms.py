"""Transforms of torch.func over every function: reverse mode is right to any order, alone and under vmap; forward mode
alone is refused, but over a patched model, which goes back to the functions it had."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.hf_models import build, tokens
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import sleepkern
from sleepkern import rules
from sleepkern.nn import SleepLM, gated_rms_norm, short_convolution, short_convolution_step
from sleepkern.rules import RULES, Rule
from sleepkern.sleep import sleep_blocks
from sleepkern.testing import Shape, call, make_inputs, relative_error

Loss = Callable[..., Tensor]
NAMES = ("q", "k", "v", "g", "beta", "initial_state")


def weighed(*results: Tensor | None) -> Tensor:
    """A number that hangs on every result, by second derivatives, too."""
    made = [t for t in results if t is not None]
    return torch.stack([(t * torch.linspace(0.5, 1, t.shape[-1], dtype=t.dtype)).sin().sum() for t in made]).sum()


def of_rule(rule: Rule, backend: str | None = None, packed: bool = False) -> tuple[Loss, list[Tensor]]:
    shape = Shape(H=1, HV=2, K=4, V=3, lengths=(3, 2)) if packed else Shape(B=2, T=5, H=1, HV=2, K=4, V=3)
    x = make_inputs(rule, shape, seed=1)
    names = [n for n in NAMES if x[n] is not None]

    def loss(*tensors: Tensor) -> Tensor:
        return weighed(*call(rule, {**x, **dict(zip(names, tensors, strict=True))}, backend))

    return loss, [x[n] for n in names]


def of_step(pool: bool) -> tuple[Loss, list[Tensor]]:
    x = make_inputs(rules.KDA, Shape(B=2, T=2, H=1, HV=2, K=4, V=3), seed=2)
    places = torch.tensor([1, -1]) if pool else None

    def loss(state: Tensor, *tensors: Tensor) -> Tensor:
        o, after = sleepkern.recurrent_step(*tensors, state * 1, rule=rules.KDA, state_indices=places)  # type: ignore[arg-type]
        return weighed(o, after)

    return loss, [x["initial_state"], *(x[n] for n in NAMES[:5])]


def of_replay(tol: float | None) -> tuple[Loss, list[Tensor]]:
    x = make_inputs(rules.GATED_DELTA_RULE, Shape(B=2, T=5, H=1, HV=2, K=4, V=3), seed=3)

    def loss(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> Tensor:
        r = sleepkern.sleep_ingest(k, v, g, beta, 3, q, state, tol, use_qk_l2norm_in_kernel=True)
        return weighed(r.output, r.final_state)

    return loss, [x[n] for n in NAMES]


def of_mixers() -> dict[str, tuple[Loss, list[Tensor]]]:
    generator = torch.Generator().manual_seed(4)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def packed(x: Tensor, weight: Tensor) -> Tensor:
        return weighed(*short_convolution(x[:1], weight, cu_seqlens=torch.tensor([0, 2, 5])))

    def step(x: Tensor, state: Tensor, weight: Tensor) -> Tensor:
        state = state * 1
        return weighed(short_convolution_step(x, state, weight), state)

    return {
        "convolution": (
            lambda *t: weighed(*short_convolution(*t)),
            [normal(2, 5, 4), normal(4, 3), normal(4), normal(2, 2, 4)],
        ),
        "packed convolution": (packed, [normal(2, 5, 4), normal(4, 3)]),
        "step of the convolution": (step, [normal(2, 4), normal(2, 4, 3), normal(4, 3)]),
        "norm": (lambda *t: weighed(gated_rms_norm(*t)), [normal(2, 5, 2, 4), normal(2, 5, 2, 4), normal(4)]),
    }  # fmt: skip


def of_blocks() -> tuple[Loss, list[Tensor]]:
    torch.manual_seed(0)
    lm = SleepLM(64, width=8, heads=2)
    return lambda h: weighed(sleep_blocks(h, lm.blocks(), passes=2).h), [torch.randn(1, 3, 8)]


CALLS: dict[str, tuple[Loss, list[Tensor]]] = {
    **{name: of_rule(rule) for name, rule in RULES.items()},
    "packed": of_rule(rules.GATED_DELTA_RULE, packed=True),
    "recurrent_step": of_step(False),
    "recurrent_step in a pool": of_step(True),
    "sleep_ingest": of_replay(None),
    "sleep_ingest with tol": of_replay(1e-3),
    **of_mixers(),
    "sleep_blocks": of_blocks(),
}


def eager(loss: Loss, tensors: list[Tensor]) -> list[Tensor]:
    leaves = [t.clone().requires_grad_() for t in tensors]
    return list(torch.autograd.grad(loss(*leaves), leaves))


def agree(ours: Any, true: Any, bound: float = 1e-4) -> None:
    for a, b in zip(ours, true, strict=True):
        assert a.shape == b.shape and relative_error(a, b) < bound


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", list(CALLS))
def test_reverse_mode(name: str) -> None:
    loss, tensors = CALLS[name]
    every = tuple(range(len(tensors)))
    true = eager(loss, tensors)
    agree(grad(loss, every)(*tensors), true)
    halves = [t / 2 for t in tensors]
    both = [torch.stack(pair) for pair in zip(tensors, halves, strict=True)]
    agree(vmap(grad(loss, every))(*both), map(torch.stack, zip(true, eager(loss, halves), strict=True)))
    agree([vmap(loss)(*both)], [torch.stack([loss(*tensors), loss(*halves)])])


@pytest.mark.parametrize("backend", ["cpu", "chunked", "reference"])
def test_by_name(backend: str) -> None:
    """The torch forms are asked for themselves, another backend is stood for by one of them."""
    loss, tensors = of_rule(rules.DELTA_RULE, backend)
    agree(grad(loss, (0, 1, 2, 3, 4))(*tensors), eager(loss, tensors))
    with pytest.raises(ValueError, match="backend: got 'triton', which cannot do this call"):
        grad(of_rule(rules.DELTA_RULE, "triton")[0])(*tensors)


def test_of_many_results() -> None:
    x = make_inputs(rules.GATED_DELTA_RULE, Shape(T=3, H=1, HV=1, K=4, V=3))

    def outputs(v: Tensor) -> Tensor:
        return sleepkern.gated_delta_rule(**{**x, "v": v})[0].flatten()

    true = torch.stack([eager(lambda v, i=i: outputs(v)[i], [x["v"]])[0] for i in range(9)])
    agree([jacrev(outputs)(x["v"])], [true])
    agree(vjp(outputs, x["v"])[1](torch.ones(9)), [true.sum(0)])


@pytest.mark.parametrize("name", ["delta_rule", "recurrent_step", "convolution", "norm"])
def test_second_order(name: str) -> None:
    loss, (first, *others) = CALLS[name]
    leaf = first.clone().requires_grad_()
    once = torch.autograd.grad(loss(leaf, *others), leaf, create_graph=True)[0]
    true = torch.stack([torch.autograd.grad(d, leaf, retain_graph=True)[0] for d in once.flatten()[:6]])
    for whole in (hessian(loss)(first, *others), jacrev(jacrev(loss))(first, *others)):
        agree([whole.flatten(0, first.dim() - 1)[:6]], [true])


@pytest.mark.parametrize("name", [name for name in CALLS if name != "sleep_blocks"])
def test_forward_mode_alone_is_refused(name: str) -> None:
    loss, tensors = CALLS[name]
    with pytest.raises(NotImplementedError, match="reverse mode only"):
        jvp(lambda x: loss(x, *tensors[1:]), (tensors[0],), (tensors[0],))
    with pytest.raises(NotImplementedError, match="reverse mode only"):
        jacfwd(lambda x: loss(x, *tensors[1:]))(tensors[0])
    value, tangent = jvp(lambda x: x.sum() + loss(*tensors), (tensors[0],), (tensors[0],))  # of what has no tangent
    agree([tangent], [tensors[0].sum()])


def test_values_are_checked_under_transforms() -> None:
    loss, (q, k, v, g, beta, state) = CALLS["gated_delta_rule"]
    both = torch.stack([g, -g])
    with pytest.raises(ValueError, match="^g: got a log decay of"):
        vmap(grad(loss), (None, None, None, 0, None, None))(q, k, v, both, beta, state)

    def unnormalised(k: Tensor, beta: Tensor) -> Tensor:
        return weighed(sleepkern.sleep_ingest(k, v, g, beta, 3).final_state)

    with pytest.raises(ValueError, match="^beta: got beta"):
        vmap(grad(unnormalised), (0, None))(torch.stack([k, 3 * k]), beta + 0.5)


def test_offsets_that_differ_between_samples_are_refused() -> None:
    offsets = torch.tensor([[0, 3, 5], [0, 2, 5]])
    x = make_inputs(rules.KDA, Shape(H=1, HV=2, K=4, V=3, lengths=(3, 2)))

    def loss(v: Tensor, cu_seqlens: Tensor) -> Tensor:
        return weighed(*call(rules.KDA, {**x, "v": v, "cu_seqlens": cu_seqlens}))

    with pytest.raises(ValueError, match="^cu_seqlens: got offsets for each sample of vmap"):
        vmap(grad(loss), (None, 0))(x["v"], offsets)
    alone = vmap(loss, (None, 0))(x["v"], offsets)  # each sample is a call of its own
    agree([alone], [torch.stack([loss(x["v"], one) for one in offsets])])


def test_in_a_compiled_graph() -> None:
    x = make_inputs(rules.GATED_DELTA_RULE, Shape(T=5, K=4, V=3))

    def loss(k: Tensor) -> Tensor:
        return weighed(sleepkern.sleep_ingest(**{**x, "k": k}, passes=2).final_state)

    torch.compiler.reset()
    agree([torch.compile(grad(loss), fullgraph=True, backend="eager")(x["k"])], [grad(loss)(x["k"])])


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("family", ["qwen3_5", "mamba2"])
def test_patched_models(family: str) -> None:
    """With the attention that has forward mode; the one that models take else has none."""
    model, ids = build(family, attn_implementation="eager"), tokens(2, 9)
    parameters = {n: p.detach() for n, p in model.named_parameters()}
    looked_at = [n for n in parameters if "layers.0." in n and n.endswith(("A_log", "conv1d.weight", "dt_bias"))]
    wanted = {n: parameters[n] for n in looked_at}
    assert wanted

    def loss(some: dict[str, Tensor], row: Tensor) -> Tensor:
        out = functional_call(model, {**parameters, **some}, (row[None],), {"use_cache": False}).logits
        return nn.functional.cross_entropy(out[0, :-1], row[1:])

    def derivatives() -> list[Tensor]:
        samples = vmap(grad(loss), (None, 0))(wanted, ids)
        along = jvp(lambda some: loss(some, ids[0]), (wanted,), (wanted,))
        return [*samples.values(), *along]

    stock = derivatives()
    with sleepkern.patch(model):
        agree(derivatives(), stock)
