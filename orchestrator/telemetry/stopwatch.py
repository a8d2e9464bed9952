"""Stopwatch: how long iterations take, summed up over windows, so that weeks of them stay readable."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

from orchestrator.telemetry.records import StepWindow

_WINDOW_S = 10.0


class Stopwatch:
    """The first iteration is a window of its own, since compilers and caches make it long."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._lap_s = clock()
        self._steps_s: list[float] = []
        self._eval_s = self._paused_s = 0.0
        self._is_first = True

    def start(self) -> None:
        """Begin the first iteration now: what came before is no iteration's time."""
        self._lap_s = self._clock()

    def evaluated(self) -> None:
        """Note the end of an evaluation."""
        self._eval_s += self._lap()

    def stepped(self, iter_num: int, paused_s: float) -> StepWindow | None:
        """Note that the iteration before iter_num has ended; return the window that ends with it, if one does.

        paused_s: how long training has waited for states to be saved, since the start of this attempt.
        """
        self._steps_s.append(self._lap())
        if self._is_first or sum(self._steps_s) + self._eval_s >= _WINDOW_S:
            return self.window(iter_num, paused_s)
        return None

    def window(self, iter_num: int, paused_s: float) -> StepWindow:
        """Return the iterations since the last window; iter_num and paused_s as in `stepped`."""
        steps_s, self._steps_s = self._steps_s, []
        eval_s, self._eval_s = self._eval_s, 0.0
        pause_s, self._paused_s = paused_s - self._paused_s, paused_s
        self._is_first = False
        return StepWindow(
            iter=iter_num,
            count=len(steps_s),
            step_s=sum(steps_s),
            median_s=median(steps_s) if steps_s else None,
            longest_s=max(steps_s, default=None),
            eval_s=eval_s,
            pause_s=pause_s,
        )

    def _lap(self) -> float:
        before_s, self._lap_s = self._lap_s, self._clock()
        return self._lap_s - before_s
