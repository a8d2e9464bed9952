"""A run's folder from outside: its checkpoints, its records."""

from __future__ import annotations

from typing import Any

from orchestrator.checkpoint.store import CheckpointStore
from orchestrator.storage.run_folder import RunFolder
from orchestrator.telemetry.goodput import Ledger, account
from orchestrator.telemetry.metrics import read_events, read_metrics

Options = dict[str, Any] | None


def checkpoints_in(out_dir: str, storage_options: Options = None) -> CheckpointStore:
    """Open the checkpoints of a run."""
    return CheckpointStore(RunFolder(out_dir, storage_options))


def metrics_in(out_dir: str, storage_options: Options = None) -> list[dict[str, Any]]:
    """Read the metrics of a run, as JSON."""
    return [each.to_json() for each in read_metrics(RunFolder(out_dir, storage_options))]


def events_in(out_dir: str, storage_options: Options = None) -> list[dict[str, Any]]:
    """Read the events of a run, as JSON."""
    return [each.to_json() for each in read_events(RunFolder(out_dir, storage_options))]


def ledger_in(out_dir: str) -> Ledger:
    """Return where the time of a run went."""
    folder = RunFolder(out_dir)
    return account([*read_events(folder), *read_metrics(folder)])
