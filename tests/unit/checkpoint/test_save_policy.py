"""When a state is taken, as pure values; and what is measured for it, with a clock of the test's own."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch

from orchestrator.checkpoint.save import policy
from orchestrator.checkpoint.save.policy import (
    Decision,
    SaveIntervals,
    SaveScheduler,
    SaveStatus,
    SnapshotCost,
    affordable_interval,
)
from orchestrator.distributed.world import World

NOTHING = Decision()
MEMORY = Decision(to_memory=True)
STORAGE = Decision(to_memory=True, to_storage=True)


def paid(skipped: int) -> Decision:
    return Decision(to_memory=True, to_storage=True, skipped=skipped)


def status(is_copying: bool, is_uploading: bool, interval: int) -> SaveStatus:
    return SaveStatus(is_copying, is_uploading, affordable_interval=interval)


def played(
    until: int,
    every: int,
    interval: int,
    can_copy: Callable[[int], bool] = lambda _i: True,
    can_upload: Callable[[int], bool] = lambda _i: True,
) -> dict[int, Decision]:
    """Return what is decided at iterations 1, 2, ..., without those at which nothing is."""
    schedule = SaveScheduler(SaveIntervals(every))
    decisions = {
        i: schedule.decide(i, i % every == 0, status(not can_copy(i), not can_upload(i), interval))
        for i in range(1, until)
    }
    return {i: decision for i, decision in decisions.items() if decision != NOTHING}


def test_between_checkpoints_states_go_to_memory() -> None:
    assert played(21, every=10, interval=3) == {
        2: MEMORY, 5: MEMORY, 10: STORAGE, 13: MEMORY, 16: MEMORY, 20: STORAGE,
    }  # fmt: skip


def test_no_state_goes_to_memory_right_before_a_checkpoint() -> None:
    assert played(9, every=8, interval=5) == {8: STORAGE}, "4 would be in time, but 8 is less than 5 away"
    assert played(11, every=10, interval=5) == {4: MEMORY, 10: STORAGE}, "9 would be in time"


def test_every_state_is_taken_where_that_costs_nothing() -> None:
    assert played(9, every=4, interval=1) == {i: STORAGE if i % 4 == 0 else MEMORY for i in range(1, 9)}


def test_with_a_checkpoint_at_every_iteration_nothing_else_is_taken() -> None:
    assert played(5, every=1, interval=1) == dict.fromkeys(range(1, 5), STORAGE)
    assert played(5, every=1, interval=9) == dict.fromkeys(range(1, 5), STORAGE)


def test_where_states_are_dear_only_checkpoints_are_taken() -> None:
    assert played(25, every=8, interval=100) == {8: STORAGE, 16: STORAGE, 24: STORAGE}


def test_a_resumed_run_takes_a_state_at_once() -> None:
    """Of its own attempt: the one that it was resumed from may lie on another node."""
    schedule = SaveScheduler(SaveIntervals(1000))
    assert schedule.decide(505, False, status(False, False, 50)) == MEMORY
    assert schedule.decide(506, False, status(False, False, 50)) == NOTHING


def test_what_is_due_while_storage_is_busy_is_owed_and_the_newest_state_pays() -> None:
    assert played(17, every=8, interval=100, can_upload=lambda i: i not in range(8, 11)) == {
        11: paid(8), 16: STORAGE,
    }  # fmt: skip


def test_what_is_owed_goes_to_memory_meanwhile() -> None:
    assert played(13, every=8, interval=3, can_upload=lambda i: i not in range(8, 12)) == {
        2: MEMORY, 5: MEMORY, 8: MEMORY, 11: MEMORY, 12: paid(8),
    }  # fmt: skip


def test_what_is_due_while_the_one_before_is_copied_is_owed_too() -> None:
    assert played(11, every=8, interval=100, can_copy=lambda i: i != 8) == {9: paid(8)}


def test_a_debt_is_paid_by_the_next_checkpoint_if_that_is_earlier() -> None:
    assert played(17, every=8, interval=100, can_upload=lambda i: i not in range(8, 16)) == {16: paid(8)}


@pytest.mark.parametrize("interval", [1, 3, 100])
def test_while_storage_hangs_every_checkpoint_is_reported_once_and_the_newest_is_saved(interval: int) -> None:
    decisions = played(50, every=4, interval=interval, can_upload=lambda i: not 8 <= i < 41)
    saved = [i for i, decision in decisions.items() if decision.to_storage]
    skipped = [decision.skipped for decision in decisions.values() if decision.skipped is not None]
    assert saved == [4, 41, 44, 48]
    assert skipped == [8, 12, 16, 20, 24, 28, 32, 36, 40]
    in_memory = [i for i, decision in decisions.items() if decision.to_memory]
    longest = max(after - before for before, after in pairwise(in_memory))
    assert longest <= {1: 1, 3: 4, 100: 37}[interval], "memory keeps its own rhythm while storage hangs"


def test_while_a_copy_hangs_nothing_is_taken() -> None:
    decisions = played(20, every=4, interval=1, can_copy=lambda i: i < 6 or i > 17)
    taken = [i for i, decision in decisions.items() if decision.to_memory]
    assert taken == [1, 2, 3, 4, 5, 18, 19]
    assert decisions[18] == paid(16)


def test_a_checkpoint_that_was_never_due_is_not_made() -> None:
    """The state that was resumed is in storage already: the loop says that it is not due."""
    schedule = SaveScheduler(SaveIntervals(8))
    assert schedule.decide(16, False, status(False, False, 100)) == NOTHING


@pytest.mark.parametrize(
    ("cost_s", "busy_s", "step_s", "interval"),
    [
        (0.0, 0.0, 0.1, 1),
        (0.001, 0.0, 0.1, 1),  # exactly 1% of one step
        (0.0011, 0.0, 0.1, 2),
        (0.05, 0.0, 0.1, 50),
        (0.0, 0.3, 0.1, 30),  # copying for at most a tenth of the time
        (0.05, 0.3, 0.1, 50),
        (0.001, 2.0, 0.1, 200),
        (0.001, 1.5, 10.0, 2),
    ],
)
def test_the_interval_follows_from_the_cost(cost_s: float, busy_s: float, step_s: float, interval: int) -> None:
    assert affordable_interval(cost_s, busy_s, step_s) == interval


class Clock:
    """Time that passes when the test says so."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def perf_counter(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(policy, "time", clock)
    return clock


def paced(monkeypatch: pytest.MonkeyPatch, cores: int, processes: int, device: str = "cpu") -> SnapshotCost:
    monkeypatch.setattr(policy, "usable_cpus", lambda: cores)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    return SnapshotCost(torch.device(device), processes)


def take_steps(pace: SnapshotCost, clock: Clock, *lengths_s: float) -> None:
    for length_s in lengths_s:
        pace.step_begins()
        clock.now_s += length_s
        pace.step_ended()
        clock.now_s += 7.0  # an evaluation, which is no part of a step


def test_before_anything_is_known_a_state_is_taken(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    pace = paced(monkeypatch, cores=8, processes=2)
    assert pace.interval() == 1
    take_steps(pace, clock, 0.1)
    assert pace.interval() == 1
    pace.pause_s = 0.0
    pace.pause_s += 9.0
    assert pace.interval() == 1, "how long it takes is known when it is done"


def test_the_pause_and_the_copy_count(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    pace = paced(monkeypatch, cores=8, processes=2, device="cuda")
    take_steps(pace, clock, 0.1, 0.1, 0.1)
    pace.pause_s = 0.0
    pace.pause_s += 0.002
    pace.pause_s += 0.003
    pace.copied(busy_s=0.02, cpu_s=0.02)
    assert pace.interval() == 5
    pace.copied(busy_s=0.2, cpu_s=0.02)
    assert pace.interval() == 20
    pace.pause_s = 0.0
    pace.copied(busy_s=0.01, cpu_s=0.01)
    assert pace.interval() == 1, "the newest state counts alone"


@pytest.mark.parametrize(
    ("device", "cores", "interval"), [("cpu", 5, 12), ("cpu", 4, 40), ("cpu", 3, 40), ("cuda", 5, 4), ("cuda", 3, 4)]
)
def test_the_copy_takes_memory_bandwidth_from_training_and_where_none_is_spare_a_core(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, device: str, cores: int, interval: int
) -> None:
    pace = paced(monkeypatch, cores, processes=2, device=device)  # of two threads each
    take_steps(pace, clock, 0.1)
    pace.copied(busy_s=0.04, cpu_s=0.04)
    assert pace.interval() == interval


def test_one_slow_step_does_not_count_but_a_lasting_change_does(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    pace = paced(monkeypatch, cores=8, processes=2)
    pace.step_ended()  # that never began
    take_steps(pace, clock, 0.1, 0.1, 30.0, 0.1)
    pace.pause_s += 0.01
    pace.copied(busy_s=0.0, cpu_s=0.0)
    assert pace.interval() == 10
    take_steps(pace, clock, *[1.0] * 20)
    assert pace.interval() == 1


def test_the_merged_status_of_all_ranks_is_the_most_restrictive_of_each() -> None:
    ranks = [SaveStatus(True, False, 6, 5, False), SaveStatus(False, True, 7, 1, False), SaveStatus(False, False, 0, 7)]
    highest = [max(answers) for answers in zip(*ranks, strict=True)]
    assert SaveStatus(*highest) == SaveStatus(True, True, uploads_left=7, affordable_interval=7)
    lacking = SaveStatus(False, False, without_memory=True)
    assert SaveStatus(*World().agree(lacking).result()) == lacking
