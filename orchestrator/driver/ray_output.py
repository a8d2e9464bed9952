"""Ray's own words: lines of Ray's processes go to the driver's screen, or to a log file instead.

When a worker is lost, Ray and the lost worker's peers print pages. We expect the loss and say it in a few lines of our
own, so their pages go to `ray.log`. They stay on the screen where nobody expects them: the run failed by a bug in the
user's code, was given up, or Ray itself failed.

A peer prints before the driver knows of the loss. So a line that may tell of one waits for a moment before it is shown.
Ray prints through a function of its own that is not public (`print_worker_logs`): a test pins it.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from ray._private import worker as ray_worker

from orchestrator.telemetry.display import until_nobody_reads

LOG_FILE = "ray.log"
_HOLD_S = 5.0  # in which the controller has noticed a lost worker, and the driver knows of it
_LATE_S = 10.0  # Ray holds repeated lines back for 5 s, so some come after the next attempt has begun
_KEPT = 1000  # pieces of output, to be shown after all if the run is given up,
_RECENT_S = 600.0  # as far as they are not older: losses in a row are why a run is given up

Batch = dict[str, Any]


class _Piece(NamedTuple):
    came_s: float
    batch: Batch
    rest: tuple[Any, ...]  # of the arguments of Ray's function


class RayOutput:
    """Stands between Ray and the screen; `ray_output` puts it there. show: Ray's function, which prints."""

    def __init__(self, show: Callable[..., None], clock: Callable[[], float] = time.monotonic) -> None:
        self._show, self._clock = show, clock
        self._lock = threading.Lock()  # Ray prints from threads of its own
        self._held: deque[_Piece] = deque()
        self._logged: deque[_Piece] = deque(maxlen=_KEPT)
        self._quiet_until_s = -math.inf
        self._path: Path | None = None
        self._has_logged = self._has_told = self._is_closed = False

    def log_to(self, path: Path) -> None:
        """Choose the log file. It is not made before there is something to write."""
        self._path = path

    def write(self, batch: Batch, *rest: Any) -> None:
        """Take some lines of one of Ray's processes; in place of Ray's function."""
        if not self._is_closed and (batch.get("is_err") or batch.get("pid") == "raylet"):
            with self._lock:
                self._held.append(_Piece(self._clock(), batch, rest))
        else:  # a print() in the user's code
            self._show(batch, *rest)

    def expect_loss(self) -> None:
        """Log the words about a loss that we have told the user of, until the next attempt begins."""
        self._quiet_until_s = math.inf
        self.pass_on()

    def end_loss(self) -> None:
        """Note that the next attempt has begun."""
        if self._quiet_until_s == math.inf:
            self.pass_on()
            self._quiet_until_s = self._clock() + _LATE_S

    def pass_on(self, hold_s: float = _HOLD_S) -> None:
        """Show or log what was held back for long enough."""
        now_s = self._clock()
        is_quiet = now_s < self._quiet_until_s
        with self._lock:
            due = []
            while self._held and (is_quiet or now_s - self._held[0].came_s >= hold_s):
                due.append(self._held.popleft())
        if is_quiet:
            self._log(due)
        else:
            self._show_all(due)

    def show_everything(self) -> None:
        """Show also what was said about the last losses: nobody expects what comes now."""
        logged = [piece for piece in self._logged if self._clock() - piece.came_s <= _RECENT_S]
        self._logged.clear()
        self._quiet_until_s = -math.inf
        self._show_all(logged)
        self.pass_on(hold_s=0.0)

    def close(self) -> None:
        """Show or log what is still held, and hold nothing from now on."""
        self._is_closed = True
        self.pass_on(hold_s=0.0)

    def log_file_to_tell(self) -> Path | None:
        """Return the log file's path once, as soon as something is in it."""
        if self._has_told or not self._has_logged:
            return None
        self._has_told = True
        return self._path

    def _show_all(self, pieces: list[_Piece]) -> None:
        with until_nobody_reads():
            for piece in pieces:
                self._show(piece.batch, *piece.rest)

    def _log(self, pieces: list[_Piece]) -> None:
        self._logged.extend(pieces)
        if not pieces or not self._path:
            return
        with suppress(OSError), self._path.open("a", encoding="utf-8") as file:  # a full disk ends no run
            for piece in pieces:
                file.writelines(f"({_source(piece.batch)}) {line}\n" for line in piece.batch.get("lines", []))
            self._has_logged = True


def _source(batch: Batch) -> str:
    """Return the process that lines come from, as Ray names it."""
    if batch.get("pid") == "raylet":
        return "raylet"
    name = batch.get("actor_name") or batch.get("task_name") or ""
    return f"{name} pid={batch.get('pid')}, ip={batch.get('ip')}".lstrip()


@contextmanager
def ray_output() -> Iterator[RayOutput]:
    """Put a RayOutput between Ray and the screen while the block runs; show at the end what it still holds."""
    rays_own = ray_worker.print_worker_logs
    output = RayOutput(rays_own)
    ray_worker.print_worker_logs = output.write
    try:
        yield output
    finally:
        ray_worker.print_worker_logs = rays_own
        output.close()
