"""List what a run's folder holds."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

from orchestrator.checkpoint.store import Checkpoint, CheckpointStore, best
from orchestrator.errors import CheckpointError
from orchestrator.storage_options import storage_options_of


@dataclass(frozen=True)
class InspectConfig:
    """Which run to look at."""

    out_dir: str = "out"  # the run's folder, a path or URL
    storage_options: str = ""  # fsspec's options of out_dir: a JSON object, or the path of a .json file that holds one
    verify: bool = False  # read every byte of every checkpoint and compare checksums


def inspect(config: InspectConfig) -> str:
    """Return a table of the run's checkpoints, newest first.

    Raises:
        CheckpointError: the folder cannot be read or holds no run.
    """
    store = CheckpointStore(config.out_dir, storage_options_of(config))
    names = [name for name in store.names() if store.fs.find(store.path(name))]  # some servers keep empty folders
    if not names and not store.read_json("run.json"):
        raise CheckpointError(f"out_dir={config.out_dir} holds no run: give the --out_dir of a training run")
    found = list(store.newest_first())
    top = best(found)
    rows = [("checkpoint", "iteration", "val loss", "MB", "saved (UTC)", "state")]
    rows += [_row(store, name, found, top, config.verify) for name in names]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([f"{config.out_dir}: {len(found)} checkpoint(s)", *lines])


def _row(
    store: CheckpointStore, name: str, found: list[Checkpoint], top: Checkpoint | None, verify: bool
) -> tuple[str, str, str, str, str, str]:
    try:
        checkpoint = store.load(name)
        if checkpoint is None:
            return (name, "", "", "", "", "not finished: never announced")
        if verify:
            store.read(checkpoint)
    except CheckpointError as error:
        return (name, "", "", "", "", f"DAMAGED: {error}")
    words = ["verified" if verify else "whole"]
    words += ["latest"] if checkpoint.name == found[0].name else []
    words += ["best"] if top and checkpoint.name == top.name else []
    loss = "" if checkpoint.val_loss is None else f"{checkpoint.val_loss:.4f}"
    saved = datetime.fromtimestamp(checkpoint.state["saved_at_s"], UTC).strftime("%Y-%m-%d %H:%M:%S")
    return (name, str(checkpoint.iter_num), loss, f"{checkpoint.size_bytes / 1e6:.1f}", saved, ", ".join(words))
