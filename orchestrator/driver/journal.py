"""Journal: keeps the events of a driver's attempts in events.jsonl in the run's folder, and adds up their time.

On an object store rank 0 uploads metrics now and then, so a killed rank 0 takes an attempt's last ones with it. The
driver has received them too, and stores them when the next attempt begins. Those that rank 0 had uploaded come twice
then, as equal lines, and readers take each once.
"""

from __future__ import annotations

import logging
import math
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from orchestrator.driver.lease import Lease
from orchestrator.telemetry.goodput import Ledger, summary_of
from orchestrator.telemetry.metrics import MetricsLog
from orchestrator.telemetry.records import Begin, DriverEnded, DriverStarted, Event, LoopRecord, Stamped

logger = logging.getLogger(__name__)

_FLUSH_S = 5.0  # on an object store
_UNSURE_S = 60.0  # metrics of so long before its end may not have been uploaded by an attempt
_RECENT = 10_000  # records


class Journal:
    """One driver's. start_id: its own, for the stamps of events.

    log: takes the events; None for an evaluation, which writes nothing.
    metrics: takes an ended attempt's last metrics; None on a disk, where they are written at once.
    """

    def __init__(self, start_id: str, log: MetricsLog | None, metrics: MetricsLog | None = None) -> None:
        self._start_id, self._log, self._metrics, self.ledger = start_id, log, metrics, Ledger()
        self._recent: deque[Stamped] = deque(maxlen=_RECENT)  # of this attempt
        self._waiting: list[Stamped] | None = []  # until the run may write to its folder

    @property
    def has_begun(self) -> bool:
        """Whether anything may be written: a run that is refused leaves its folder as it was."""
        return self._waiting is None

    def begin(self) -> None:
        """Write the events so far, and later ones at once."""
        waiting, self._waiting = self._waiting or [], None
        for event in waiting:
            self._write(event)

    def emit(self, record: Event, time_s: float | None = None) -> None:
        """Keep an event; time_s: its time (seconds since 1970), by default now."""
        event = Stamped(record, time.time() if time_s is None else time_s, self._start_id)
        self.ledger.add(event)
        if self._waiting is None:
            self._write(event)
        else:
            self._waiting.append(event)

    def observe(self, stamped: Stamped) -> None:
        """Add a worker's record to the ledger. The worker stores its metrics itself."""
        if not isinstance(stamped.record, LoopRecord):  # a line for people
            return
        self.ledger.add(stamped)
        if isinstance(stamped.record, Begin):
            self.keep_metrics()
        self._recent.append(stamped)

    def keep_metrics(self) -> None:
        """Store the last metrics of an attempt that has ended."""
        if self._metrics and self._recent:
            since_s = self._recent[-1].time_s - _UNSURE_S
            for stamped in self._recent:
                if stamped.time_s >= since_s:
                    self._metrics.write(stamped)
            self._metrics.flush()
        self._recent.clear()

    def close(self) -> None:
        """Store what is left."""
        for log in (self._log, self._metrics):
            if log:
                log.close()

    def _write(self, event: Stamped) -> None:
        if self._log:
            self._log.write(event)


@contextmanager
def open_journal(lease: Lease | None) -> Iterator[Journal]:
    """Lend a driver its journal, from its start to its end, and log then where the time went."""
    if lease is None:
        yield Journal("", None)
        return
    folder = lease.folder
    log = MetricsLog(folder, lease.start_id, stem="events", flush_interval_s=_FLUSH_S)
    metrics = None
    if not folder.is_local:
        metrics = MetricsLog(folder, lease.start_id, flush_interval_s=math.inf)  # all at once, by `keep_metrics`
    journal = Journal(lease.start_id, log, metrics)
    journal.emit(DriverStarted(start_id=lease.start_id))
    try:
        yield journal
    finally:
        if journal.has_begun:
            error = sys.exception()
            if error:
                journal.keep_metrics()
            journal.emit(DriverEnded(outcome=type(error).__name__ if error else "finished"))
            journal.close()
        if journal.ledger.attempts:
            logger.info("%s", summary_of(journal.ledger))
