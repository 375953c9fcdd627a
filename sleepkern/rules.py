"""The recurrences as data. Every rule is one equation with two switches.

    S_t = (I - b_t k_t k_t^T)^[delta] . diag(a_t) . S_{t-1}  +  b_t k_t v_t^T        o_t = scale . S_t^T q_t

Notation, the same in Python, C++, tests and README:

    B batch   T tokens   H key heads   HV value heads (a multiple of H)   K key width   V value width
    C chunk   N passes   q, k [B,T,H,K]   v, o [B,T,HV,V]   beta [B,T,HV]   state S [B,HV,K,V]
    g log decay, a = exp(g), g <= 0: none, one number a head [B,T,HV], or one a key channel [B,T,HV,K]

Chunk factors (chunk-local, G the running sum of g):

    E = exp(G)   Gam = exp(G_C)   Kt = k exp(G_C - G)   Qe = scale q E   P_ij = scale q_i.k_j exp(G_i - G_j), i >= j
    M_ij = b_i k_i.k_j exp(G_i - G_j), i > j   U = (I+M)^-1 b v   W = (I+M)^-1 b k E   Vn = U - W S

Slots: chunk c of row s of a batch has the slot s * ceil(T / C) + c. Chunk c of the packed sequence s, which starts at
row offset[s], has the slot offset[s] // C + s + c. No two chunks share a slot, and T // C + n slots are enough, so that
a grid follows from shapes alone; at most one slot a sequence stays empty.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Gate = Literal["none", "head", "channel"]


@dataclass(frozen=True)
class Rule:
    """One member of the family.

    name   the public function's name, which is also the field's (flash-linear-attention's) name
    gate   what the decay is attached to: nothing, a value head, or a key channel of a value head
    delta  whether a write first erases what the state holds along k (the delta rule)

    Two rules are equal where they compute the same: the same class and the same switches, whatever their names. So a
    backend's set of rules holds no rule with a trait that the backend was never told of.
    """

    name: str = field(compare=False)
    gate: Gate
    delta: bool


GATED_DELTA_RULE = Rule("gated_delta_rule", gate="head", delta=True)
KDA = Rule("kda", gate="channel", delta=True)
DELTA_RULE = Rule("delta_rule", gate="none", delta=True)
SIMPLE_GLA = Rule("simple_gla", gate="head", delta=False)
GLA = Rule("gla", gate="channel", delta=False)

FAMILY = frozenset(Rule("", gate, delta) for gate in ("none", "head", "channel") for delta in (False, True))
"""Every combination of the two switches, with a row in RULES or without."""

RULES: dict[str, Rule] = {rule.name: rule for rule in (GATED_DELTA_RULE, KDA, DELTA_RULE, SIMPLE_GLA, GLA)}


def rule_named(rule: Rule | str) -> Rule:
    """A rule as public functions take it: the rule itself, or its name.

    Raises:
        TypeError: neither.
        ValueError: no rule has this name.
    """
    if isinstance(rule, Rule):
        return rule
    if not isinstance(rule, str):
        raise TypeError(f"rule: got {type(rule).__name__}; expected one of sleepkern.rules, or its name")
    if rule not in RULES:
        raise ValueError(f"rule: got {rule!r}; expected one of {', '.join(RULES)}")
    return RULES[rule]
