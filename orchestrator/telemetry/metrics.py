"""The run's metrics as JSON lines in its folder: written by rank 0, read by reports and tools.

    <out_dir>/metrics.jsonl                        on a disk: appended to, a line per record
             /metrics-<iter>-<attempt>.jsonl       on an object store, which cannot append: parts
             /events.jsonl, events-*.jsonl         the same, of the driver: attempts, failures and recoveries

A record has a `kind` (step, eval, checkpoint, ...), its `iter`, the `attempt` that computed it and its `time` (seconds
since 1970). Losing metrics must never end or hold up a training run. Knows no model and no other sink (`sinks.py`).
"""

from __future__ import annotations

import json
import logging
import math
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from orchestrator.errors import CheckpointError
from orchestrator.storage.reasons import is_refused, lacks_bucket, reason_of
from orchestrator.storage.transfer import locate, make_folder, renewed

logger = logging.getLogger(__name__)

Record = dict[str, Any]

_COMPUTED = ("step", "eval")  # kinds of which an iteration has one record, however often it was computed
_PART_BYTES = 256 * 1024  # a part grows to about this size, so that weeks of training are hundreds of parts
_KEPT_LINES = 100_000  # while storage does not answer: about 20 MB


class MetricsLog:
    """A sink that keeps every record in the run's folder. Where that fails it warns once, keeps lines and tries again.

    attempt: the name of this start of the run; no two share one.
    stem: what the file's name begins with. The driver keeps `events` (attempts, failures), a file of its own.
    flush_interval_s: on an object store, how many seconds of records a crash may lose.
    """

    def __init__(
        self,
        out_dir: str,
        attempt: str,
        *,
        storage_options: dict[str, Any] | None = None,
        flush_interval_s: float = 30.0,
        close_timeout_s: float = 10.0,
        clock: Callable[[], float] = time.time,
        stem: str = "metrics",
    ) -> None:
        self._out_dir, self._storage_options = out_dir, storage_options
        self._fs, self._root = locate(out_dir, storage_options)
        self.is_local = isinstance(self._fs, LocalFileSystem)
        self._attempt, self._stem = attempt, stem
        self._flush_interval_s, self._close_timeout_s = flush_interval_s, close_timeout_s
        self._clock = clock
        self._flushed_at = clock()
        self._iter = 0
        self._lines: list[tuple[int, str]] = []  # (iter, line) not stored yet; the upload thread only removes from it
        self._lock = threading.Lock()
        self._upload: threading.Thread | None = None
        self._part_name, self._part, self._part_names = "", "", set[str]()
        self._is_failing = False

    def write(self, record: Record) -> None:
        """Keep a record; on a disk it is there when this returns. Without `iter` it belongs to the one before."""
        now = self._clock()
        self._iter = int(record.get("iter", self._iter))
        line = to_line({"iter": self._iter, "attempt": self._attempt, "time": now, **record})
        with self._lock:
            self._lines.append((self._iter, line))
        if self.is_local or now - self._flushed_at >= self._flush_interval_s:
            self.flush()

    def flush(self) -> None:
        """Store what was written; uploads go on behind, training does not wait for them."""
        self._flushed_at = self._clock()
        if self.is_local:
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
            logger.warning("%d metrics records were not written to %s", len(self._lines), self._root)

    def _wait(self, deadline_s: float) -> None:
        if self._upload:
            self._upload.join(max(0.0, deadline_s - time.monotonic()))

    def _store(self) -> None:
        with self._lock:
            lines = list(self._lines)
        if not lines:
            return
        try:
            self._append(lines) if self.is_local else self._insist(lines)
        except Exception as error:  # whatever a disk or a storage library fails with: training goes on
            self._keep_for_later(error)
            return
        with self._lock:
            del self._lines[: len(lines)]
        if self._is_failing:
            logger.info("%s are written to %s again", self._stem, self._root)
        self._is_failing = False

    def _append(self, lines: list[tuple[int, str]]) -> None:
        path = Path(self._root, f"{self._stem}.jsonl")
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+") as file:
            text = "".join(line for _, line in lines)
            file.write((text if _ends_whole(file) else "\n" + text).encode())

    def _insist(self, lines: list[tuple[int, str]]) -> None:
        """Put them; where storage refuses that, read the credentials again, which somebody may have renewed."""
        try:
            self._put(lines)
        except Exception as error:
            if not is_refused(error):
                raise
            self._fs, self._storage_options = renewed(self._fs, self._out_dir, self._storage_options)
            self._put(lines)

    def _put(self, lines: list[tuple[int, str]]) -> None:
        """Put the newest part again with these lines added, or begin another where it is large."""
        if not self._part_names or len(self._part) >= _PART_BYTES:
            self._part_name, self._part = self._new_name(lines[0][0]), ""
            make_folder(self._fs, self._root)
        part = self._part + "".join(line for _, line in lines)
        self._fs.pipe_file(f"{self._root.rstrip('/')}/{self._part_name}", part.encode())
        self._part = part
        self._part_names.add(self._part_name)

    def _new_name(self, iter_num: int) -> str:
        names = (f"{self._stem}-{iter_num:08d}-{self._attempt}{suffix}.jsonl" for suffix in _suffixes())
        return next(name for name in names if name not in self._part_names)

    def _keep_for_later(self, error: Exception) -> None:
        if not self._is_failing:
            told = self._stem, self._root, reason_of(error)
            logger.warning("%s cannot be written to %s (%s); training goes on, trying again", *told)
        self._is_failing = True
        with self._lock:
            del self._lines[:-_KEPT_LINES]


def read_metrics(out_dir: str, storage_options: dict[str, Any] | None = None) -> list[Record]:
    """Return all records of a run by iteration; of a step or evaluation computed twice, the one computed last.

    A line cut off by a crash is left out. A run without metrics has none.

    Raises:
        CheckpointError: the storage cannot be read.
    """
    found: dict[Any, Record] = {}
    for record in _read_records(out_dir, storage_options, "metrics"):
        is_computed = record["kind"] in _COMPUTED
        key = (record["kind"], record["iter"]) if is_computed else json.dumps(record, sort_keys=True)
        found.pop(key, None)  # the last one takes its own place in time
        found[key] = record
    return sorted(found.values(), key=lambda record: record["iter"])


def read_events(out_dir: str, storage_options: dict[str, Any] | None = None) -> list[Record]:
    """Return what the drivers of a run have told of its attempts, by time.

    Raises:
        CheckpointError: the storage cannot be read.
    """
    return _read_records(out_dir, storage_options, "events")


def _read_records(out_dir: str, storage_options: dict[str, Any] | None, stem: str) -> list[Record]:
    fs, root = locate(out_dir, storage_options)
    try:
        return sorted(_read_lines(fs, root, stem), key=lambda record: record["time"])
    except Exception as error:  # every storage library has exceptions of its own
        raise CheckpointError(f"{stem} in {out_dir} cannot be read: {reason_of(error)}") from error


def _read_lines(fs: Any, root: str, stem: str) -> Iterator[Record]:
    fs.invalidate_cache()
    try:
        names = sorted(path for path in fs.ls(root, detail=False) if _is_part(path, stem))
    except FileNotFoundError as error:
        if lacks_bucket(error):
            raise
        return
    for name in names:
        damaged = 0
        for line in fs.cat_file(name).decode(errors="replace").splitlines():
            record = _parse(line)
            if record:
                yield record
            damaged += bool(line.strip()) and record is None
        if damaged:
            logger.warning("%s: left out %d cut off or damaged line(s)", name, damaged)


def _is_part(path: str, stem: str) -> bool:
    return bool(re.fullmatch(rf"{stem}(-.+)?\.jsonl", path.rsplit("/", 1)[-1]))


def _parse(line: str) -> Record | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    is_record = isinstance(record, dict) and record.keys() >= {"kind", "iter", "attempt", "time"}
    return record if is_record else None


def to_line(record: Record) -> str:
    """Return a record as one line of standard JSON: numbers that JSON does not have (NaN, infinity) become null."""
    finite = {key: None if isinstance(x, float) and not math.isfinite(x) else x for key, x in record.items()}
    return json.dumps(finite, allow_nan=False) + "\n"


def _ends_whole(file: Any) -> bool:
    """Return whether a file is empty or its last line complete: a crash may have cut it off."""
    size = file.seek(0, 2)
    if size == 0:
        return True
    file.seek(size - 1)
    return bool(file.read(1) == b"\n")


def _suffixes() -> Iterator[str]:
    """Yield what tells parts of one attempt apart that begin at the same iteration, after a rollback."""
    yield ""
    n = 2
    while True:
        yield f"-{n}"
        n += 1
