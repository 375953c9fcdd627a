"""States along a sequence, and after each token of a decode: by a backend, and by the float64 reference beside it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sleepkern.backends import reference
from sleepkern.dispatch import backend_named
from sleepkern.problems.recurrence import Tensors, describe
from sleepkern.rules import Rule
from sleepkern.testing import Shape, make_inputs, relative_error, to_float64

NAMES = ("dq", "dk", "dv", "dg", "dbeta", "dinitial_state")


def along_errors(
    rule: Rule,
    shape: Shape,
    dtype: torch.dtype = torch.float32,
    state_every: int = 16,
    upstream: str = "both",
    backend: str = "triton",
    **inputs: Any,
) -> dict[str, float]:
    """Relative errors of o, the final state, the states along the sequences, and every gradient.

    upstream: which gradients come from above, "states" for those of the states alone, else those of all results.
    """
    x = make_inputs(rule, shape, dtype, seed=3, **inputs)
    wide = to_float64(x)
    generator = torch.Generator().manual_seed(5)
    found: list[list[Tensor | None]] = []
    for given, engine in ((x, backend_named(backend)), (wide, reference)):
        tensors = Tensors(*given.values())
        problem = describe(rule, tensors, shape.K**-0.5, False, state_every=state_every)
        assert engine.why_not(problem) is None
        out = engine.forward(problem, tensors)
        above: list[Tensor | None] = []
        for t in (out.o, out.state, out.states):
            assert t is not None
            above.append(torch.randn(t.shape, generator=generator.manual_seed(t.dim())).to(dtype).to(t))
        if upstream == "states":
            above[:2] = None, None
        found.append([out.o, out.state, out.states, *engine.backward(problem, tensors, *above)])
    names = ("o", "state", "states", *NAMES)
    return {name: _error(a, b) for name, a, b in zip(names, *found, strict=True) if b is not None and a is not None}


def _error(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    return relative_error(actual, expected) if float(expected.norm()) > 0 else float(actual.double().norm())


def decode_errors(
    rule: Rule,
    shape: Shape,
    dtype: torch.dtype = torch.float32,
    states: torch.dtype = torch.float32,
    backend: str = "triton",
    in_place: bool = True,
) -> dict[str, float]:
    """Relative errors of a decode whose states in memory have this type: outputs and states, in place and in pools.

    Expected states are those of the reference, rounded to the type. The last row of the calls on a pool is a padded
    one. What a call leaves alone counts as an error of 1 where it is changed.
    """
    engine, padded = backend_named(backend), shape.B - 1
    x = make_inputs(rule, shape, dtype, seed=3)
    start = x["initial_state"].to(states)
    wide = Tensors(*to_float64(x).values())._replace(state=start.double())
    expected = reference.forward(describe(rule, wide, shape.K**-0.5, False, state_every=1), wide)
    assert expected.states is not None
    after, last = expected.states.to(states), expected.state.to(states)
    given = Tensors(*x.values())
    problem = describe(rule, given, shape.K**-0.5, False)._replace(state_bf16=states == torch.bfloat16)

    around = torch.full((shape.B + 4, shape.HV + 1, shape.K, shape.V), 7.0).to(states)
    pool = around[1:]  # a row before the first one, which index -1 must not reach
    rows = torch.arange(shape.B) * 2 % (shape.B + 3)  # in no order of the rows
    pool[rows, 1:] = start
    indices = rows.clone()
    indices[padded] = -1
    expected_o = expected.o.clone() if expected.o is not None else torch.empty(0)
    expected_o[padded] = 0
    found: dict[str, tuple[Tensor, Tensor]] = {}
    if in_place:
        state = start.clone()
        found["o"] = engine.step(problem, given._replace(state=state)), expected.o
        found["state"] = state, last
        stepped = around.clone()
        o = engine.step_in_pool(problem, given._replace(state=stepped[1:, 1:]), indices.int())
        found["o in a pool"], found["state in a pool"] = (o, expected_o), (stepped, _written(around, indices, last))
    out = torch.full_like(after, 7.0)
    o = engine.step_states(problem, given._replace(state=start), None, out, None)
    found["o with states"], found["states"] = (o, expected.o), (out, after)
    targets = torch.arange(shape.B * shape.T).flip(0).view(shape.B, shape.T) + 1
    targets[0, shape.T // 2] = -1
    outs = torch.full((shape.B * shape.T + 3, shape.HV + 1, shape.K, shape.V), 7.0).to(states)
    before = outs.clone()
    o = engine.step_states(problem, given._replace(state=pool[:, 1:]), indices, outs[1:, 1:], targets)
    targets[padded] = -1
    found["o with states in a pool"] = o, expected_o
    found["states in a pool"] = outs, _written(before, targets, after)
    return {name: relative_error(*pair) for name, pair in found.items()}


def growth(rule: Rule, steps: int, backend: str, width: int = 16) -> tuple[float, float]:
    """Relative errors of a bfloat16 state after so many steps of one token: by a backend, and by float64 sums of which
    each step rounds the state to nearest. The latter is what the type itself costs."""
    x = make_inputs(rule, Shape(T=steps, H=1, HV=1, K=width, V=width), seed=3)
    x["initial_state"] = x["initial_state"].bfloat16()
    engine, given, wide = backend_named(backend), Tensors(*x.values()), Tensors(*to_float64(x).values())
    exact = reference.forward(describe(rule, wide, 1.0, False), wide).state
    state, rounded = given.state, wide.state
    assert state is not None
    for t in range(steps):
        token = Tensors._make([None if y is None else y[:, t : t + 1] for y in given[:5]] + [state, None])
        engine.step(describe(rule, token, 1.0, False)._replace(state_bf16=True), token)
        token = Tensors._make([None if y is None else y[:, t : t + 1] for y in wide[:5]] + [rounded, None])
        rounded = reference.forward(describe(rule, token, 1.0, False), token).state.bfloat16().double()
    return relative_error(state, exact), relative_error(rounded, exact)


def _written(pool: Tensor, indices: Tensor, states: Tensor) -> Tensor:
    """A pool with a row and a head before the first ones, and these states at the indices that are not negative."""
    pool = pool.clone()
    pool[indices[indices >= 0] + 1, 1:] = states[indices >= 0]
    return pool
