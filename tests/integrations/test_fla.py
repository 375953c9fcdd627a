"""flash-linear-attention's functions over ours."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.hf_models import CLOSE
from torch import Tensor
from torch.nn import functional as F

import sleepkern
from sleepkern.integrations import fla
from sleepkern.rules import DELTA_RULE, GATED_DELTA_RULE, GLA, KDA, SIMPLE_GLA, Rule
from sleepkern.testing import Shape, call, make_inputs, relative_error, to_float64
from sleepkern.testing.tolerances import REORDERED_DOUBLE, SAME_SUMS

SHAPE = Shape(B=2, T=70, H=2, HV=2, K=24, V=40)
NAMES = {
    GATED_DELTA_RULE: "gated_delta_rule", KDA: "kda", DELTA_RULE: "delta_rule", SIMPLE_GLA: "simple_gla", GLA: "gla",
}  # fmt: skip


def inputs(rule: Rule) -> dict[str, Any]:
    x = make_inputs(rule, SHAPE)
    if not rule.delta:
        x["beta"] = None  # fla's have none
    return x


def named(rule: Rule, form: str, x: dict[str, Any]) -> dict[str, Any]:
    given = {name: x[name] for name in ("q", "k", "v", "g", "beta", "initial_state") if x[name] is not None}
    if rule is GLA and form == "fused_recurrent":
        given["gk"] = given.pop("g")
    return {**given, "output_final_state": True}


@pytest.mark.parametrize("form", ["chunk", "fused_recurrent"])
@pytest.mark.parametrize("rule", NAMES, ids=lambda r: r.name)
def test_functions_by_flas_names(rule: Rule, form: str) -> None:
    x = inputs(rule)
    o, state = getattr(fla, f"{form}_{NAMES[rule]}")(**named(rule, form, x), chunk_size=64, autotune_interval=8)
    expected_o, expected_state = call(rule, to_float64(x), "reference")
    assert relative_error(o, expected_o) <= CLOSE and relative_error(state, expected_state) <= CLOSE


@pytest.mark.parametrize("doubled", [True, False])
def test_gates_inside(doubled: bool) -> None:
    x, generator = inputs(GATED_DELTA_RULE), torch.Generator().manual_seed(2)
    raw, A_log, bias = (torch.randn(*size, generator=generator) for size in ((2, 70, 2), (2,), (2,)))
    logits = torch.randn(2, 70, 2, generator=generator)
    options = {"use_beta_sigmoid_in_kernel": True, "allow_neg_eigval": doubled, "use_qk_l2norm_in_kernel": True}
    gate = {"use_gate_in_kernel": True, "A_log": A_log, "dt_bias": bias}
    given = {**named(GATED_DELTA_RULE, "chunk", x), "g": raw, "beta": logits, **options, **gate}
    x["g"], x["beta"] = -A_log.exp() * F.softplus(raw + bias), (1 + doubled) * logits.sigmoid()
    expected, _ = call(GATED_DELTA_RULE, to_float64(x), "reference", use_qk_l2norm_in_kernel=True)
    for function in (fla.chunk_gated_delta_rule, fla.fused_recurrent_gated_delta_rule):
        assert relative_error(function(**given)[0], expected) <= CLOSE


@pytest.mark.parametrize("lower_bound", [None, -5.0])
def test_gates_of_channels_inside(lower_bound: float | None) -> None:
    x, generator = inputs(KDA), torch.Generator().manual_seed(2)
    raw, A_log, bias = (torch.randn(*size, generator=generator) for size in ((2, 70, 2, 24), (2,), (48,)))
    gate = {"use_gate_in_kernel": True, "A_log": A_log, "dt_bias": bias, "lower_bound": lower_bound}
    given = {**named(KDA, "chunk", x), "g": raw, **gate}
    shifted, rate = raw + bias.view(2, 24), A_log.exp()[:, None]
    x["g"] = -rate * F.softplus(shifted) if lower_bound is None else lower_bound * torch.sigmoid(rate * shifted)
    expected, _ = call(KDA, to_float64(x), "reference")
    for function in (fla.chunk_kda, fla.fused_recurrent_kda):
        assert relative_error(function(**given)[0], expected) <= CLOSE


def test_states_with_values_first() -> None:
    x = inputs(GATED_DELTA_RULE)
    given = named(GATED_DELTA_RULE, "chunk", x)
    o, state = fla.chunk_gated_delta_rule(**given)
    given["initial_state"] = given["initial_state"].transpose(-1, -2).contiguous()
    o_first, state_first = fla.chunk_gated_delta_rule(**given, state_v_first=True)
    assert torch.equal(o, o_first) and torch.equal(state, state_first.transpose(-1, -2))


def test_decay_by_head_and_channel_or_none() -> None:
    x = inputs(KDA)
    head = -0.1 * torch.rand(2, 70, 2)
    given = named(KDA, "chunk", x)
    gk = given.pop("g")
    expected, _ = call(KDA, to_float64({**x, "g": gk + head[..., None]}), "reference")
    assert relative_error(fla.fused_recurrent_gated_delta_rule(**given, g=head, gk=gk)[0], expected) <= CLOSE
    gamma = torch.tensor([-0.1, -0.5])
    x = inputs(SIMPLE_GLA)
    given = named(SIMPLE_GLA, "chunk", x)
    expected, _ = call(SIMPLE_GLA, to_float64({**x, "g": gamma.expand(2, 70, 2)}), "reference")
    del given["g"]
    assert relative_error(fla.chunk_simple_gla(**given, g_gamma=gamma)[0], expected) <= CLOSE
    none = fla.chunk_simple_gla(**given)[0]
    assert relative_error(none, fla.chunk_gla(**given)[0]) <= CLOSE


@pytest.mark.parametrize(
    ("name", "value"),
    [("gv", torch.ones(2)), ("reverse", True), ("cp_context", object())],
)
def test_what_changes_the_result_is_refused(name: str, value: Any) -> None:
    x = inputs(GLA)
    with pytest.raises(ValueError, match=f"{name}: got .* expected None or False"):
        fla.fused_recurrent_gla(**{**named(GLA, "fused_recurrent", x), name: value})


@pytest.mark.parametrize("v_first", [False, True], ids=["kv", "vk"])
@pytest.mark.parametrize("lengths", [None, (64, 0, 70, 1)], ids=["batch", "packed"])
def test_states_before_each_chunk(lengths: tuple[int, ...] | None, v_first: bool) -> None:
    x = make_inputs(KDA, Shape(B=2, T=70, H=1, HV=2, K=16, V=8, lengths=lengths))
    given = {**named(KDA, "chunk", x), "cu_seqlens": x["cu_seqlens"]}
    if v_first:
        given["initial_state"] = given["initial_state"].transpose(-1, -2)
    o, S, h = fla.chunk_kda(**given, return_intermediate_states=True, state_v_first=v_first, chunk_size=32)
    o_expected, S_expected, states = call(KDA, to_float64(x), "reference", state_every=32)
    offsets = torch.tensor([0, 70]) if x["cu_seqlens"] is None else x["cu_seqlens"]
    counts = -(-offsets.diff() // 32)
    ends = [0, *counts.cumsum(0).tolist()]
    expected = states.roll(1, 1)
    for i, (first, last) in enumerate(zip(ends, ends[1:], strict=False)):
        if last > first:
            expected[:, first] = x["initial_state"] if lengths is None else x["initial_state"][i]
    assert relative_error(h.transpose(-1, -2) if v_first else h, expected) <= CLOSE
    assert relative_error(o, o_expected) <= CLOSE
    assert relative_error(S.transpose(-1, -2) if v_first else S, S_expected) <= CLOSE


@pytest.mark.parametrize("name", [name for name in fla.FUNCTIONS if not name.endswith("gate")])
def test_a_keyword_that_nobody_knows_is_refused(name: str) -> None:
    x = inputs(KDA if "kda" in name else GLA)
    given = {"q": x["q"], "k": x["k"], "v": x["v"]}
    given |= {"g": x["g"], "beta": torch.ones(2, 70, 2)} if "kda" in name else {}
    given |= {"layer_idx": 0, "num_layers": 2} if "lightning" in name else {}
    for unknown in ("cu_seqlen", "offsets", "ssm_state_indices"):
        with pytest.raises(TypeError, match=f"{unknown}: got an unknown keyword"):
            fla.FUNCTIONS[name](**given, **{unknown: torch.tensor([0, 70])})


def test_arguments_that_fla_refuses() -> None:
    x = inputs(KDA)
    given = named(KDA, "chunk", x)
    with pytest.raises(ValueError, match="chunk_size: got 16; expected one of 32, 64"):
        fla.chunk_kda(**given, chunk_size=16)
    with pytest.raises(ValueError, match="allow_neg_eigval: got True"):
        fla.chunk_kda(**given, allow_neg_eigval=True)
    with pytest.raises(ValueError, match="transpose_state_layout: got it beside state_v_first"):
        fla.chunk_kda(**given, transpose_state_layout=True, state_v_first=True)
    with pytest.raises(ValueError, match="beta: got shape .* expected one number a head"):
        fla.fused_recurrent_kda(**{**given, "beta": torch.ones(2, 70, 2, 40)})
    given["initial_state"] = given["initial_state"].transpose(-1, -2).contiguous()
    with pytest.warns(DeprecationWarning, match="use state_v_first"):
        old = fla.chunk_kda(**given, transpose_state_layout=True)[1]
    assert torch.equal(old, fla.chunk_kda(**given, state_v_first=True)[1])


@pytest.mark.parametrize("form", ["chunk", "fused_recurrent"])
@pytest.mark.parametrize("rule", NAMES, ids=lambda r: r.name)
def test_float64_with_a_state(rule: Rule, form: str) -> None:
    x = to_float64(inputs(rule))
    o, state = getattr(fla, f"{form}_{NAMES[rule]}")(**named(rule, form, x))
    expected_o, expected_state = call(rule, x, "reference")
    assert o.dtype == state.dtype == torch.float64
    assert relative_error(o, expected_o) < 1e-12 and relative_error(state, expected_state) < 1e-12


def test_gates_are_as_precise_as_their_inputs() -> None:
    """The sigmoid of beta in float32 whatever its type, gates in float64 where they are given so."""
    x = inputs(KDA)
    logits = torch.randn(2, 70, 2, generator=torch.Generator().manual_seed(3)).bfloat16()
    given = {**named(KDA, "chunk", x), "beta": logits, "use_beta_sigmoid_in_kernel": True}
    expected = fla.chunk_kda(**{**named(KDA, "chunk", x), "beta": logits.double().sigmoid().float()})[0]
    assert relative_error(fla.chunk_kda(**given)[0], expected) < SAME_SUMS
    raw, A_log, bias = torch.randn(5, 2, 24).double(), torch.randn(2).double(), torch.randn(48).double()
    expected = -A_log.exp()[:, None] * F.softplus(raw + bias.view(2, 24))
    assert relative_error(fla.fused_kda_gate(raw, A_log, bias, output_dtype=torch.float64), expected) < REORDERED_DOUBLE
    head = fla.fused_gdn_gate(raw[..., 0], A_log, bias[:2])
    assert head.dtype == torch.float32
    assert relative_error(head, -A_log.exp() * F.softplus(raw[..., 0] + bias[:2])) < SAME_SUMS


def test_types_that_differ_states_without_a_batch_and_offsets_as_a_list() -> None:
    x = make_inputs(SIMPLE_GLA, Shape(T=70, H=2, HV=2, K=24, V=40))
    given = {name: x[name] for name in ("q", "k", "v", "g", "initial_state")}
    whole, S = fla.chunk_simple_gla(**given, output_final_state=True)
    half = {**given, "v": given["v"].half()}
    o, _ = fla.fused_recurrent_simple_gla(**half)
    assert o.dtype == torch.float16
    assert relative_error(o, fla.chunk_simple_gla(**{**given, "v": half["v"].float()})[0]) < 1e-3
    bare = {**given, "initial_state": given["initial_state"][0]}
    o, state = fla.chunk_simple_gla(**bare, output_final_state=True)
    assert torch.equal(o, whole) and torch.equal(state, S)
    offsets = [0, 20, 50]
    short = {**given, "initial_state": torch.cat([given["initial_state"]] * 2)}
    o, state = fla.chunk_simple_gla(**short, cu_seqlens=offsets, output_final_state=True)
    cut = {name: t[:, :50] for name, t in short.items() if name != "initial_state"}
    expected, last = sleepkern.simple_gla(
        **cut, initial_state=short["initial_state"], cu_seqlens=torch.tensor(offsets), output_final_state=True
    )
    assert o.shape == whole.shape and not o[:, 50:].any()
    assert torch.equal(o[:, :50], expected) and torch.equal(state, last)


def decay_of(name: str) -> Tensor:
    """log decay [H] of the functions whose decay is fixed."""
    if "retention" in name:
        return torch.log(1 - torch.tensor([2.0**-5, 2.0**-6], dtype=torch.float64))
    return torch.tensor([0.0, -8 / 2 * (1 - 1 / 4)]).double() if "lightning" in name else torch.zeros(2).double()


@pytest.mark.parametrize(
    "name", [n for n in fla.FUNCTIONS if n.endswith(("retention", "lightning_attn", "linear_attn"))]
)
def test_rules_of_fixed_decay(name: str) -> None:
    x = inputs(SIMPLE_GLA)
    q, k, v, state = (x[n].double() for n in ("q", "k", "v", "initial_state"))
    g = decay_of(name).expand(2, 70, 2)
    parallel = name.startswith("parallel")
    given: dict[str, Any] = {} if parallel else {"initial_state": x["initial_state"], "output_final_state": True}
    given |= {"layer_idx": 1, "num_layers": 4} if "lightning" in name else {}
    given |= {"normalize": False} if "linear_attn" in name else {}
    o, final = fla.FUNCTIONS[name](x["q"], x["k"], x["v"], **given)
    expected, S = sleepkern.simple_gla(
        q, k, v, g, initial_state=None if parallel else state, output_final_state=True, backend="reference"
    )
    assert relative_error(o, expected) <= CLOSE
    assert final is None if parallel else relative_error(final, S) <= CLOSE


def test_linear_attention_divided_by_the_sum_of_keys() -> None:
    """In two pieces, the state and the sum of keys handed on, and packed."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.rand(1, 30, 2, width, generator=generator) for width in (8, 8, 5))
    scores = torch.einsum("bthk,bshk->bhts", q, k).double().tril()
    expected = torch.einsum("bhts,bshv->bthv", scores / scores.sum(-1, keepdim=True), v.double())
    first, state = fla.chunk_linear_attn(q[:, :13], k[:, :13], v[:, :13], output_final_state=True)
    second, (S, z) = fla.fused_recurrent_linear_attn(
        q[:, 13:], k[:, 13:], v[:, 13:], initial_state=state, output_final_state=True, normalize=True
    )
    assert relative_error(torch.cat([first, second], 1), expected) <= CLOSE
    assert relative_error(z, k.double().sum(1, keepdim=True)) <= CLOSE and S.shape == (1, 2, 8, 5)
    o, (none, z) = fla.chunk_linear_attn(q, k, v, cu_seqlens=torch.tensor([0, 13, 30]))
    assert none is None and z.shape == (2, 1, 2, 8) and relative_error(o[:, :13], first) <= CLOSE


def test_calls_that_are_not_ours_go_back_to_the_original(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where fla's kernels run; on a CPU, where they do not, ours says what is wrong."""
    taken = []

    def chunk_gla(*args: Any, **kwargs: Any) -> str:
        taken.append((args, kwargs))
        return "original"

    chunk_gla.__module__ = "fla.ops.gla"
    x = inputs(GLA)
    function = fla.replacement_of(chunk_gla)
    assert function is not None
    with pytest.raises(TypeError, match="offsets: got an unknown keyword"):
        function(x["q"], x["k"], x["v"], x["g"], offsets=torch.tensor([0, 70]))
    assert fla.replacement_of(test_float64_with_a_state) is None and not taken
    monkeypatch.setattr(fla, "_reason_for_fla", fla.why_not)  # as for tensors on a GPU
    for given in ({"offsets": torch.tensor([0, 70])}, {"cp_context": object()}):
        assert function(x["q"], x["k"], x["v"], x["g"], **given) == "original"
    o, _ = function(x["q"], x["k"], x["v"], x["g"], chunk_size=64)
    assert isinstance(o, Tensor) and len(taken) == 2
    with pytest.warns(DeprecationWarning, match="fla.stands_for is sleepkern.integrations.fla.replacement_of"):
        assert fla.stands_for is fla.replacement_of
    recurrent = fla.FUNCTIONS["fused_recurrent_gla"]
    q, k, v, g = (x[n] for n in ("q", "k", "v", "g"))
    assert fla.why_not(recurrent, q, k, v, g, g) == "gv is not done here"
    assert fla.why_not(recurrent, q, k, v, g, None, None, None, False, True) == "reverse is not done here"
    assert fla.why_not(recurrent, q, k) is not None
    wide = torch.ones(2, 70, 2, 40)
    assert (
        fla.why_not(fla.fused_recurrent_gated_delta_rule, q, k, v, beta=wide)
        == "beta has an element for each value channel"
    )
