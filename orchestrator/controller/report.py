"""Attempt report: the monitor tells the driver of each attempt, in events for its journal and lines for the user."""

from __future__ import annotations

from typing import Any

from orchestrator.cluster.mailbox import LOSS_IS_SEEN, MailboxWriter
from orchestrator.controller.budgets import Budgets
from orchestrator.controller.group_rescue import GroupRescue
from orchestrator.worker.failure import WorkerFailure


class AttemptReport:
    """Of all attempts of a driver, which it counts; number: of the present one."""

    def __init__(self, mailbox: Any) -> None:
        self._writer = MailboxWriter(mailbox)
        self.number = 0

    def emit(self, kind: str, **values: Any) -> None:
        """Post an event of this attempt."""
        self._writer.emit(kind, **{"number": self.number, **values})

    def failure(
        self, cause: str, ranks: list[int], text: str, rescued: GroupRescue | None = None, **values: Any
    ) -> None:
        """Post the event of a failure; ranks: those that have failed."""
        saved = rescued.to_event() if rescued else {}
        self.emit("failure", cause=str(cause), ranks=ranks, text=text, **values, **saved)

    def note(self, text: str, level: str = "INFO") -> None:
        """Post a line."""
        self._writer.note(text, level)

    def loss_is_seen(self) -> None:
        """Let the driver know at once, before the rescue: Ray's own words about the loss are on their way to it."""
        self._writer.post({"kind": LOSS_IS_SEEN})

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
