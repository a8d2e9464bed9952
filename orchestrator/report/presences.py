"""Presences: which rank was on which node, from when to when, by the events of a run or, without Ray, its metrics."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.telemetry.goodput import Stretch
from orchestrator.telemetry.records import (
    AttemptEnded,
    AttemptPlaced,
    AttemptRunning,
    Begin,
    DriverEnded,
    DriverStarted,
    Evaluation,
    Failure,
    Records,
    Stamped,
    StepWindow,
)


@dataclass(frozen=True)
class Presence:
    """A rank of one attempt, while it was there (seconds since 1970); node: "" where nobody has recorded it."""

    rank: int
    node: str
    begin_s: float
    end_s: float


def presences_of(records: Records) -> list[Presence]:
    """Return where the ranks of every attempt were, by time."""
    by_time = sorted([*records.events, *records.metrics], key=lambda stamped: stamped.time_s)
    return _by_events(by_time) if records.events else _by_metrics(by_time)


def _by_events(by_time: list[Stamped]) -> list[Presence]:
    found: list[Presence] = []
    running: AttemptRunning | None = None
    placed_s = heard_s = 0.0
    failed_s: dict[int, float] = {}  # by rank

    def close(end_s: float) -> None:
        nonlocal running
        if running:
            count = running.num_workers or len(running.nodes or ())
            nodes = running.nodes if running.nodes and len(running.nodes) == count else [""] * count
            found.extend(
                Presence(rank, str(node), placed_s, failed_s.get(rank, end_s)) for rank, node in enumerate(nodes)
            )
        running = None
        failed_s.clear()

    for stamped in by_time:
        time_s = stamped.time_s
        match stamped.record:
            case DriverStarted():
                close(heard_s)  # the driver before has ended without a word
            case AttemptPlaced():
                close(heard_s)
                placed_s = time_s
            case AttemptRunning():
                running = stamped.record
            case Failure(ranks=ranks, reached_at_s=reached_s):
                failed_s |= dict.fromkeys(ranks or (), min(time_s, reached_s or time_s))
            case DriverEnded():
                close(time_s)
            case AttemptEnded(number=number) if running and number in (running.number, None):
                close(time_s)
        heard_s = time_s
    close(heard_s)
    return found


def _by_metrics(by_time: list[Stamped]) -> list[Presence]:
    found: list[Presence] = []
    begun: Begin | None = None
    begun_s = heard_s = 0.0

    def close() -> None:
        if begun:
            found.extend(Presence(rank, "", begun_s, heard_s) for rank in range(begun.world_size or 1))

    for stamped in by_time:
        if isinstance(stamped.record, Begin):  # of a start, or of what a rollback has built anew
            close()
            begun, begun_s = stamped.record, stamped.time_s - (stamped.record.restore_s or 0.0)
        heard_s = stamped.time_s
    close()
    return found


def evaluations_of(metrics: list[Stamped]) -> list[Stretch]:
    """Return when all ranks evaluated: records tell the end of each, and of some in a row how long they took."""
    found: list[Stretch] = []
    ends_s: list[float] = []
    for stamped in sorted(metrics, key=lambda each: each.time_s):
        match stamped.record:
            case Evaluation():
                ends_s.append(stamped.time_s)
            case Begin():
                ends_s.clear()
            case StepWindow(eval_s=float(eval_s)) if ends_s:
                found += [Stretch("evaluation", end_s - eval_s / len(ends_s), end_s) for end_s in ends_s]
                ends_s.clear()
    return found
