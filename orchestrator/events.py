"""What happens to a driver's attempts: kept in events.jsonl in the run's folder, and summed up."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from orchestrator.config import TrainConfig
from orchestrator.lease import Lease
from orchestrator.recovery.ledger import Ledger, summary_of
from orchestrator.storage_options import storage_options_of
from orchestrator.telemetry.metrics import MetricsLog

logger = logging.getLogger(__name__)

_FLUSH_S = 5.0  # on an object store


class Events:
    """One driver's; without a log (an evaluation writes nothing) they are only summed up."""

    def __init__(self, log: MetricsLog | None) -> None:
        self._log, self.ledger = log, Ledger()

    def tell(self, kind: str, **values: Any) -> None:
        """Keep an event."""
        event = {"kind": kind, "iter": 0, "time": time.time(), **values}
        if self._log:
            self._log.write(event)
        self.ledger.add(event)

    def heard(self, record: dict[str, Any]) -> None:
        """Sum up what a worker has told, which keeps its metrics itself."""
        if "time" in record:
            self.ledger.add(record)


@contextmanager
def events_of(config: TrainConfig, lease: Lease | None) -> Iterator[Events]:
    """Lend a driver its events, from its start to its end, and say then where the time went."""
    if lease is None:
        yield Events(None)
        return
    options = storage_options_of(config)
    log = MetricsLog(config.out_dir, lease.start_id, storage_options=options, flush_interval_s=_FLUSH_S, stem="events")
    events = Events(log)
    events.tell("driver_started", start_id=lease.start_id)
    try:
        yield events
    finally:
        error = sys.exception()
        events.tell("driver_ended", outcome=type(error).__name__ if error else "finished")
        log.close()
        if events.ledger.attempts:
            logger.info("%s", summary_of(events.ledger))
