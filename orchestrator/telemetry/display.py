"""The driver's display: nanoGPT's lines, and below them, on a terminal, a progress bar."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from orchestrator.host.streams import has_lost_its_reader
from orchestrator.telemetry.format import line_of
from orchestrator.telemetry.records import Evaluation, LoopRecord, Note, Record, Step

_STYLES = {"WARNING": "yellow", "ERROR": "red"}


class Display:
    """Shows records as they come; a context manager, so that the terminal is left as it was.

    A terminal that was closed, or a `| tee` that Ctrl-C has ended before us, ends no run.
    """

    def __init__(self, max_iters: int) -> None:
        self._console = Console(highlight=False, soft_wrap=True)
        self._progress: Progress | None = None
        if self._console.is_terminal:
            columns = (BarColumn(None), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[loss]}"))
            self._progress = Progress(TextColumn("[bold]iter"), *columns, console=self._console)
            self._task = self._progress.add_task("train", total=max_iters, loss="starting")

    def __enter__(self) -> Display:
        if self._progress:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with until_nobody_reads():
            if self._progress:
                self._progress.stop()

    def show(self, record: Record) -> None:
        """Print a record's line and move the bar."""
        with until_nobody_reads():
            self._show(record)

    def _show(self, record: Record) -> None:
        style = _STYLES.get(record.level) if isinstance(record, Note) else None
        if line := line_of(record):
            self._console.print(line, style=style, markup=False)
        if self._progress and isinstance(record, LoopRecord):
            self._progress.update(self._task, completed=record.iter)
            match record:
                case Step(loss=loss):
                    self._progress.update(self._task, loss=f"loss {loss:.4f}")
                case Evaluation(val_loss=loss):
                    self._progress.update(self._task, loss=f"val_loss {loss:.4f}")


@contextmanager
def until_nobody_reads() -> Iterator[None]:
    """Print to nowhere once the terminal or the program that our output goes to is gone."""
    try:
        yield
    except (OSError, SystemExit) as error:  # rich makes the latter of a pipe that is broken
        if isinstance(error, OSError) and error.errno not in (errno.EPIPE, errno.EIO):
            raise
        quiet()


def quiet() -> None:
    """Send stdout and stderr nowhere from now on, each if its reader or terminal is gone."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # no file, as in a test
            if has_lost_its_reader(stream.fileno()):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
