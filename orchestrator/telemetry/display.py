"""The driver's display: nanoGPT's lines, and below them, on a terminal, a progress bar."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from orchestrator.telemetry.lines import line_of

Record = dict[str, Any]


class Display:
    """Shows records as they come; a context manager, so that the terminal is left as it was."""

    def __init__(self, max_iters: int) -> None:
        self._console = Console(highlight=False, soft_wrap=True)
        self._progress: Progress | None = None
        if self._console.is_terminal:
            columns = (BarColumn(None), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[loss]}"))
            self._progress = Progress("[bold]iter", *columns, console=self._console)
            self._task = self._progress.add_task("train", total=max_iters, loss="starting")

    def __enter__(self) -> Display:
        if self._progress:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress:
            self._progress.stop()

    def show(self, record: Record) -> None:
        """Print a record's line and move the bar."""
        style = {"WARNING": "yellow", "ERROR": "red"}.get(record.get("level", ""))
        if line := line_of(record):
            self._console.print(line, style=style, markup=False)
        if self._progress and "iter" in record:
            loss = {"step": "loss", "eval": "val_loss"}.get(record["kind"])
            self._progress.update(self._task, completed=record["iter"])
            if loss:
                self._progress.update(self._task, loss=f"{loss} {record[loss]:.4f}")
