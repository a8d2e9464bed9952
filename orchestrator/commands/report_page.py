"""Write the report of a run as one HTML file: read what its folder tells, have it drawn, and put it where it belongs.

The drawing is in `orchestrator/report/`, which needs the extra `report` and knows nothing of storage.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import wait
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

from orchestrator.commands.run_facts import gather
from orchestrator.config import TrainConfig
from orchestrator.errors import CheckpointError, ConfigError
from orchestrator.host.background import BackgroundQueue
from orchestrator.report.run import Run
from orchestrator.storage.location import locate
from orchestrator.storage.options import StorageSettings, storage_options_of
from orchestrator.storage.reasons import reason_of, translated
from orchestrator.storage.run_folder import RunFolder, open_run_folder
from orchestrator.storage.transfer import atomic_write

logger = logging.getLogger(__name__)

REPORT_FILE = "report.html"  # in out_dir
_AT_END_S = 120.0  # storage that does not answer keeps the end of a run no longer
_HEAD_BYTES = 1000


@dataclass(frozen=True)
class _Place:
    """Where a run lies."""

    out_dir: str
    storage_options: str


def write_page(config: StorageSettings, target: str, others: Sequence[str] = (), *, overwrite: bool = False) -> str:
    """Write the page of out_dir's run to a path or URL, with the curves of other runs, and return a line about it.

    Raises:
        ConfigError: the extra is not installed, or the target is there and no report of ours.
        CheckpointError: a run has no records, or storage fails.
    """
    draw = _page_of()
    runs = [gather(open_run_folder(config), config)]
    for other in others:
        folder = RunFolder(other, storage_options_of(config, other), key="compare")
        runs.append(gather(folder, _Place(other, config.storage_options)))
    options = storage_options_of(config, target)
    if not overwrite:
        _refuse_foreign(target, options)
    page = draw(runs).encode(errors="replace")  # a path may hold what is no text
    with atomic_write(target, options) as file:
        file.write_bytes(page)
    return f"wrote {target} ({len(page) / 1e6:.1f} MB): open it in a browser"


def write_at_end(config: TrainConfig) -> str | None:
    """Write report.html into the out_dir of a run that has ended, if the extra is installed; return where it lies.

    A page that cannot be written is worth a warning and no more: the run itself is safe.
    """
    if config.eval_only or not find_spec("bokeh"):
        return None
    queue = BackgroundQueue("report")
    written = queue.submit(partial(_write_into_out_dir, config))
    queue.close()
    is_done = bool(wait([written], timeout=_AT_END_S).done)
    error = written.exception() if is_done else TimeoutError(f"no answer in {_AT_END_S:g} s")
    if error:
        told = REPORT_FILE, reason_of(error), config.out_dir
        logger.warning("%s was not written (%s): `orchestrator report --out_dir=%s --html=FILE` tries again", *told)
        return None
    return str(written.result()) if written.result() else None


def _write_into_out_dir(config: TrainConfig) -> str | None:
    if not any(name.startswith("metrics") for name in open_run_folder(config).list()):  # it was stopped before it began
        return None
    target = f"{config.out_dir.rstrip('/')}/{REPORT_FILE}"
    write_page(config, target)
    return target


def _page_of() -> Callable[[Sequence[Run]], str]:
    try:
        from orchestrator.report.page import page_of
    except ImportError as error:
        raise ConfigError("--html needs a package: pip install 'nanogpt-orchestrator[report]'") from error
    return page_of


def _refuse_foreign(target: str, options: dict[str, Any] | None) -> None:
    """Check that nothing is at the target, or a report of ours.

    Raises:
        ConfigError: something else is there.
    """
    from orchestrator.report.page import GENERATOR

    fs, path = locate(target, options)
    with translated(f"{target} cannot be looked for", CheckpointError):
        try:
            head = bytes(fs.cat_file(path, start=0, end=_HEAD_BYTES))
        except FileNotFoundError:
            return
        except IsADirectoryError:
            raise ConfigError(
                f"--html={target} is a folder: give the file to write, {target.rstrip('/')}/report.html"
            ) from None
    if GENERATOR.encode() not in head:
        raise ConfigError(f"{target} exists and is no report of ours: give another --html, or --overwrite=True")
