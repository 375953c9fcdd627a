"""Step 1 of a call, PUBLIC: one function for each rule, in delta.py and linear.py; decode.py has the decode step, and
replay.py looped ingestion.

Every function ends in `call.apply`: check, choose, apply. Layouts and names are the field's (flash-linear-attention).

Products of bfloat16 inputs take bfloat16 operands on a GPU, and on processors that multiply it in one instruction where
the rule decays by head and their errors do not add up; elsewhere float32 ones (`explain` says which).

All functions are differentiable in every tensor, in reverse mode; gradients that are differentiated again
(create_graph=True) are made by torch's operators, which is slower. So are calls under transforms of torch.func that
differentiate in reverse mode (grad, vjp, jacrev, hessian, vmap of these), whatever `backend` says; forward mode alone
(jvp, jacfwd) is refused. All run under torch.compile(fullgraph=True), torch.export with any dimension open, and
autocast. All raise ValueError or TypeError, which name the argument, what it got and what it expects, before any kernel
runs.
"""

from __future__ import annotations

from ..problems.states import state_offsets
from .call import explain, run
from .commit import commit
from .decode import recurrent_step
from .delta import delta_rule, gated_delta_rule, kda
from .linear import gla, simple_gla, ssd
from .replay import SleepResult, sleep_ingest

__all__ = [
    "SleepResult",
    "commit",
    "delta_rule",
    "explain",
    "gated_delta_rule",
    "gla",
    "kda",
    "recurrent_step",
    "run",
    "simple_gla",
    "sleep_ingest",
    "ssd",
    "state_offsets",
]
