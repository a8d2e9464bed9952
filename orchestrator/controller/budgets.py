"""Budgets: whether another attempt is worth starting. Knows no Ray.

Each cause has a budget of its own. It is full again as soon as training has come a checkpoint further: a run on
machines that come and go for weeks never runs out of it, and a run that gets nowhere stops soon.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from orchestrator.worker.failure import Cause, WorkerFailure

_LIMITS = {
    Cause.OUT_OF_MEMORY: 3,
    Cause.HANG: 3,
    Cause.GPU_FAULT: 3,
}  # in a row without progress; of the others, max_failures
_FIRST_BACK_OFF_S, _LONGEST_BACK_OFF_S = 1.0, 60.0


class RunAbandonedError(Exception):
    """The run is not restarted any more; the message says why and what to do."""


def root_cause(failures: Iterable[WorkerFailure]) -> WorkerFailure:
    """Return the failure that explains the others: the first in the order of causes, then of ranks."""
    order = list(Cause)
    first = min(failures, key=lambda failure: (order.index(failure.cause), failure.rank))
    if first.cause is Cause.PEER_LOST:  # whose process is gone: a connection does not break by itself
        return replace(first, cause=Cause.WORKER_LOST)
    return first


@dataclass
class Budgets:
    """The failures that a run may have in a row without progress, and those that it has had.

    max_failures: of each cause; -1 = no limit.
    max_preemptions: of machines that are taken away with notice; -1 = no limit.
    refill_iters: iterations that count as progress.
    """

    max_failures: int
    max_preemptions: int
    refill_iters: int
    spent: dict[Cause, int] = field(default_factory=dict)
    at_iter: dict[Cause, int] = field(default_factory=dict)
    last_bug: tuple[str, int | None] | None = None

    def charge(self, failure: WorkerFailure, iter_num: int | None) -> float:
        """Charge a failure to its cause's budget, and return the seconds to wait; iter_num: how far training has come.

        Raises:
            RunAbandonedError: the budget is used up, or a bug of the user's has shown twice at the same place.
        """
        cause = failure.cause
        if cause is Cause.USER_ERROR:
            # who cannot tell, for its GPU answers no more, was as far as the others
            bug = (failure.text, failure.iter_num if failure.iter_num is not None else iter_num)
            if bug == self.last_bug:
                raise RunAbandonedError(
                    f"the same error at the same iteration ({bug[1]}), twice: it would come again. "
                    f"Rank {failure.rank}:\n{failure.traceback}"
                )
            self.last_bug = bug
        reached = iter_num if iter_num is not None else -1
        if cause not in self.at_iter or reached >= self.at_iter[cause] + self.refill_iters:
            self.spent[cause], self.at_iter[cause] = 0, reached
        self.spent[cause] += 1
        limit = self.limit_of(cause)
        if 0 <= limit < self.spent[cause]:
            raise RunAbandonedError(
                f"{cause}: {self.spent[cause]} times within {self.refill_iters} iterations, and the budget is "
                f"{limit} (--{'max_preemptions' if cause is Cause.PREEMPTED else 'max_failures'}). The last one, on "
                f"rank {failure.rank}: {failure.text}\n{failure.traceback}".rstrip()
            )
        return self._back_off_s(cause)

    def limit_of(self, cause: Cause) -> int:
        """Return how often a cause may end an attempt without progress in between; -1 = no limit."""
        if cause is Cause.PREEMPTED:
            return self.max_preemptions
        if self.max_failures < 0:
            return -1
        return min(self.max_failures, _LIMITS.get(cause, self.max_failures))

    def _back_off_s(self, cause: Cause) -> float:
        """Return 0 for the first time, then twice as long each time: what fails at once may need a moment."""
        if cause is Cause.PREEMPTED or self.spent[cause] == 1:
            return 0.0
        return float(min(_LONGEST_BACK_OFF_S, _FIRST_BACK_OFF_S * 2 ** (self.spent[cause] - 2)))
