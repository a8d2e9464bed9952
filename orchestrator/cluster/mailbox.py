"""Mailbox: where the workers of a run post records for the driver, and learn that they should stop.

One small actor beside the driver. Posting never fails a run: the mailbox is for display, the metrics are in the run's
folder. Nor does training wait for it: a call of Ray's takes milliseconds, so a thread makes them.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator.telemetry.records import Note, Record, Stamped

logger = logging.getLogger(__name__)

_POST_INTERVAL_S = 1.0
_ANSWER_S = 5.0
_KEPT_RECORDS = 10_000


class _Mailbox:
    """The actor, which holds stamped records as JSON."""

    def __init__(self) -> None:
        self._records: deque[dict[str, Any]] = deque()
        self._gone = 0  # so many were before these
        self._stopping = False
        self._first: dict[str, Any] = {}

    def first(self, key: str, value: Any) -> Any:
        return self._first.setdefault(key, value)

    def post(self, records: list[dict[str, Any]]) -> bool:
        self._records.extend(records)
        self._drop(len(self._records) - _KEPT_RECORDS)
        return self._stopping

    def take(self, stop: bool, seen: int) -> tuple[int, list[dict[str, Any]]]:
        self._stopping = self._stopping or stop
        self._drop(seen - self._gone)
        return self._gone, list(self._records)

    def _drop(self, count: int) -> None:
        for _ in range(min(count, len(self._records))):
            self._records.popleft()
            self._gone += 1


def open_mailbox() -> Any:
    """Start the mailbox on this driver's node."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(_Mailbox).options(num_cpus=0, scheduling_strategy=here).remote()


class MailboxReader:
    """The driver's side of the mailbox. What was posted stays there until it has arrived: answers may come late."""

    def __init__(self, mailbox: Any) -> None:
        self._mailbox, self._seen, self._is_lost = mailbox, 0, False

    def take(self, stop: bool) -> list[Stamped]:
        """Return what was posted since the last call; stop tells the workers to save and leave."""
        try:
            gone, records = ray.get(self._mailbox.take.remote(stop, self._seen), timeout=2 * _ANSWER_S)
        except ray.exceptions.GetTimeoutError:
            return []
        except ray.exceptions.RayError as error:
            if not self._is_lost:
                logger.warning("the display is lost, the run goes on: %s", type(error).__name__)
            self._is_lost = True
            return []
        self._is_lost = False
        new = records[max(0, self._seen - gone) :]
        self._seen = gone + len(records)
        return [stamped for value in new if (stamped := Stamped.from_json(value))]


class MailboxWriter:
    """The side of Ray's controller, for which a call of some milliseconds is no matter."""

    def __init__(self, mailbox: Any) -> None:
        self._mailbox = mailbox

    def emit(self, record: Record, time_s: float | None = None) -> None:
        """Post a record; time_s: since when it is true (seconds since 1970), by default since now."""
        stamped = Stamped(record, time.time() if time_s is None else time_s)
        self._mailbox.post.remote([stamped.to_json()])

    def note(self, text: str, level: str = "INFO") -> None:
        """Post a line for the user."""
        self.emit(Note(level=level, text=text))


class MailboxClient:
    """A worker's side of the mailbox: a thread of its own hands over what is waiting and takes the answer."""

    def __init__(self, mailbox: Any) -> None:
        self._mailbox = mailbox
        self._waiting: deque[Stamped] = deque(maxlen=_KEPT_RECORDS)
        self._sending = threading.Lock()  # what is taken first arrives first
        self._closed = threading.Event()
        self._stopping = False
        self._thread = threading.Thread(target=self._exchange, name="mailbox", daemon=True)
        self._thread.start()

    def post(self, stamped: Stamped) -> None:
        """Hand a record over within a second or so."""
        self._waiting.append(stamped)

    def should_stop(self) -> bool:
        """Return whether the driver asks to stop, as of the last answer."""
        return self._stopping

    def hurry(self) -> None:
        """Send what is waiting, from whatever thread: this process may be ended at any moment."""
        self._send()

    def first(self, key: str, value: Any) -> Any:
        """Return the value of a key that this run's first attempt gave; without an answer, the one given."""
        try:
            return ray.get(self._mailbox.first.remote(key, value), timeout=_ANSWER_S)
        except ray.exceptions.RayError:
            return value

    def close(self) -> None:
        """Send the rest and wait for it to arrive."""
        self._closed.set()
        self._thread.join(timeout=2 * _ANSWER_S)

    def _exchange(self) -> None:
        is_last = False
        while not is_last:
            is_last = self._closed.wait(_POST_INTERVAL_S)
            try:
                self._stopping = bool(ray.get(self._send(), timeout=_ANSWER_S))
            except ray.exceptions.RayError:
                logger.debug("the mailbox does not answer", exc_info=True)

    def _send(self) -> Any:
        with self._sending:
            return self._mailbox.post.remote([self._waiting.popleft().to_json() for _ in range(len(self._waiting))])
