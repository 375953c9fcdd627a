"""Calls in the words of serving engines, against sleepkern's reference on states that are gathered by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sleepkern.integrations import serving
from sleepkern.rules import RULES
from sleepkern.testing import Shape, call, make_inputs, relative_error
from sleepkern.testing.tolerances import TOLERANCE

H, HV, K, V = 2, 4, 16, 24
LENGTHS = (3, 1, 3)
CLOSE = TOLERANCE[torch.float32]


def new_pool(v_first: bool, dtype: torch.dtype = torch.float32, rows: int = 20) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    pool = torch.randn(rows, HV, K, V, generator=generator).to(dtype)
    return pool.transpose(-1, -2).contiguous() if v_first else pool


def as_k_first(pool: Tensor, v_first: bool) -> Tensor:
    return (pool.transpose(-1, -2) if v_first else pool).float()


def inputs(rule: str, lengths: tuple[int, ...]) -> dict[str, Any]:
    x = make_inputs(RULES[rule], Shape(H=H, HV=HV, K=K, V=V, lengths=lengths))
    return {**x, "q": 3 * x["q"], "k": 2 * x["k"]}


def expected(rule: str, x: dict[str, Any], start: Tensor, **options: Any) -> Any:
    arguments = {**x, "initial_state": start, "use_qk_l2norm_in_kernel": True}
    return call(RULES[rule], arguments, "reference", **options)


@pytest.mark.parametrize("v_first", [False, True], ids=["kv", "vk"])
@pytest.mark.parametrize("rule", ["gated_delta_rule", "kda"])
def test_sglang_extend(rule: str, v_first: bool) -> None:
    x, pool = inputs(rule, (40, 1, 30)), new_pool(v_first)
    before, rows = pool.clone(), torch.tensor([7, -1, 2], dtype=torch.int32)
    kernel = serving.LinearAttnKernel(rule, v_first)
    o, last, along = kernel.extend(
        x["q"], x["k"], x["v"], x["g"], x["beta"],
        ssm_states=pool, cache_indices=rows, query_start_loc=x["cu_seqlens"].int(), layer_id=3,
    )  # fmt: skip
    start = as_k_first(before[rows.clamp_min(0).long()], v_first) * (rows >= 0)[:, None, None, None]
    o_expected, S = expected(rule, x, start)
    assert last is along is None and relative_error(o, o_expected) <= CLOSE
    assert relative_error(as_k_first(pool[[7, 2]], v_first), S[[0, 2]]) <= CLOSE
    assert torch.equal(pool[[0, 1, 3]], before[[0, 1, 3]])


def raw(rule: str, lengths: tuple[int, ...]) -> tuple[dict[str, Any], dict[str, Any], tuple[Tensor, Tensor]]:
    """A call with raw gates as SGLang gives it, and the same with gates made in torch."""
    torch.manual_seed(0)
    x, T = inputs(rule, lengths), sum(lengths)
    tail = (K,) if rule == "kda" else ()
    a, b = torch.randn(T, HV, *tail), torch.randn(T, HV)
    A_log, dt_bias = torch.randn(HV), torch.randn(HV, *tail)
    rate = A_log.exp().view(HV, *(1 for _ in tail))
    made = {**x, "g": -(rate * F.softplus(a + dt_bias))[None], "beta": b.sigmoid()[None]}
    return {**x, "a": a.flatten(1), "b": b}, made, (A_log, dt_bias)


@pytest.mark.parametrize("v_first", [False, True], ids=["kv", "vk"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rule", ["gated_delta_rule", "kda"])
def test_sglang_decode(rule: str, dtype: torch.dtype, v_first: bool) -> None:
    for lengths in ((1, 1, 1), LENGTHS):
        x, made, (A_log, dt_bias) = raw(rule, lengths)
        pool = new_pool(v_first, dtype)
        before, rows = pool.clone(), torch.tensor([7, 0, 2], dtype=torch.int32)
        o = serving.LinearAttnKernel(rule, v_first).decode(
            x["q"], x["k"], x["v"], x["a"], x["b"],
            A_log=A_log, dt_bias=dt_bias, ssm_states=pool, cache_indices=rows, query_start_loc=x["cu_seqlens"],
        )  # fmt: skip
        o_expected, S = expected(rule, made, as_k_first(before[rows.long()], v_first))
        assert o.shape == x["v"].shape and relative_error(o, o_expected) <= CLOSE
        assert relative_error(as_k_first(pool[rows.long()], v_first), S) <= TOLERANCE[dtype]
        assert torch.equal(pool[[1, 3, 4]], before[[1, 3, 4]])


@pytest.mark.parametrize("v_first", [False, True], ids=["kv", "vk"])
@pytest.mark.parametrize("rule", ["gated_delta_rule", "kda"])
def test_sglang_target_verify(rule: str, v_first: bool) -> None:
    steps, n = 3, 2
    x, made, (A_log, dt_bias) = raw(rule, (steps,) * n)
    pool, rows, slots = new_pool(v_first), torch.tensor([7, 2]), torch.tensor([4, 1])
    before, buffer = pool.clone(), torch.zeros(5, steps, *pool.shape[1:])
    o = serving.LinearAttnKernel(rule, v_first).target_verify(
        A_log, dt_bias, x["q"], x["k"], x["v"], x["a"], x["b"],
        ssm_states=pool, cache_indices=rows, query_start_loc=x["cu_seqlens"],
        intermediate_states_buffer=buffer, intermediate_state_indices=slots, cache_steps=steps,
    )  # fmt: skip
    o_expected, _, states = expected(rule, made, as_k_first(pool[rows], v_first), state_every=1)
    assert torch.equal(pool, before) and relative_error(o, o_expected) <= CLOSE
    found = as_k_first(buffer[slots], v_first)
    assert relative_error(found.flatten(0, 1), states[0]) <= CLOSE and not buffer[[0, 2, 3]].any()


def test_sglang_refuses_trees_and_other_rules() -> None:
    with pytest.raises(ValueError, match="rule: got 'gla'; expected one of gated_delta_rule, kda"):
        serving.LinearAttnKernel("gla")
    x, _, gates = raw("gated_delta_rule", (1,))
    with pytest.raises(NotImplementedError, match="retrieve_parent_token: got a draft that is a tree"):
        serving.LinearAttnKernel().target_verify(
            *gates, x["q"], x["k"], x["v"], x["a"], x["b"],
            ssm_states=new_pool(False), cache_indices=torch.tensor([0]), query_start_loc=x["cu_seqlens"],
            intermediate_states_buffer=torch.zeros(1, 1, HV, K, V), intermediate_state_indices=torch.tensor([0]),
            cache_steps=1, retrieve_parent_token=torch.tensor([0]),
        )  # fmt: skip


@pytest.mark.parametrize("v_first", [False, True], ids=["kv", "vk"])
@pytest.mark.parametrize("rule", ["gated_delta_rule", "kda"])
def test_vllm_prefill(rule: str, v_first: bool) -> None:
    x, start = inputs(rule, (40, 1, 30)), new_pool(v_first, torch.bfloat16, 3)
    chunk = getattr(serving, f"chunk_{rule}")
    tokens = (x["q"], x["k"], x["v"], x["g"], x["beta"])
    options: dict[str, Any] = {"use_qk_l2norm_in_kernel": True, "state_v_first": v_first}
    o, S = chunk(*tokens, initial_state=start, output_final_state=True, cu_seqlens=x["cu_seqlens"], **options)
    o_expected, S_expected = expected(rule, x, as_k_first(start, v_first))
    assert S.dtype == torch.bfloat16 and relative_error(o, o_expected) <= CLOSE
    assert relative_error(as_k_first(S, v_first), S_expected) <= TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("v_first", [False, True], ids=["kv", "vk"])
@pytest.mark.parametrize("rule", ["gated_delta_rule", "kda"])
def test_vllm_decode_and_the_null_block(rule: str, v_first: bool) -> None:
    x, pool = inputs(rule, LENGTHS), new_pool(v_first)
    before, rows = pool.clone(), torch.tensor([7, 0, 2], dtype=torch.int32)
    step = getattr(serving, f"fused_recurrent_{rule}")
    tokens = (x["q"], x["k"], x["v"], x["g"], x["beta"])
    options: dict[str, Any] = {"use_qk_l2norm_in_kernel": True, "state_v_first": v_first}
    o, S = step(*tokens, initial_state=pool, cu_seqlens=x["cu_seqlens"], ssm_state_indices=rows, **options)
    o_expected, S_expected = expected(rule, x, as_k_first(before[rows.long()], v_first))
    assert S is pool and not o[:, 3].any()
    assert relative_error(o[:, [0, 1, 2, 4, 5, 6]], o_expected[:, [0, 1, 2, 4, 5, 6]]) <= CLOSE
    assert relative_error(as_k_first(pool[[7, 2]], v_first), S_expected[[0, 2]]) <= CLOSE
    assert torch.equal(pool[[0, 1]], before[[0, 1]])


@pytest.mark.parametrize("v_first", [False, True], ids=["kv", "vk"])
@pytest.mark.parametrize("lengths", [(3, 3, 3), (3, 1, 2)], ids=["even", "uneven"])
@pytest.mark.parametrize("rule", ["gated_delta_rule", "kda"])
def test_vllm_drafts(rule: str, lengths: tuple[int, ...], v_first: bool) -> None:
    """Each sequence starts from the state after its last accepted token, and its states take the same rows again."""
    x, pool = inputs(rule, lengths), new_pool(v_first)
    rows, accepted = torch.tensor([[7, 8, 9], [3, 4, 5], [12, 0, 13]]), torch.tensor([2, 1, 3], dtype=torch.int32)
    before, start = pool.clone(), rows[[0, 1, 2], [1, 0, 2]]
    step = getattr(serving, f"fused_recurrent_{rule}")
    tokens = (x["q"], x["k"], x["v"], x["g"], x["beta"])
    o, _ = step(
        *tokens, initial_state=pool, cu_seqlens=x["cu_seqlens"], ssm_state_indices=rows,
        num_accepted_tokens=accepted, use_qk_l2norm_in_kernel=True, state_v_first=v_first,
    )  # fmt: skip
    o_expected, _, states = expected(rule, x, as_k_first(before[start], v_first), state_every=1)
    assert relative_error(o, o_expected) <= CLOSE
    written = [int(rows[i, t]) for i, length in enumerate(lengths) for t in range(length)]
    for place, row in enumerate(written):
        if row:
            assert relative_error(as_k_first(pool[row], v_first), states[0, place]) <= CLOSE
    kept = sorted({0, *range(20)} - {row for row in written if row})
    assert torch.equal(pool[kept], before[kept])


def test_vllm_options_that_are_not_done() -> None:
    x = inputs("gated_delta_rule", (1,))
    tokens = (x["q"], x["k"], x["v"], x["g"], x["beta"])
    row = torch.tensor([1])
    with pytest.raises(ValueError, match="inplace_final_state: got False; expected True"):
        serving.fused_recurrent_gated_delta_rule(
            *tokens, initial_state=new_pool(False), ssm_state_indices=row, inplace_final_state=False
        )
    with pytest.raises(ValueError, match="ssm_state_indices: got None; expected a pool of states and the rows"):
        serving.fused_recurrent_gated_delta_rule(*tokens, initial_state=new_pool(False))
    with pytest.raises(ValueError, match="num_accepted_tokens: got it with rows"):
        serving.fused_recurrent_gated_delta_rule(
            *tokens, initial_state=new_pool(False), ssm_state_indices=row, num_accepted_tokens=row
        )


def test_sglang_refuses_buffers_without_a_row_for_each_token() -> None:
    kernel, (x, _, gates) = serving.LinearAttnKernel(), raw("gated_delta_rule", (3, 3))
    given = [x[name] for name in ("q", "k", "v", "a", "b")]
    options = {"ssm_states": new_pool(False), "cache_indices": torch.arange(2), "cache_steps": 3}
    options |= {"query_start_loc": torch.tensor([0, 3, 6]), "intermediate_state_indices": torch.tensor([0, 2])}
    heads = new_pool(False).shape[1:]
    for buffer, message in (
        (torch.zeros(4, 2, *heads), r"got shape .* expected \[m,steps,HV,K,V\] with at least cache_steps = 3 steps"),
        (torch.zeros(4, 5, *heads)[:, :3], "got strides .* expected all steps at one distance"),
    ):
        with pytest.raises(ValueError, match=f"intermediate_states_buffer: {message}"):
            kernel.target_verify(*gates, *given, intermediate_states_buffer=buffer, **options)
        assert not buffer.any()


ROWS = torch.tensor([[1, 2, 3], [4, 5, 6]])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"ssm_state_indices": torch.tensor([[1, 2], [4, 5]])},
            "ssm_state_indices: got rows of 2 tokens, with a draft of 3",
        ),
        ({"cu_seqlens": torch.tensor([0, 2, 4])}, r"cu_seqlens: got \[0, 2, 4\]; expected offsets .* end at T = 5"),
        ({"cu_seqlens": torch.tensor([0, 5])}, r"cu_seqlens: got shape \[2\]; expected \[3\]"),
        ({"num_accepted_tokens": [1, 1]}, "num_accepted_tokens: got list"),
        (
            {"num_accepted_tokens": torch.ones(3, dtype=torch.int64)},
            r"num_accepted_tokens: got shape \[3\]; expected \[2\]",
        ),
        ({"ssm_state_indices": torch.zeros(2, 0, dtype=torch.int64)}, r"ssm_state_indices: got shape \[2, 0\]"),
        ({"ssm_state_indices": [1, 2]}, "ssm_state_indices: got list"),
    ],
)
def test_vllm_drafts_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    pool, x = new_pool(False), inputs("gated_delta_rule", (2, 3))
    x |= {"initial_state": pool, "ssm_state_indices": ROWS, **options}
    with pytest.raises((TypeError, ValueError), match=message):
        serving.fused_recurrent_gated_delta_rule(**x)
    assert torch.equal(pool, new_pool(False))


def test_vllm_drafts_of_no_token() -> None:
    pool, x = new_pool(False), inputs("gated_delta_rule", (0, 0))
    o, _ = serving.fused_recurrent_gated_delta_rule(**{**x, "initial_state": pool}, ssm_state_indices=ROWS)
    assert o.shape == x["v"].shape and torch.equal(pool, new_pool(False))
