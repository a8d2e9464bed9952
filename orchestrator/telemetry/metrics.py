"""The run's metrics as JSON lines in its folder: written by rank 0, read by reports and tools.

    <out_dir>/metrics.jsonl                        on a disk: appended to, a line per record
             /metrics-<iter>-<attempt>.jsonl       on an object store, which cannot append: parts
             /events.jsonl, events-*.jsonl         the same, of the driver: attempts, failures and recoveries

A line has a record's `kind` (step, eval, checkpoint, ...), its `iter`, its stamp (`attempt`, `time`) and its own keys.
Losing metrics must never end or hold up a training run. Knows no model and no other sink (`sinks.py`).
"""

from __future__ import annotations

import json
import logging
import math
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, count
from typing import Any

from orchestrator.errors import CheckpointError
from orchestrator.storage.reasons import reason_of
from orchestrator.storage.run_folder import RunFolder
from orchestrator.telemetry.records import Evaluation, LoopRecord, Records, Stamped, Step, has_right_types, is_known

logger = logging.getLogger(__name__)

_COMPUTED = (Step.kind, Evaluation.kind)  # kinds of which an iteration has one record, however often it was computed
_PART_BYTES = 256 * 1024  # a part grows to about this size, so that weeks of training are hundreds of parts
_YEAR_9999_S = 253_370_764_800  # later, there are no dates
_KEPT_LINES = 100_000  # while storage does not answer: about 20 MB
_DECODER = json.JSONDecoder(parse_constant=lambda _: None)  # NaN and Infinity, no JSON, are null as in `to_line`


class MetricsLog:
    """A sink that keeps every record in the run's folder. If that fails it warns once, keeps the lines and tries again.

    attempt: the name of this start of the run, for the parts' names; no two share one.
    stem: the beginning of the file's name. The driver keeps `events` (attempts, failures), a file of its own.
    flush_interval_s: on an object store, how many seconds of records a crash may lose.
    """

    def __init__(
        self,
        folder: RunFolder,
        attempt: str,
        *,
        flush_interval_s: float = 30.0,
        close_timeout_s: float = 10.0,
        clock: Callable[[], float] = time.time,
        stem: str = "metrics",
    ) -> None:
        self._folder, self._attempt, self._stem = folder, attempt, stem
        self._flush_interval_s, self._close_timeout_s = flush_interval_s, close_timeout_s
        self._clock = clock
        self._flushed_at = clock()
        self._iter = 0
        self._lines: list[tuple[int, str]] = []  # (iter, line) not stored yet; the upload thread only removes from it
        self._lock = threading.Lock()
        self._upload: threading.Thread | None = None
        self._part_name, self._part, self._part_names = "", "", set[str]()
        self._is_failing = False

    def write(self, stamped: Stamped) -> None:
        """Keep a record; on a disk it is there when this returns. Without `iter` it belongs to the one before."""
        if isinstance(stamped.record, LoopRecord):
            self._iter = stamped.record.iter
        line = to_line({"iter": self._iter, **stamped.to_json()})
        with self._lock:
            self._lines.append((self._iter, line))
        if self._folder.is_local or self._clock() - self._flushed_at >= self._flush_interval_s:
            self.flush()

    def flush(self) -> None:
        """Store the records written so far; uploads run in the background, training does not wait for them."""
        self._flushed_at = self._clock()
        if self._folder.is_local:
            self._store()
        elif not (self._upload and self._upload.is_alive()):  # else these lines go with the next upload
            self._upload = threading.Thread(target=self._store, name="metrics upload", daemon=True)
            self._upload.start()

    def close(self) -> None:
        """Store what is left; storage that does not answer within close_timeout_s costs the records not yet there."""
        deadline_s = time.monotonic() + self._close_timeout_s
        self._wait(deadline_s)
        self.flush()  # does nothing while that upload hangs
        self._wait(deadline_s)
        if self._lines:
            logger.warning("%d metrics records were not written to %s", len(self._lines), self._folder.root)

    def _wait(self, deadline_s: float) -> None:
        if self._upload:
            self._upload.join(max(0.0, deadline_s - time.monotonic()))

    def _store(self) -> None:
        with self._lock:
            lines = list(self._lines)
        if not lines:
            return
        try:
            if self._folder.is_local:
                self._folder.append(f"{self._stem}.jsonl", "".join(line for _, line in lines))
            else:
                self._put(lines)
        except CheckpointError as error:
            self._keep_for_later(error)
            return
        with self._lock:
            del self._lines[: len(lines)]
        if self._is_failing:
            logger.info("%s are written to %s again", self._stem, self._folder.root)
        self._is_failing = False

    def _put(self, lines: list[tuple[int, str]]) -> None:
        """Put the newest part again with these lines added, or begin another where it is large."""
        if not self._part_names or len(self._part) >= _PART_BYTES:
            begin = f"{self._stem}-{lines[0][0]:08d}-{self._attempt}"
            # after a rollback an attempt begins parts at the same iteration: a number tells them apart
            names = chain([f"{begin}.jsonl"], (f"{begin}-{n}.jsonl" for n in count(2)))
            self._part_name, self._part = next(name for name in names if name not in self._part_names), ""
        part = self._part + "".join(line for _, line in lines)
        self._folder.write(self._part_name, part.encode())
        self._part = part
        self._part_names.add(self._part_name)

    def _keep_for_later(self, error: CheckpointError) -> None:
        if not self._is_failing:
            told = self._stem, self._folder.root, reason_of(error.__cause__ or error)
            logger.warning("%s cannot be written to %s (%s); training goes on, trying again", *told)
        self._is_failing = True
        with self._lock:
            del self._lines[:-_KEPT_LINES]


def read_records(folder: RunFolder) -> Records:
    """Return all that can be read of a run's records; none where it has written none.

    Raises:
        CheckpointError: the storage cannot be read.
    """
    left_out: dict[str, int] = {}
    events = _read_by_time(folder, "events", left_out)
    latest, superseded = _latest(_read_by_time(folder, "metrics", left_out))
    return Records(_typed(events), _typed(latest), _typed(superseded), left_out)


def read_metrics(folder: RunFolder) -> list[Stamped]:
    """Return all records of a run by iteration; of a step or evaluation computed twice, the one computed last.

    A line cut off by a crash is left out, and so is a kind of a newer version. A run without metrics has none.

    Raises:
        CheckpointError: the storage cannot be read.
    """
    return _typed(_latest(_read_by_time(folder, "metrics", {}))[0])


def read_events(folder: RunFolder) -> list[Stamped]:
    """Return the events of a run's attempts, by time, as its drivers have kept them.

    Raises:
        CheckpointError: the storage cannot be read.
    """
    return _typed(_read_by_time(folder, "events", {}))


def _latest(values: Iterable[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return values by iteration, equal ones once, and those that were computed again later."""
    found: dict[Any, dict[str, Any]] = {}
    superseded = []
    for value in values:
        is_computed = value["kind"] in _COMPUTED
        key = (value["kind"], value["iter"]) if is_computed else json.dumps(value, sort_keys=True)
        if (before := found.pop(key, value)) != value:  # the last one takes its own place in time
            superseded.append(before)
        found[key] = value
    return sorted(found.values(), key=lambda value: value["iter"]), superseded


def _typed(values: list[dict[str, Any]]) -> list[Stamped]:
    return [stamped for value in values if (stamped := Stamped.from_json(value))]


def _read_by_time(folder: RunFolder, stem: str, left_out: dict[str, int]) -> list[dict[str, Any]]:
    try:
        return sorted(_read_lines(folder, stem, left_out), key=lambda value: value["time"])
    except CheckpointError as error:
        reason = reason_of(error.__cause__ or error)
        raise CheckpointError(f"{stem} in {folder.out_dir} cannot be read: {reason}") from error


def _read_lines(folder: RunFolder, stem: str, left_out: dict[str, int]) -> Iterator[dict[str, Any]]:
    for name in sorted(name for name in folder.list() if re.fullmatch(rf"{stem}(-.+)?\.jsonl", name)):
        damaged = unknown = 0
        for line in (folder.read(name) or b"").decode(errors="replace").splitlines():
            value = _parse(line)
            if value:
                yield value
                unknown += not is_known(value)
            damaged += bool(line.strip()) and value is None
        if damaged:
            logger.warning("%s: left out %d cut off or damaged line(s)", folder.path(name), damaged)
        if damaged + unknown:
            left_out[name] = damaged + unknown


def _parse(line: str) -> dict[str, Any] | None:
    try:
        value = _DECODER.decode(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) and _is_record(value) else None


def _is_record(value: dict[str, Any]) -> bool:
    if not value.keys() >= {"kind", "iter", "attempt", "time"}:
        return False
    stamp = isinstance(value["kind"], str) and isinstance(value["attempt"], str)
    iteration = isinstance(value["iter"], int) and 0 <= value["iter"] < 2**31
    times = _is_time(value["time"]) and _is_time(value.get("reached_at_s") or 0)
    return stamp and iteration and times and has_right_types(value)


def _is_time(value: Any) -> bool:
    return isinstance(value, int | float) and 0 <= value < _YEAR_9999_S


def to_line(value: dict[str, Any]) -> str:
    """Return JSON values as one line of standard JSON: numbers that JSON does not have (NaN, infinity) become null."""
    finite = {key: None if isinstance(x, float) and not math.isfinite(x) else x for key, x in value.items()}
    return json.dumps(finite, allow_nan=False) + "\n"
