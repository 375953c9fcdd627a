"""Plans whose tiles have another variant than the table's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import ModuleType
from typing import Any
from unittest import mock

from sleepkern.backends.triton.plan_table import Tile, Variant


@contextmanager
def with_variants(launch: ModuleType, variants: dict[str, Variant]) -> Iterator[None]:
    """A launch module takes the table's plans with these variants, by stage."""
    plan_of = launch.plan_of

    def changed(*problem: Any) -> Any:
        plan = plan_of(*problem)
        tiles: dict[str, Tile] = {name: getattr(plan, name)._replace(variant=v) for name, v in variants.items()}
        return replace(plan, **tiles)

    with mock.patch.object(launch, "plan_of", changed):
        yield
