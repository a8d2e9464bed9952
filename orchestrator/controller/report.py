"""AttemptReport: how the monitor reports attempts to the driver, in events for its journal and lines for the user."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from orchestrator.cluster.mailbox import MailboxWriter
from orchestrator.controller.budgets import Budgets
from orchestrator.controller.group_rescue import GroupRescue
from orchestrator.telemetry.records import (
    AttemptEnded,
    AttemptPlaced,
    AttemptRunning,
    AttemptStarting,
    Failure,
    LossSeen,
)
from orchestrator.worker.failure import WorkerFailure


class AttemptReport:
    """One for all attempts of a driver. It counts them; number: of the present one."""

    def __init__(self, mailbox: Any) -> None:
        self._writer = MailboxWriter(mailbox)
        self.number = 0

    def starting(self, num_workers: int) -> None:
        """Count an attempt, and post that it asks for room."""
        self.number += 1
        self._writer.emit(AttemptStarting(number=self.number, num_workers=num_workers))

    def placed(self, num_workers: int) -> None:
        """Post that the workers are on their nodes."""
        self._writer.emit(AttemptPlaced(number=self.number, num_workers=num_workers))

    def running(self, nodes: list[str]) -> None:
        """Post that the workers run our code; nodes: host names by rank."""
        self._writer.emit(AttemptRunning(number=self.number, num_workers=len(nodes), nodes=nodes))

    def ended(self) -> None:
        """Post that the workers are gone."""
        self._writer.emit(AttemptEnded(number=self.number))

    def refused(self, failure: WorkerFailure, ranks: list[int], node: str) -> None:
        """Post a failure before training begins; ranks: all that are unfit."""
        self._writer.emit(
            Failure(number=self.number, cause=str(failure.cause), ranks=ranks, text=failure.text, node=node)
        )

    def failed(self, failure: WorkerFailure, ranks: list[int], node: str, rescued: GroupRescue, seen_s: float) -> None:
        """Post a failure that was seen at a time, and what came of the rescue; ranks: all that have failed."""
        event = Failure(
            number=self.number,
            cause=str(failure.cause),
            ranks=ranks,
            text=failure.text,
            node=node,
            traceback=failure.traceback,
        )
        self._writer.emit(_with_rescue(event, rescued), seen_s)

    def resized(self, rescued: GroupRescue, seen_s: float) -> None:
        """Post that Ray ends a healthy group because another number of workers can run."""
        event = Failure(number=self.number, cause="resized", ranks=[], text="the number of machines has changed")
        self._writer.emit(_with_rescue(event, rescued), seen_s)

    def note(self, text: str, level: str = "INFO") -> None:
        """Post a line."""
        self._writer.note(text, level)

    def loss_is_seen(self) -> None:
        """Let the driver know at once, before the rescue: Ray's own words about the loss are on their way to it."""
        self._writer.emit(LossSeen())

    def lost(self, failure: WorkerFailure, node: str, budgets: Budgets) -> None:
        """Say what was lost, and what is left of the budget that it was charged to."""
        spent, limit = budgets.spent[failure.cause], budgets.limit_of(failure.cause)
        of = "" if limit < 0 else f" of {limit}"
        where = f"rank {failure.rank} on {node}"
        self.note(f"attempt lost ({failure.cause}, {spent}{of}): {where}: {failure.text}", "WARNING")

    def resumes(self, iter_num: int | None) -> None:
        """Say where the next attempt starts; iter_num: the iteration that the rescue has saved, None for none."""
        if iter_num is None:
            self.note("the next attempt starts from the newest checkpoint")
        else:
            self.note(f"iteration {iter_num} is safe in node memory: the next attempt starts there")


def _with_rescue(failure: Failure, rescued: GroupRescue) -> Failure:
    return replace(
        failure,
        rescue_s=rescued.seconds,
        ranks_rescued=rescued.ranks_rescued,
        reached_iter=rescued.iter_num,
        reached_at_s=rescued.reached_at_s,
    )
