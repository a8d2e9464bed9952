"""Tell where the time of a run went, by its events and metrics: as text, as JSON, or as a page with pictures."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

from orchestrator.errors import CheckpointError, ConfigError
from orchestrator.storage.paths import expanded
from orchestrator.storage.run_folder import open_run_folder
from orchestrator.telemetry.goodput import PHASES, Incident, Ledger, account, duration
from orchestrator.telemetry.metrics import read_events, read_metrics


@dataclass(frozen=True)
class ReportConfig:
    """Which run to look at."""

    out_dir: str = "out"  # the run's folder, a path or URL
    storage_options: str = ""  # fsspec's options of out_dir: a JSON object, or the path of a .json file that holds one
    json: bool = False  # print one JSON object, for programs
    html: str = (
        ""  # write a page with pictures to this file, a path or URL (pip install 'nanogpt-orchestrator[report]')
    )
    compare: str = ""  # other runs whose curves the page shows too: folders or URLs, with commas between them
    overwrite: bool = False  # write the page even if another file is there; we always replace a report of ours


def report(config: ReportConfig) -> str:
    """Return the run's goodput, what the rest of its time went to, and its failures by phase.

    With html, write the page and return a line about that.

    Raises:
        CheckpointError: the folder cannot be read or holds no run.
        ConfigError: html, compare and json do not go together, or see `write_page`.
    """
    if config.html:
        return _write_html(config)
    if config.compare:
        raise ConfigError(f"--compare={config.compare} is for the page with pictures: give --html=FILE too")
    folder = open_run_folder(config)
    events = read_events(folder)
    if not events:
        raise CheckpointError(
            f"out_dir={config.out_dir} holds no events of a run: give the --out_dir of one of `train`"
        )
    ledger = account([*events, *read_metrics(folder)])
    return _json(ledger) if config.json else _text(config.out_dir, ledger)


def _write_html(config: ReportConfig) -> str:
    from orchestrator.commands.report_page import write_page  # which needs PyTorch, to look at checkpoints

    if config.json:
        raise ConfigError("--json prints and --html writes a page: give one of them")
    others = [expanded("compare", other) for other in config.compare.split(",") if other]
    return write_page(config, config.html, others, overwrite=config.overwrite)


def _json(ledger: Ledger) -> str:
    return json.dumps(
        {
            "goodput": ledger.goodput,
            "wall_s": ledger.wall_s,
            "seconds": ledger.seconds,
            "iter_num": ledger.iter_num,
            "drivers": ledger.drivers,
            "attempts": ledger.attempts,
            "median_step_s": ledger.median_s,
            "incidents": [{**asdict(incident), "total_s": incident.total_s} for incident in ledger.incidents],
        },
        indent=2,
    )


def _text(out_dir: str, ledger: Ledger) -> str:
    counts = f"{ledger.drivers} driver(s), {ledger.attempts} attempt(s), {len(ledger.incidents)} failure(s)"
    lines = [
        f"{out_dir}: {ledger.iter_num} iterations in {duration(ledger.wall_s)}, goodput {ledger.goodput:.3f}; {counts}"
    ]
    wall_s = ledger.wall_s or 1.0
    lines += [
        f"  {name.replace('_', '-'):<11} {duration(s):>12} {s / wall_s:7.2%}" for name, s in ledger.seconds.items() if s
    ]
    if ledger.incidents:
        shown = [phase for phase in PHASES if any(phase in incident.phases for incident in ledger.incidents)]
        head = (
            "when (UTC)",
            "iter",
            "cause",
            *(phase.replace("_", "-") for phase in shown),
            "total",
            "repeated",
            "where",
        )
        rows = [head, *(_row(incident, shown) for incident in ledger.incidents)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
        lines += ["", "failures, in seconds from the last completed iteration to the next one:"]
        lines += [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
        ]
    return "\n".join(lines)


def _row(incident: Incident, shown: list[str]) -> tuple[str, ...]:
    when = datetime.fromtimestamp(incident.time, UTC).strftime("%m-%d %H:%M:%S")
    phases = (f"{incident.phases[phase]:.2f}" if phase in incident.phases else "" for phase in shown)
    total = f"{incident.total_s:.2f}"
    return (when, str(incident.iter_num), incident.cause, *phases, total, str(incident.steps_repeated), incident.where)
