"""The tasks' data against answers found another way, and training problems against test problems."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sleepkern.experiments.tasks import IGNORED, SPLITS, Arithmetic, Depo, NamedDepo, Rule110, Task
from sleepkern.experiments.tasks.task import belongs

TASKS: dict[str, Task] = {
    "depo": Depo(),
    "named depo": NamedDepo(nodes=12, letters=4, hops=(1, 2, 4), queries=5, window=12),
    "rule 110": Rule110(12, 2, (1, 2, 3)),
    "rule 110, 32 steps": Rule110(24, 4, (32,)),
    "arithmetic": Arithmetic(),
}


@pytest.fixture(params=TASKS.values(), ids=TASKS.keys())
def task(request: pytest.FixtureRequest) -> Task:
    found: Task = request.param
    return found


@pytest.mark.parametrize("split", SPLITS)
def test_shapes_and_ranges(task: Task, split: str) -> None:
    batch = task.batch(50, seed=3, split=split)
    assert batch.context.shape[1] % task.window == 0
    assert batch.question.shape == batch.targets.shape == batch.answers.shape == (50, task.question_length)
    assert all(t.dtype == torch.int64 for t in batch)
    for tokens, kinds in ((batch.context, task.kinds), (batch.question, task.kinds), (batch.targets, 1)):
        there = tokens[tokens != IGNORED]
        assert int(there.min()) >= 0 and int(there.max()) < task.vocabulary * kinds
    assert set(batch.level.flatten().tolist()) <= {0, *task.levels}
    there = torch.zeros_like(batch.level).scatter_(1, batch.answers.clamp_min(0), 1).bool()
    assert torch.equal(there, batch.level > 0)  # every answer has a level and tokens
    assert bool((batch.targets[batch.answers >= 0] != IGNORED).all())
    assert set(task.test_levels) <= set(task.levels) and 0 < task.chance < 0.2


def test_same_numbers_same_batch(task: Task) -> None:
    def same(*arguments: Any) -> bool:
        one, other = task.batch(9, 1, 5), task.batch(9, *arguments)
        return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))

    assert same(1, 5)
    assert not same(2, 5) and not same(1, 6) and not same(1, 5, "test")


def test_weights_choose_levels(task: Task) -> None:
    last = [float(level == task.levels[-1]) for level in task.levels]
    batch = task.batch(40, 0, split="test", weights=last)
    assert set(batch.level.flatten().tolist()) <= {0, task.levels[-1]}
    with pytest.raises(ValueError, match=f"weights: got {len(last) + 1}; expected one for each of {len(last)} levels"):
        task.batch(4, 0, weights=[*last, 1.0])
    with pytest.raises(ValueError, match="split: got 'dev'; expected one of train, test"):
        task.batch(4, 0, split="dev")


def test_a_split_without_problems() -> None:
    """There are two cycles of three nodes, and neither is a test problem."""
    assert Depo(3, (1,), 2).batch(8, 0).context.shape == (8, 6)
    with pytest.raises(ValueError, match="split: got 'test'; expected one that has problems"):
        Depo(3, (1,), 2).batch(8, 0, split="test")


def walked(successor: dict[Any, Any], start: Any, hops: int) -> Any:
    for _ in range(hops):
        start = successor[start]
    return start


def cycle_of(successor: dict[Any, Any]) -> tuple[Any, ...]:
    """From the smallest node on."""
    node, found = min(successor), []
    while node not in found:
        found.append(node)
        node = successor[node]
    return tuple(found)


def test_depo_is_walked() -> None:
    task = Depo(nodes=9, hops=(1, 2, 3, 4), queries=8)
    batch = task.batch(200, seed=0)
    for context, question, targets, level in zip(
        batch.context, batch.question, batch.targets, batch.level, strict=True
    ):
        k = int(context[0]) // 9 + 1
        assert set((torch.cat([context, question]) // 9).tolist()) == {k - 1} and set(level.tolist()) == {k}
        successor = dict((context % 9).view(-1, 2).tolist())
        assert len(cycle_of(successor)) == 9  # one cycle through all
        assert [walked(successor, x, k) for x in (question % 9).tolist()] == targets.tolist()
        assert len(set(question.tolist())) == 8
    first = (batch.context[:, 0] % 9).bincount(minlength=9)
    assert int(first.min()) > 5  # edges come in any order


def spelt(tokens: list[int], letters: int) -> list[tuple[int, ...]]:
    """Names, each up to a token that is marked as the last."""
    names, name = [], []
    for token in tokens:
        name.append(token)
        if token >= letters:
            names.append(tuple(name))
            name = []
    assert not name
    return names


@pytest.mark.parametrize("split", SPLITS)
def test_named_depo_is_walked(split: str) -> None:
    task = NamedDepo(nodes=12, letters=4, hops=(1, 2, 4), queries=5, window=12)
    batch, padding, sizes = task.batch(60, seed=1, split=split), task.vocabulary - 1, set()
    for context, question, targets, answers, level in zip(*batch, strict=True):
        names = spelt([t for t in context.tolist() if t != padding], 4)
        successor = dict(zip(names[::2], names[1::2], strict=True))
        n = len(successor)
        assert len(names) == 2 * n == 2 * len(cycle_of(successor)) and {len(name) for name in names} <= {1, 2}
        sizes.add(n)
        text = [t for t in question.tolist() if t != padding]
        starts = [i for i, t in enumerate(text) if 8 <= t < padding - 1]
        assert len(starts) == min(n, 5)
        for number, (start, end) in enumerate(zip(starts, [*starts[1:], len(text)], strict=True)):
            query, answer = spelt(
                [t for t in text[start + 1 : end] if t != padding - 1], 4
            )  # the token for <ans> stands between
            k = text[start] - 8 + 1
            assert k == level[number] and answer == walked(successor, query, k)
            mark = start + 1 + len(query)
            assert text[mark] == padding - 1 and targets[mark - 1] == padding - 1
            assert targets[mark : mark + len(answer)].tolist() == list(answer)
            assert answers[mark : mark + len(answer)].tolist() == [number] * len(answer)
        assert int((targets != IGNORED).sum()) == len(starts) + int((answers >= 0).sum())
    assert sizes == {12} if split == "test" else len(sizes) > 5


def test_named_depo_of_the_papers_size() -> None:
    task = NamedDepo()
    batch = task.batch(8, 0, split="test", weights=[float(level == 16) for level in task.levels])
    assert batch.context.shape == (8, 300) and batch.question.shape == (8, 60) and task.window == 75
    assert bool((batch.level == 16).all())


def neighbours(bits: list[int]) -> list[int]:
    """Rule 110 by its table."""
    table = {(1, 1, 1): 0, (1, 1, 0): 1, (1, 0, 1): 1, (1, 0, 0): 0, (0, 1, 1): 1, (0, 1, 0): 1, (0, 0, 1): 1}
    n = len(bits)
    return [table.get((bits[i - 1], bits[i], bits[(i + 1) % n]), 0) for i in range(n)]


@pytest.mark.parametrize("name", ["rule 110", "rule 110, 32 steps"])
def test_rule_110_is_run(name: str) -> None:
    task = TASKS[name]
    assert isinstance(task, Rule110)
    batch = task.batch(40, seed=2)
    says, width = len(task.steps) > 1, task.width
    for context, question, targets, level in zip(
        batch.context, batch.question, batch.targets, batch.level, strict=True
    ):
        windows = context.view(task.strings, task.window)
        t = int(level[0])
        if says:
            assert set(windows[:, 0].tolist()) == {2 + task.strings + task.steps.index(t)} == {int(question[0])}
        asked, answers = question[int(says) :].view(-1, width), targets[int(says) :].view(-1, width)
        for number, bits in enumerate(windows[:, int(says) :].tolist()):
            for _ in range(t):
                bits = neighbours(bits)
            assert answers[number].tolist() == bits
            assert asked[number].tolist() == [2 + number, *bits[:-1]]


def test_arithmetic_is_evaluated() -> None:
    task = Arithmetic(statements=11, operations=(1, 2, 3, 4, 5, 6, 7, 8), modulus=23)
    batch, orders = task.batch(300, seed=4), set()
    for context, question, targets, level in zip(
        batch.context, batch.question, batch.targets, batch.level, strict=True
    ):
        facts = {row[0]: tuple(row[1:]) for row in context[4:].view(-1, 4).tolist()}
        assert context[0] == question[0] and set(context[1:4].tolist()) == {task.vocabulary - 1} == {int(question[1])}
        assert len(facts) == 11
        needed: set[int] = set()

        def value(x: int, facts: Any = facts, needed: set[int] = needed) -> int:
            if x < 23:
                return x
            needed.add(x)
            first, sign, second = facts[x]
            a, b = value(first), value(second)
            return (a + b, a - b, a * b)[sign - 34] % 23

        assert value(int(question[0])) == targets[1]
        assert len(needed) == level[0]  # so many operations, no more
        orders.add(list(facts).index(int(question[0])))
    assert len(orders) == 11
    with pytest.raises(ValueError, match="arithmetic: got 12 operations in 2 windows of 11 statements"):
        Arithmetic(operations=(12,))


def problems(task: Task, split: str, count: int) -> set[Any]:
    """What makes problems the same, found from their text."""
    batch = task.batch(count, seed=0 if split == "train" else 1, split=split)
    found: set[Any] = set()
    for context in batch.context.tolist():
        if isinstance(task, Depo):
            nodes = [t % task.nodes for t in context]
            found.add(cycle_of(dict(zip(nodes[::2], nodes[1::2], strict=True))))
        elif isinstance(task, NamedDepo):
            names = spelt([t for t in context if t != task.vocabulary - 1], task.letters)
            found.add(cycle_of(dict(zip(names[::2], names[1::2], strict=True))))
        elif isinstance(task, Rule110):
            for start in range(0, len(context), task.window):
                bits = tuple(context[start + task.window - task.width : start + task.window])
                found.add(min(bits[i:] + bits[:i] for i in range(task.width)))
        else:
            found.add((context[0], frozenset(tuple(context[i : i + 4]) for i in range(4, len(context), 4))))
    return found


@pytest.mark.parametrize(
    ("task", "count"),
    [
        (Depo(nodes=7, queries=5), 6000),  # 720 cycles: both splits run through nearly all of theirs
        (NamedDepo(nodes=4, letters=3, hops=(1, 2), queries=2, window=16), 4000),
        (Rule110(12, 2, (1, 2)), 4000),  # 352 necklaces
        (Arithmetic(statements=2, operations=(1, 2), modulus=3, windows=1), 4000),
    ],
    ids=["depo", "named depo", "rule 110", "arithmetic"],
)
def test_no_problem_is_in_both_splits(task: Task, count: int) -> None:
    train, test = problems(task, "train", count), problems(task, "test", count)
    assert len(train) > 300 and len(test) > 10
    assert not train & test


def test_one_in_ten_is_a_test_problem() -> None:
    forms = torch.randint(1 << 40, (20000, 3), generator=torch.Generator().manual_seed(0))
    test = belongs(forms, "test")
    assert torch.equal(test, ~belongs(forms, "train"))
    assert 0.09 < float(test.float().mean()) < 0.11
    small: Tensor = torch.arange(20000)[:, None]
    assert 0.09 < float(belongs(small, "test").float().mean()) < 0.11
