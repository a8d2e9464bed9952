"""Says how far the reading or writing of a large file is, every few seconds; a small one is done before the first."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

logger = logging.getLogger(__name__)

_EVERY_S = 3.0


class Progress:
    """Counts the bytes of one piece of work."""

    def __init__(self, work: str, total_bytes: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._work, self._total_bytes, self._clock = work, total_bytes, clock
        self._done_bytes = 0
        self._said_at_s = clock()

    def add(self, count_bytes: int) -> None:
        """Take note of bytes that were read or written."""
        self._done_bytes += count_bytes
        if self._clock() - self._said_at_s >= _EVERY_S:
            logger.info("%s: %.2f of %.2f GB", self._work, self._done_bytes / 1e9, self._total_bytes / 1e9)
            self._said_at_s = self._clock()
