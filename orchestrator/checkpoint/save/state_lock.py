"""StateLock: decides who may use the training state: a step, the beginning of a copy, or the rescue.

Order of locks: a rescue takes its own lock first (`Rescuer`, one rescue at a time), then this one. Nobody who holds
this lock may ask for a rescue or wait for another rank. Whoever waits here for a step waits on this rank alone.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class StateLock:
    """One for each Saver."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._is_torn = False

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Hold the lock while a step changes the state. If the step fails, the state is torn from then on."""
        with self._lock:
            self._is_torn = True
            yield
            self._is_torn = False

    @contextmanager
    def choosing_buffer(self) -> Iterator[None]:
        """Hold the lock while a buffer is chosen and a copy into it begins: a rescue must not choose the same one."""
        with self._lock:
            yield

    def hold_for_good(self, timeout_s: float) -> bool:
        """Take the lock and never release it, so the state changes no more; return whether there is a whole state."""
        return self._lock.acquire(timeout=timeout_s) and not self._is_torn
