"""The model that predicts candidates: loops of a listing, rounds of a device, and costs that are fitted."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.candidates.machine_code import Trips, read
from benchmarks.candidates.model import COSTS, Kernel, fitted

LISTING = """
        /*0000*/                   MOV R1, R2 ;
.L_x_0:
        /*0010*/                   LDG.E R4, desc[UR4][R2.64] ;
.L_x_1:
        /*0020*/                   HMMA.16816.F32.BF16 R4, R4, R5, R6 ;
        /*0030*/              @P0 BRA `(.L_x_1) ;
        /*0040*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0050*/             @!UP0 BRA `(.L_x_0) ;
        /*0060*/              @P1 BRA `(.L_x_2) ;
.L_x_2:
        /*0070*/                   EXIT ;
"""
KERNEL = Kernel(4096, 4, 128, 30 * 1024, {"FFMA": 1000.0, "BAR": 10.0}, 1e8, 0.0, False)


def test_instructions_run_as_often_as_their_loops() -> None:
    counts = read(LISTING).issued([Trips(3, (Trips(5),))])
    assert counts == {"MOV": 1, "LDG": 3, "HMMA": 15, "BRA": 15 + 3 + 1, "BAR": 3, "EXIT": 1}


def test_a_loop_that_runs_once_is_none_unless_the_compiler_does_not_know() -> None:
    inner = Trips(2)
    assert Trips(1, (inner,)).looped() == [inner]
    assert Trips(1, (inner,), unknown=True).looped() == [Trips(1, (inner,), unknown=True)]
    with pytest.raises(ValueError, match="1 loops in the machine code, 2 in the source"):
        read(LISTING).issued([Trips(3), Trips(4)])


def test_registers_and_shared_memory_bound_what_a_multiprocessor_holds() -> None:
    assert KERNEL.resident == 4
    assert replace(KERNEL, registers=255).resident == 2
    assert replace(KERNEL, shared=100 * 1024).resident == 2
    assert replace(KERNEL, programs=133, shared=200 * 1024).rounds == 2


def test_a_launch_that_copies_ahead_is_bound_by_the_slowest() -> None:
    waiting = KERNEL.microseconds()
    ahead = replace(KERNEL, copies_ahead=True)
    assert ahead.microseconds() < waiting
    assert replace(ahead, l2_bytes=6e9).microseconds() == pytest.approx(1000)


def test_costs_are_found_again() -> None:
    """Times that the model made are fitted by its own costs, from others too."""
    base = replace(KERNEL, registers=255)
    kernels = [replace(base, counts={"FFMA": n, "BAR": b}) for n, b in ((1e3, 10.0), (4e3, 10.0), (1e3, 90.0))]
    kernels.append(replace(base, bytes=2e9))
    truth = COSTS._replace(instruction=5.0, barrier=40.0)
    found = fitted([(kernel, kernel.microseconds(truth)) for kernel in kernels])
    assert found.instruction == pytest.approx(5.0, rel=0.02) and found.barrier == pytest.approx(40.0, rel=0.05)
