"""Lanes, on paper: which rank computes which micro-steps, what it adds, and that one tree is the same on any number."""

from __future__ import annotations

import pytest

from orchestrator.distributed.lanes import Lanes, Span, default_lanes

CASES = [(1, 1), (2, 2), (3, 5), (8, 8), (8, 12), (8, 40), (32, 40), (7, 31)]


def added(lanes: Lanes, size: int) -> str:
    """Return the sum of an iteration's micro-steps as text, with a bracket around every addition that is done."""
    of_ranks: list[tuple[Span, str]] = []
    for rank in range(size):
        mine = lanes.of_rank(rank, size)
        sums = ["+".join(map(str, lanes.micro_steps_of(range(lane, lane + 1)))) for lane in mine]
        joins, spans = lanes.joins([(lane, lane + 1) for lane in mine])
        of_ranks += zip(spans, stacked(sums, joins), strict=True)
    joins, spans = lanes.joins([span for span, _ in of_ranks])
    assert spans == [(0, lanes.count)]
    (total,) = stacked([text for _, text in of_ranks], joins)
    return total


def stacked(sums: list[str], joins: list[int]) -> list[str]:
    waiting: list[str] = []
    for text, count in zip(sums, joins, strict=True):
        total = text
        for _ in range(count):
            total = f"({waiting.pop()} {total})"
        waiting.append(total)
    return waiting


@pytest.mark.parametrize(("count", "micro_steps"), CASES)
def test_the_sum_is_the_same_on_any_number_of_ranks(count: int, micro_steps: int) -> None:
    lanes = Lanes(count, micro_steps)
    alone = added(lanes, 1)
    assert {added(lanes, size) for size in range(1, count + 1)} == {alone}
    assert sorted(map(int, alone.replace("(", "").replace(")", "").replace("+", " ").split())) == [*range(micro_steps)]


def test_four_lanes_are_added_in_pairs() -> None:
    assert added(Lanes(4, 8), 3) == "((0+1 2+3) (4+5 6+7))"


@pytest.mark.parametrize(("count", "micro_steps"), CASES)
def test_every_micro_step_belongs_to_one_rank(count: int, micro_steps: int) -> None:
    lanes = Lanes(count, micro_steps)
    for size in range(1, count + 1):
        shares = [lanes.micro_steps_of(lanes.of_rank(rank, size)) for rank in range(size)]
        assert [step for share in shares for step in share] == [*range(micro_steps)]
        assert all(shares)


def test_sums_that_wait() -> None:
    """log2(k) of k lanes that are one subtree; more for other cuts."""
    assert [Lanes(8, 8).most_held_sums(size) for size in (1, 2, 4, 8)] == [3, 2, 1, 0]
    assert Lanes(32, 40).most_held_sums(3) == 5
    assert Lanes(64, 64).most_held_sums(3) == 6


def test_a_rank_hands_on_few_sums() -> None:
    lanes = Lanes(32, 40)
    for size in range(1, 9):
        assert sum(len(lanes.roots(rank, size)) for rank in range(size)) / size <= 3


def test_default_lanes_keep_every_number_of_a_range_busy() -> None:
    assert default_lanes(4, 4, 40) == 4
    assert default_lanes(2, 8, 40) == 32
    assert default_lanes(2, 8, 31) == default_lanes(2, 8, 40, has_room=False) == 8
    lanes = Lanes(32, 40)
    assert max(lanes.balance(size) for size in range(2, 9)) <= 1.2
    assert Lanes(8, 40).balance(7) > 1.6  # where the default comes from
