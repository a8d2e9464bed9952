"""Watchdog: ends this process when training makes no progress, so that recovery starts. Knows no Ray."""

from __future__ import annotations

import faulthandler
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from statistics import median

import torch.distributed as dist

_TIMES_THE_MEDIAN = 20.0
_STEPS = 50  # of which the median counts
_LONGER_THAN_ANY = timedelta(days=7)
_START_S = 300.0  # until the first step: a large state may have to be read, on cores that others want too


class Watchdog:
    """A thread that waits for beats, one per iteration, and in an evaluation one per batch.

    timeout_s: the longest silence; before the first beat five minutes if that is longer, and for models whose steps are
        slow 20 times the median step.
    on_hang: is called once, with the seconds of silence; if it returns False, something else is being waited for.
    """

    def __init__(self, timeout_s: float, on_hang: Callable[[float], bool]) -> None:
        self._timeout_s, self._on_hang = timeout_s, on_hang
        self._steps_s: deque[float] = deque(maxlen=_STEPS)
        self._beat_s = time.monotonic()
        self._mark: float | None = None
        self._closed = threading.Event()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def beat(self, mark: float) -> None:
        """Note that something moves; mark: another one with each iteration, whose times set how long is too long."""
        now_s = time.monotonic()
        if self._mark not in (None, mark):  # what came before the first mark was the start
            self._steps_s.append(now_s - self._beat_s)
        self._mark = mark
        self._beat_s = now_s

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()

    def limit_s(self) -> float:
        """Return how much silence is too much now."""
        if self._mark is None:
            return max(self._timeout_s, _START_S)
        return max(self._timeout_s, _TIMES_THE_MEDIAN * median(self._steps_s) if self._steps_s else 0.0)

    def _watch(self) -> None:
        while not self._closed.wait(min(1.0, self._timeout_s / 4)):
            silence_s = time.monotonic() - self._beat_s
            if silence_s > self.limit_s():
                if self._on_hang(silence_s):
                    return
                self._beat_s = time.monotonic()


def be_outlasted() -> None:
    """Let collectives wait for longer than any watchdog does: how long is too long depends on how long steps take."""
    if dist.is_initialized():
        dist.distributed_c10d._set_pg_timeout(_LONGER_THAN_ANY)


def stacks() -> str:
    """Return the stack of every thread of this process."""
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read()
