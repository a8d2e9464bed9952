"""When a state is saved, and where. Decided from values on which all ranks have agreed, so alike on all of them.

Two intervals: a checkpoint in storage every `checkpoint_interval` iterations, and between them a snapshot in node
memory as often as that costs next to nothing. Training waits for neither. If a checkpoint is due while the previous
upload is still running, we postpone it, and upload the newest state when storage is free. Knows no files and no ranks.
"""

from __future__ import annotations

import math
import time
from collections import deque
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

import torch

from orchestrator.host.machine import usable_cpus

COST_FRACTION = 0.01  # of a step's time, averaged over all steps, may go into snapshots
_BUSY_FRACTION = 0.1  # of the time snapshots may be copied at all: copying takes memory bandwidth from training
_STEPS = 20  # of which the median counts
_BANDWIDTH_FRACTION = 0.3  # by how much a copy on another core slows training down, which needs the same memory


@dataclass(frozen=True)
class SaveIntervals:
    """The user's settings.

    checkpoint_interval: iterations between checkpoints in storage.
    snapshot_interval: between snapshots in node memory; 0 for as many as cost next to nothing.
    keep: the number of newest checkpoints that stay in storage, besides the best.
    """

    checkpoint_interval: int
    snapshot_interval: int = 0
    keep: int = 2


class SaveStatus(NamedTuple):
    """How far a rank is with saving, in integers for `World.agree`; the highest of each, how far the slowest one is.

    is_copying, is_uploading: the previous snapshot, the previous checkpoint is still on its way. A snapshot is whole
        once every rank has published it: until then the one before must not be overwritten anywhere.
    uploads_left: how many have begun and not ended, failed ones among the ended.
    affordable_interval: iterations between snapshots that cost next to nothing.
    without_memory: node memory cannot be used.
    """

    is_copying: int
    is_uploading: int
    uploads_left: int = 0
    affordable_interval: int = 1
    without_memory: int = False


@dataclass(frozen=True)
class Decision:
    """Where the state of this iteration goes.

    skipped: the iteration of a postponed checkpoint that will never be saved, for this one takes its place.
    """

    to_memory: bool = False
    to_storage: bool = False
    skipped: int | None = None


@dataclass
class SaveScheduler:
    """Decides at every iteration.

    owed: the iteration of a checkpoint that is postponed because storage was busy.
    last: the iteration of the last snapshot.
    """

    intervals: SaveIntervals
    owed: int | None = None
    last: int = -1

    def decide(self, iter_num: int, is_due: bool, agreed: SaveStatus) -> Decision:
        """Return where the state of this iteration goes.

        is_due: it should go to storage. agreed: the merged status of all ranks.
        """
        skipped = None
        interval = agreed.affordable_interval
        if is_due:
            skipped, self.owed = self.owed, iter_num
        if self.owed is not None and not agreed.is_copying and not agreed.is_uploading:
            skipped = self.owed if self.owed != iter_num else skipped
            self.owed, self.last = None, iter_num
            return Decision(to_memory=True, to_storage=True, skipped=skipped)
        until_due = -iter_num % self.intervals.checkpoint_interval
        is_time = iter_num - self.last >= interval and not 0 < until_due < interval  # that one will do as well
        if is_time and not agreed.is_copying:
            self.last = iter_num
            return Decision(to_memory=True, skipped=skipped)
        return Decision(skipped=skipped)


class SnapshotTotals(NamedTuple):
    """Snapshots that one rank has published: how many, their seconds and their bytes."""

    copies: int = 0
    seconds: float = 0.0
    size_bytes: int = 0

    def plus(self, other: SnapshotTotals) -> SnapshotTotals:
        return SnapshotTotals(
            self.copies + other.copies, self.seconds + other.seconds, self.size_bytes + other.size_bytes
        )

    def since(self, earlier: SnapshotTotals) -> SnapshotTotals:
        return self.plus(SnapshotTotals(-earlier.copies, -earlier.seconds, -earlier.size_bytes))


class SnapshotCost:
    """Measures on one rank how long steps and snapshots take. processes: the ranks that share this node's cores.

    pause_s: how long training has waited for the newest snapshot. published: all snapshots so far.
    """

    def __init__(self, device: torch.device, processes: int) -> None:
        cores = usable_cpus()
        self._is_on_gpu = device.type == "cuda"
        self._has_spare_core = cores > processes * torch.get_num_threads()
        self._steps_s: deque[float] = deque(maxlen=_STEPS)
        self._began_s = 0.0
        self.pause_s = self._busy_s = self._cpu_s = 0.0  # of the newest snapshot
        self._is_measured = False
        self.published = SnapshotTotals()

    def step_begins(self) -> None:
        """Note the beginning of a training step, which `step_ended` ends."""
        self._began_s = time.perf_counter()

    def step_ended(self) -> None:
        """Note the end of a step; without a beginning it does not count."""
        if self._began_s:
            self._steps_s.append(time.perf_counter() - self._began_s)

    def copied(self, busy_s: float, cpu_s: float, size_bytes: int = 0) -> None:
        """Note how long a snapshot was copied in the background, and how much of a core's time that took."""
        self.published = self.published.plus(SnapshotTotals(1, busy_s, size_bytes))
        self._busy_s, self._cpu_s = busy_s, cpu_s
        self._is_measured = True

    def interval(self) -> int:
        """Return after how many iterations the next snapshot is affordable; 1 before anything is measured."""
        if not (self._is_measured and self._steps_s):
            return 1
        if self._is_on_gpu:
            taken_s = 0.0  # by the copy in the background, from training: it computes elsewhere
        else:
            taken_s = _BANDWIDTH_FRACTION * self._busy_s if self._has_spare_core else self._cpu_s
        return affordable_interval(self.pause_s + taken_s, self._busy_s, median(self._steps_s))


def affordable_interval(cost_s: float, busy_s: float, step_s: float) -> int:
    """Return after how many iterations the next snapshot is affordable.

    cost_s: what one takes away from training; busy_s: for how long it is copied behind; step_s: of an iteration.
    """
    return max(1, math.ceil(cost_s / (COST_FRACTION * step_s)), math.ceil(busy_s / (_BUSY_FRACTION * step_s)))
