"""Faults of whole runs: all ranks die at one moment, or one is stopped and comes back when it is not expected any more.

They are armed like `tests.support.faults.Fault`, and have its points.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_PATIENCE_S = 60.0


@dataclass(frozen=True)
class Blackout:
    """One rank's part of the death of all: it waits at its point until the others are at theirs.

    folder: for the marks of those who are at their points.
    wanted: a pattern of a file that must be there too, such as an announced checkpoint.
    """

    point: str
    iter_num: int
    rank: int
    world_size: int
    folder: Path
    wanted: str
    nth: int = 1

    def fire(self) -> None:
        mine = self.folder / f"{self.rank}.tmp"
        mine.write_text(str(os.getpid()))
        mine.rename(self.folder / f"rank{self.rank}")
        deadline_s = time.monotonic() + _PATIENCE_S
        while not struck(self.folder, self.world_size, self.wanted) and time.monotonic() < deadline_s:
            time.sleep(0.005)
        for path in self.folder.glob("rank*"):
            if path.name != f"rank{self.rank}":
                with suppress(ProcessLookupError):
                    os.kill(int(path.read_text()), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)


def struck(folder: Path, world_size: int, wanted: str = "") -> bool:
    """Return whether all ranks are, or were, at their points."""
    return len(list(folder.glob("rank*"))) == world_size and (not wanted or any(Path("/").glob(wanted.lstrip("/"))))


def blackout(points: Sequence[tuple[str, int]], folder: Path, wanted: str = "") -> list[Blackout]:
    """Return the faults of all ranks: points are (point, iter_num), by rank."""
    folder.mkdir()
    return [
        Blackout(point, iter_num, rank, len(points), folder, wanted) for rank, (point, iter_num) in enumerate(points)
    ]


@dataclass(frozen=True)
class Standstill:
    """Stop a process at a point; `wake` lets it go on. marker: a file that is written before."""

    point: str
    iter_num: int
    rank: int
    marker: Path
    nth: int = 1

    def fire(self) -> None:
        if not self.marker.exists():
            scratch = self.marker.with_suffix(".tmp")
            scratch.write_text(str(os.getpid()))
            scratch.rename(self.marker)
            os.kill(os.getpid(), signal.SIGSTOP)

    def wait(self) -> None:
        """Wait until the process stands still."""
        deadline_s = time.monotonic() + _PATIENCE_S
        while not self._is_stopped():
            assert time.monotonic() < deadline_s, "the fault did not fire"
            time.sleep(0.01)

    def wake(self) -> None:
        """Let it go on."""
        with suppress(FileNotFoundError, ProcessLookupError):
            os.kill(int(self.marker.read_text()), signal.SIGCONT)

    def _is_stopped(self) -> bool:
        if not self.marker.exists():
            return False
        stat = Path("/proc", self.marker.read_text(), "stat").read_text()
        return stat.rpartition(")")[2].split()[0] == "T"
