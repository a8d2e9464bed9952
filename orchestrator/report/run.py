"""Run: what a page shows of a run. Its logged iterations as arrays, its ledger, and facts in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from orchestrator.report.thinning import Array
from orchestrator.telemetry.goodput import Ledger, account
from orchestrator.telemetry.records import (
    Begin,
    DriverEnded,
    DriverStarted,
    Evaluation,
    Records,
    RollingBack,
    Stamped,
    Step,
    StepSkipped,
)


@dataclass(frozen=True)
class Table:
    """Rows of texts below a head; a row's first cell names it."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Run:
    """A run, as its records tell of it.

    name: for people, such as its out_dir. settings: key -> text, those that differ from the defaults.
    facts: title -> name -> text, of model, data and environment. commands: text -> a command line that does it.
    unreadable: sentences about what could not be read.
    """

    name: str
    records: Records
    settings: dict[str, str] = field(default_factory=dict)
    facts: dict[str, dict[str, str]] = field(default_factory=dict)
    checkpoints: Table | None = None
    commands: dict[str, str] = field(default_factory=dict)
    unreadable: Sequence[str] = ()

    @cached_property
    def ledger(self) -> Ledger:
        """Where its time went."""
        records = self.records
        return account([*(records.events or _starts_and_ends(records.metrics)), *records.metrics])

    @cached_property
    def steps(self) -> dict[str, Array]:
        """Its logged iterations, by the names of Step's fields: arrays (N,), NaN for what is not known."""
        return columns([x.record for x in self.records.metrics if isinstance(x.record, Step)])

    @cached_property
    def undone_steps(self) -> dict[str, Array]:
        """Logged iterations that were computed again later, by time, in arrays as above."""
        return columns([x.record for x in self.records.superseded if isinstance(x.record, Step)])

    @cached_property
    def evaluations(self) -> list[Evaluation]:
        return [
            x.record for x in self.records.metrics if isinstance(x.record, Evaluation) and x.record.val_loss is not None
        ]

    @cached_property
    def best(self) -> Evaluation | None:
        """The evaluation with the lowest validation loss."""
        return min(self.evaluations, key=lambda each: each.val_loss, default=None)

    @cached_property
    def rollbacks(self) -> list[RollingBack]:
        return [x.record for x in self.records.metrics if isinstance(x.record, RollingBack)]

    @cached_property
    def skipped_steps(self) -> list[StepSkipped]:
        return [x.record for x in self.records.metrics if isinstance(x.record, StepSkipped)]

    @cached_property
    def begins(self) -> list[Begin]:
        """The beginnings of its attempts, by time."""
        by_time = sorted(self.records.metrics, key=lambda stamped: stamped.time_s)
        return [x.record for x in by_time if isinstance(x.record, Begin)]


def columns(steps: Sequence[Step]) -> dict[str, Array]:
    """Return the fields of N steps as arrays (N,); what is not known or not finite is NaN."""
    names = ("iter", "loss", "lr", "dt_s", "mfu", "tflops", "tokens_per_s", "grad_norm")
    found = {name: np.array([getattr(step, name) for step in steps], dtype=np.float64) for name in names}
    return {name: np.where(np.isfinite(values), values, np.nan) for name, values in found.items()}


def _starts_and_ends(metrics: Sequence[Stamped]) -> list[Stamped]:
    """Return a driver's start and end around each attempt of a run without events, which was trained without Ray.

    Nobody has recorded what came between two attempts. A rollback's next attempt belongs to the same start.
    """
    found: list[Stamped] = []
    last: Stamped | None = None
    for stamped in sorted(metrics, key=lambda each: each.time_s):
        if isinstance(stamped.record, Begin) and not (last and isinstance(last.record, RollingBack)):
            if last:
                found.append(Stamped(DriverEnded(outcome=""), last.time_s))
            found.append(Stamped(DriverStarted(start_id=""), stamped.time_s - (stamped.record.restore_s or 0.0)))
        last = stamped
    return [*found, Stamped(DriverEnded(outcome=""), last.time_s)] if last else []
