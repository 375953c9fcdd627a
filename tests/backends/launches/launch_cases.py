"""Calls whose launches are looked at, and a record of what each launch was given.

    TRITON_INTERPRET=1 python tests/backends/launches/launch_cases.py

prints, as JSON, what the interpreter's run of every case gives each kernel: the same plans, in a process of its own,
because Triton reads the switch on import.
"""

from __future__ import annotations

import inspect
import json
import struct
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import torch
from torch import Tensor

import sleepkern
from sleepkern.autograd import recurrence as autograd
from sleepkern.backends import triton as backend
from sleepkern.backends.triton import held_launches, launch
from sleepkern.backends.triton.plan import plan_for
from sleepkern.backends.triton.plan_table import PLAIN_HOPPER
from sleepkern.ops import known_calls
from sleepkern.problems import recurrence as problems
from sleepkern.problems.recurrence import Tensors
from sleepkern.rules import DELTA_RULE, GATED_DELTA_RULE, KDA, SIMPLE_GLA, Rule


class Case:
    """One kind of call on tensors of its own."""

    def __init__(
        self, rule: Rule, kind: str, T: int, B: int = 1, H: int = 2, HV: int = 2, K: int = 32, V: int = 32,
        shifted: tuple[str, ...] = (), state: bool = False, lengths: tuple[int, ...] | None = None,
        every: int | None = None, states: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        """Shifted tensors begin 2 or 4 bytes behind a multiple of 16. every: states after so many tokens are wanted;
        states: the type of those of a decode."""
        torch.manual_seed(T)
        self.rule, self.kind = rule, kind
        gate = {"none": None, "head": (B, T, HV), "channel": (B, T, HV, K)}[rule.gate]
        self.x: dict[str, Tensor | None] = {
            "q": _made("q" in shifted, B, T, H, K),
            "k": _made("k" in shifted, B, T, H, K).mul_(0.1),
            "v": _made("v" in shifted, B, T, HV, V), "g": None if gate is None else -torch.rand(gate),
            "beta": torch.rand(B, T, HV),
        }  # fmt: skip
        n = B if lengths is None else len(lengths)
        self.every = every
        self.state = torch.zeros(n, HV, K, V, dtype=states) if state or kind.startswith("decode") else None
        self.offsets = None if lengths is None else torch.tensor([0, *lengths]).cumsum(0)
        if kind == "gradients":
            for t in self.x.values():
                if t is not None:
                    t.requires_grad_()
        self.do = torch.randn(B, T, HV, V, dtype=torch.bfloat16)
        self.dstates = None if every is None else torch.randn(B, -(-T // every), HV, K, V)
        self.out = torch.zeros(B, T, HV, K, V, dtype=states) if kind == "decode with states" else None
        self.rows = torch.arange(B) if kind == "decode in a pool" else None

    def inputs(self) -> dict[str, Tensor | None]:
        """Tensors of the call by role."""
        more = {"dstates": self.dstates, "out": self.out, "rows": self.rows}
        return {**self.x, "state": self.state, "offsets": self.offsets, "do": self.do, **more}

    def call(self) -> dict[str, Tensor | None]:
        """Make the call; its results by role."""
        x, rule = self.x, self.rule
        if self.kind == "decode":
            with torch.no_grad():
                o, _ = sleepkern.recurrent_step(**x, state=self.state, rule=rule, backend="triton")
            return {"o": o}
        if self.kind == "decode in a pool":
            given = Tensors._make([*x.values(), self.state, None])
            return {"o": backend.step_in_pool(self.problem(given), given, self.rows)}
        if self.kind == "decode with states":
            given = Tensors._make([*x.values(), self.state, None])
            return {"o": backend.step_states(self.problem(given), given, None, self.out, None)}
        if self.kind == "replay":
            r = sleepkern.sleep_ingest(**x, passes=3, rule=rule, initial_state=self.state, backend="triton")
            return {"o": r.output, "final": r.final_state}
        given = {name: t for name, t in x.items() if t is not None}
        options = {"initial_state": self.state, "cu_seqlens": self.offsets, "output_final_state": True}
        if self.every is not None:
            options["state_every"] = self.every
        o, final, *along = getattr(sleepkern, rule.name)(**given, **options, backend="triton")
        made = {"o": o, "final": final, **dict(zip(("states",), along, strict=False))}
        if self.kind == "forward":
            return made
        outputs, above = [o, *along], [self.do, *(self.dstates for _ in along)]
        found = torch.autograd.grad(outputs, list(given.values()), above)
        return {**made, **{f"d{name}": d for name, d in zip(given, found, strict=True)}}

    def problem(self, x: Tensors) -> problems.Problem:
        """The problem of a decode that the backend is given."""
        described = problems.describe(self.rule, x, x.k.shape[3] ** -0.5, False)
        return described._replace(state_bf16=x.state is not None and x.state.dtype == torch.bfloat16)


def _made(shifted: bool, *size: int) -> Tensor:
    t = torch.randn(*size).bfloat16()
    return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(size) if shifted else t


def cases() -> dict[str, Case]:
    """All cases by name, few enough kernels to be compiled in a minute."""
    return {
        "forward": Case(GATED_DELTA_RULE, "forward", T=70),
        "forward, other length": Case(GATED_DELTA_RULE, "forward", T=203),
        "forward, k shifted": Case(GATED_DELTA_RULE, "forward", T=70, shifted=("k",)),
        "forward, packed, from a state": Case(GATED_DELTA_RULE, "forward", T=90, state=True, lengths=(30, 40, 20)),
        "forward and gradients": Case(GATED_DELTA_RULE, "gradients", T=70),
        "one chunk and gradients": Case(DELTA_RULE, "gradients", T=20),
        "decode": Case(GATED_DELTA_RULE, "decode", T=1, B=3),
        "decode, three tokens": Case(GATED_DELTA_RULE, "decode", T=3, B=2),
        "decode of KDA": Case(KDA, "decode", T=1, B=3, H=1),
        "replay": Case(GATED_DELTA_RULE, "replay", T=70, state=True),
        "forward, with states": Case(GATED_DELTA_RULE, "forward", T=70, every=64),
        "forward and gradients, with states": Case(GATED_DELTA_RULE, "gradients", T=70, every=64),
        "decode, bfloat16 states": Case(GATED_DELTA_RULE, "decode", T=1, B=3, states=torch.bfloat16),
        "decode, in a pool": Case(GATED_DELTA_RULE, "decode in a pool", T=1, B=3, states=torch.bfloat16),
        "decode, with states": Case(GATED_DELTA_RULE, "decode with states", T=3, B=2),
        "replay of simple GLA": Case(SIMPLE_GLA, "replay", T=20),
    }


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Tensors of the CPU pass for those of a GPU of compute capability 9.0."""
    describe = problems.describe

    def plan_of(p: Any, precision: Any, direction: Any) -> Any:
        return plan_for(p.K, p.V, precision, p.rule.gate == "channel", p.T, direction, PLAIN_HOPPER)

    def described(*arguments: Any, **options: Any) -> Any:
        return describe(*arguments, **options)._replace(device="cuda")

    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(launch, "plan_of", plan_of))
        patches.enter_context(mock.patch.object(known_calls, "DEVICES", ("cpu",)))
        patches.enter_context(mock.patch.object(backend, "why_not_on", return_value=None))
        for module in (problems, autograd):
            patches.enter_context(mock.patch.object(module, "describe", described))
        yield


Noted = tuple[str, tuple[int, ...], list[tuple[str, Any]]]


@contextmanager
def noted(into: list[Noted]) -> Iterator[None]:
    """Note what each launch is given: the kernel's name, the grid and the arguments; the tensors stay alive."""
    launched = held_launches.Recording.launch

    def note(self: Any, kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], *more: int) -> None:
        parameters = inspect.signature(kernel.fn).parameters.values()
        given = [("constant" if "constexpr" in str(p.annotation) else p.name, arguments[p.name]) for p in parameters]
        into.append((kernel.fn.__name__, grid, given))
        launched(self, kernel, grid, arguments, *more)

    with mock.patch.object(held_launches.Recording, "launch", note):
        yield


class Roles:
    """Names for addresses: those of the call's tensors, and for scratch its number in the order of appearance."""

    def __init__(self, *named: dict[str, Tensor | None]) -> None:
        self.names = {t.data_ptr(): name for tensors in named for name, t in tensors.items() if t is not None}

    def name(self, address: int) -> str:
        """The name of an address; one that has none is scratch."""
        return self.names.setdefault(address, f"scratch {len(self.names)}")


def tokens(launches: Sequence[Noted], roles: Roles) -> list[list[Any]]:
    """For each launch: kernel, grid, constants, and what the driver is passed, pointers by role and numbers as bits.

    None is compiled into a kernel and not passed. An integer of 1 may be.
    """
    found = []
    for kernel, grid, given in launches:
        constants = [str(value) for name, value in given if name == "constant"]
        passed: list[Any] = []
        for name, value in given:
            for one in value if isinstance(value, tuple) else [value]:
                if name == "constant" or one is None:
                    continue
                if isinstance(one, Tensor):
                    passed.append(roles.name(one.data_ptr()))
                else:
                    passed.append(one if isinstance(one, int) else struct.unpack("<i", struct.pack("<f", one))[0])
        found.append([kernel, list(grid), constants, passed])
    return found


def given_to_triton(case: Case) -> list[list[Any]]:
    """`tokens` of a call that is not held."""
    held_launches.forget()
    launches: list[Noted] = []
    with noted(launches):
        results = case.call()
    return tokens(launches, Roles(case.inputs(), results))


def main() -> None:
    """Print what every case gives the kernels."""
    with as_on_a_gpu(), mock.patch.object(torch.cuda, "get_device_capability", return_value=(9, 0)):
        print(json.dumps({name: given_to_triton(case) for name, case in cases().items()}))


if __name__ == "__main__":
    main()
