"""When a state is taken: pure functions and values, the same on all ranks, for they decide by what all have agreed on.

Two rhythms: a checkpoint in storage every `checkpoint_interval` iterations, and between them a state in node memory as
often as that costs next to nothing. Training waits for neither. A checkpoint that comes due while the one before is
still being uploaded is owed, and the first state after that pays: the newest wins.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

COST_FRACTION = 0.01  # of a step's time, averaged over all steps, may go into states in node memory
_BUSY_FRACTION = 0.1  # of the time states may be copied at all: copying takes memory bandwidth from training


@dataclass(frozen=True)
class SaveIntervals:
    """What the user has asked for.

    checkpoint_interval: iterations between checkpoints in storage.
    snapshot_interval: between states in node memory, 0 for as many as cost next to nothing.
    keep: the number of newest checkpoints that stay in storage, besides the best.
    """

    checkpoint_interval: int
    snapshot_interval: int = 0
    keep: int = 2


@dataclass(frozen=True)
class Decision:
    """What happens to the state of this iteration.

    skipped: the iteration of a checkpoint that was due and will never be, for this one takes its place.
    """

    to_memory: bool = False
    to_storage: bool = False
    skipped: int | None = None


@dataclass
class SaveScheduler:
    """What has become of the intervals so far.

    owed: the iteration of a checkpoint that came due while storage was busy.
    last: the iteration whose state was taken last.
    """

    intervals: SaveIntervals
    owed: int | None = None
    last: int = -1

    def decide(self, iter_num: int, is_due: bool, can_copy: bool, can_upload: bool, interval: int) -> Decision:
        """Return what to do now.

        is_due: this iteration's state should go to storage.
        can_copy, can_upload: no rank is still copying, uploading the one before.
        interval: what all ranks can afford between states in node memory.
        """
        skipped = None
        if is_due:
            skipped, self.owed = self.owed, iter_num
        if self.owed is not None and can_copy and can_upload:
            skipped = self.owed if self.owed != iter_num else skipped
            self.owed, self.last = None, iter_num
            return Decision(to_memory=True, to_storage=True, skipped=skipped)
        until_due = -iter_num % self.intervals.checkpoint_interval
        is_time = iter_num - self.last >= interval and not 0 < until_due < interval  # that one will do as well
        if can_copy and is_time:
            self.last = iter_num
            return Decision(to_memory=True, skipped=skipped)
        return Decision(skipped=skipped)


def affordable_interval(cost_s: float, busy_s: float, step_s: float) -> int:
    """Return after how many iterations the next state may be taken.

    cost_s: what one takes away from training; busy_s: for how long it is copied behind; step_s: of an iteration.
    """
    return max(1, math.ceil(cost_s / (COST_FRACTION * step_s)), math.ceil(busy_s / (_BUSY_FRACTION * step_s)))
