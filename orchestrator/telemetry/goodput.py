"""Ledger: where the time of a run went, by the records of its drivers and workers. Knows no Ray and no storage.

Every second between the first driver's start and the last word belongs to one entry:

    productive   iterations that count, and their evaluations
    pause        training waited for a state to be saved
    start_up     from a driver's start to its first iteration, and after the last one until it ended
    detection    from the last iteration completed before a failure until the controller noticed it
    recovery     from there until the next attempt's first iteration
    waiting      no machines to run on, or no driver
    lost         iterations computed again

Goodput is the productive part. A run that you have stopped does not wait: that time does not count.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from orchestrator.telemetry.records import (
    AttemptEnded,
    AttemptPlaced,
    AttemptRunning,
    AttemptStarting,
    AttemptWaiting,
    Begin,
    CheckpointSaved,
    DriverEnded,
    DriverStarted,
    Evaluation,
    Failure,
    RollingBack,
    Stamped,
    Step,
    StepWindow,
)

ENTRIES = ("productive", "pause", "start_up", "detection", "recovery", "waiting", "lost")
# of an incident, in order; each is named after its end
PHASES = ("detect", "rescue", "tear_down", "wait", "place", "start", "set_up", "restore", "first_step")


@dataclass
class Incident:
    """A failure and what followed; phases: seconds, by the names in PHASES as far as the run came."""

    time: float
    cause: str
    where: str
    iter_num: int
    phases: dict[str, float] = field(default_factory=dict)
    steps_repeated: int = 0
    text: str = ""  # what was reported of it

    @property
    def total_s(self) -> float:
        """Return the time from the last iteration before it to the first one after."""
        return sum(self.phases.values())


@dataclass(frozen=True)
class Stretch:
    """Time that belongs to an entry, between two moments (seconds since 1970)."""

    entry: str
    begin_s: float
    end_s: float


class Ledger:
    """Takes records in the order of their time, those of events.jsonl and of metrics.jsonl together."""

    def __init__(self) -> None:
        self.stretches: list[Stretch] = []  # by time; pauses and lost iterations have no place of their own in it
        self.seconds = dict.fromkeys(ENTRIES, 0.0)
        self.incidents: list[Incident] = []
        self.drivers = self.attempts = 0
        self.iter_num = 0  # completed
        self.median_s: float | None = None
        self._now_s: float | None = None
        self._entry = "start_up"  # what the time that passes counts as
        self._before = "start_up"  # what counted before the first iteration of this attempt
        self._heard_s = 0.0  # when we last heard of the workers
        self._first_s: float | None = None  # the first iteration of an attempt, until a median is known
        self._is_driven = self._is_placing = False
        self._open: Incident | None = None
        self._mark_s = 0.0

    @property
    def wall_s(self) -> float:
        return sum(self.seconds.values())

    @property
    def goodput(self) -> float:
        """Return the productive part of the time, 0 before any passed."""
        return self.seconds["productive"] / self.wall_s if self.wall_s else 0.0

    def add(self, stamped: Stamped) -> None:
        """Take a record of any kind."""
        record, time_s = stamped.record, stamped.time_s
        match record:
            case DriverStarted():
                self._driver_started(time_s)
            case AttemptStarting() | AttemptWaiting():
                self._attempt_asked_for_room(time_s)
            case AttemptPlaced():
                self._pass(time_s)
                self._phase("place", time_s)
                self._is_placing = False
            case AttemptRunning():
                self._pass(time_s)
                self._phase("start", time_s)
            case Begin():
                self._began(record, time_s)
            case StepWindow() if None not in (record.count, record.step_s, record.eval_s, record.pause_s):
                self._stepped(record, time_s)
            case Failure():
                self._failed(record, time_s)
            case RollingBack():
                self._pass(time_s)
                self._incident("bad_numbers", "", time_s, record.why)
                self._entry = self._before = "recovery"
            case AttemptEnded():
                self._attempt_ended(time_s)
            case DriverEnded():
                self._attempt_ended(time_s)
                self._is_driven, self._is_placing = False, False
                self._open = None
                self._entry = "start_up"
        if isinstance(record, Step | StepWindow | Evaluation | CheckpointSaved):
            self._heard_s = time_s
        if isinstance(record, Step):
            self.iter_num = max(self.iter_num, record.iter + 1)

    def _pass(self, until_s: float, entry: str | None = None) -> None:
        """Book the time up to a moment; clocks of two machines differ a little, and nothing passes twice."""
        if self._now_s is not None and until_s > self._now_s:
            self.seconds[entry or self._entry] += until_s - self._now_s
            _append(self.stretches, Stretch(entry or self._entry, self._now_s, until_s))
        self._now_s = max(until_s, self._now_s or until_s)

    def _move(self, seconds: float, source: str, target: str) -> None:
        seconds = max(0.0, min(seconds, self.seconds[source]))
        self.seconds[source] -= seconds
        self.seconds[target] += seconds

    def _phase(self, name: str, until_s: float) -> None:
        if self._open:
            self._open.phases[name] = self._open.phases.get(name, 0.0) + max(0.0, until_s - self._mark_s)
            self._mark_s = until_s

    def _driver_started(self, time_s: float) -> None:
        if self._is_driven:  # the one before ended without a word
            self._pass(max(self._heard_s, self._now_s or 0.0))
            self._incident("driver_lost", "the driver's", self._heard_s or time_s)
            self._pass(time_s, "waiting")
            self._phase("wait", time_s)
        self._now_s = time_s  # between two drivers, the first of which ended: not counted
        self.drivers += 1
        self._is_driven, self._is_placing = True, False
        self._entry = self._before = "recovery" if self._open else "start_up"

    def _attempt_asked_for_room(self, time_s: float) -> None:
        self._pass(time_s, "waiting" if self._is_placing else None)  # asked before, and got no machines
        self._phase("wait" if self._is_placing else "tear_down", time_s)
        self._is_placing = True

    def _began(self, record: Begin, time_s: float) -> None:
        self._pass(time_s)
        self.attempts += 1
        repeated = max(0, self.iter_num - record.iter)
        if repeated:
            self._move(repeated * (self.median_s or 0.0), "productive", "lost")
        if self._open:
            self._phase("set_up", time_s - (record.restore_s or 0.0))
            self._phase("restore", time_s)
            self._open.steps_repeated = repeated
        self.iter_num = record.iter
        self._first_s, self._heard_s = None, time_s

    def _stepped(self, window: StepWindow, time_s: float) -> None:
        if self._entry != "productive":  # the first window of an attempt
            self._pass(time_s - (window.step_s + window.eval_s))
            self._entry = "productive"
            self._first_s = window.step_s if window.count == 1 else None
            self._phase("first_step", time_s)
            self._open = None
        elif self._first_s is not None and window.median_s is not None:  # it compiled, or filled caches
            self._move(self._first_s - window.median_s, "productive", self._before)
            self._first_s = None
        self._pass(time_s)
        self._move(window.pause_s, "productive", "pause")
        self.iter_num = max(self.iter_num, window.iter)
        if window.median_s is not None and window.count > 1:
            self.median_s = window.median_s

    def _failed(self, failure: Failure, time_s: float) -> None:
        heard_s = self._heard_s or time_s
        reached_s = min(heard_s if failure.reached_at_s is None else failure.reached_at_s, time_s)
        if self._entry == "productive":
            self._pass(reached_s)
            self._pass(time_s, "detection")
        else:  # it failed before it had done an iteration
            self._pass(time_s)
            reached_s = time_s
        self.iter_num = max(self.iter_num, failure.reached_iter or 0)
        self._incident(failure.cause or "unknown", failure.node or "", reached_s, failure.text or "")
        self._phase("detect", time_s)
        self._phase("rescue", time_s + (failure.rescue_s or 0.0))
        self._entry = self._before = "recovery"

    def _attempt_ended(self, time_s: float) -> None:
        self._pass(time_s, "start_up" if self._entry == "productive" else None)
        self._phase("tear_down", time_s)

    def _incident(self, cause: str, where: str, reached_s: float, text: str = "") -> None:
        self._open = Incident(reached_s, cause, where, self.iter_num, text=text)
        self.incidents.append(self._open)
        self._mark_s = reached_s


def _append(stretches: list[Stretch], stretch: Stretch) -> None:
    """Append a stretch, or let the last one go on where it is of the same entry."""
    last = stretches[-1] if stretches else None
    if last and (last.entry, last.end_s) == (stretch.entry, stretch.begin_s):
        stretch = Stretch(last.entry, stretches.pop().begin_s, stretch.end_s)
    stretches.append(stretch)


def account(records: Iterable[Stamped]) -> Ledger:
    """Return the ledger of a run's events and metrics, given in whatever order."""
    ledger = Ledger()
    for stamped in sorted(records, key=lambda stamped: stamped.time_s):
        ledger.add(stamped)
    return ledger


def summary_of(ledger: Ledger) -> str:
    """Return a line about where the time went."""
    wall_s = ledger.wall_s or 1.0
    parts = [f"{name.replace('_', '-')} {s / wall_s:.1%}" for name, s in ledger.seconds.items() if s / wall_s >= 0.0005]
    return f"goodput {ledger.goodput:.3f} of {duration(ledger.wall_s)}: {', '.join(parts)}"


def duration(seconds: float) -> str:
    """Return seconds as people read them: 12.3 s, 4 min 05 s, 3 h 20 min, 2 d 4 h."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    for unit, below, name, below_name in ((86400, 3600, "d", "h"), (3600, 60, "h", "min"), (60, 1, "min", "s")):
        if seconds >= unit:
            return f"{int(seconds // unit)} {name} {int(seconds % unit // below):02d} {below_name}"
    return f"{seconds:.0f} s"
