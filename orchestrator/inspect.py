"""List what a run's folder holds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from orchestrator.checkpoint.files import FileRecord, stream_tensors
from orchestrator.checkpoint.memory import run_path, share_path, states_in
from orchestrator.checkpoint.store import RUN_FILE, Checkpoint, CheckpointStore, best, newest_name_first
from orchestrator.errors import CheckpointError
from orchestrator.storage_options import storage_options_of


@dataclass(frozen=True)
class InspectConfig:
    """Which run to look at."""

    out_dir: str = "out"  # the run's folder, a path or URL
    storage_options: str = ""  # fsspec's options of out_dir: a JSON object, or the path of a .json file that holds one
    memory_dir: str = "/dev/shm"  # where this node keeps the newest states of a run that goes on or was killed
    verify: bool = False  # read every byte of every checkpoint and compare checksums


def inspect(config: InspectConfig) -> str:
    """Return a table of the run's checkpoints, newest first.

    Raises:
        CheckpointError: the folder cannot be read or holds no run.
    """
    store = CheckpointStore(config.out_dir, storage_options_of(config))
    names = [name for name in store.names() if store.fs.find(store.path(name))]  # some servers keep empty folders
    if not names and not store.read_json(RUN_FILE):
        raise CheckpointError(f"out_dir={config.out_dir} holds no run: give the --out_dir of a training run")
    found = list(store.newest_first())
    top = best(found)
    rows: list[tuple[str, ...]] = [("checkpoint", "iteration", "val loss", "MB", "saved (UTC)", "where", "state")]
    rows += _memory_rows(config, store.known_as(str(store.read_json(RUN_FILE).get("run_id", ""))))
    rows += [_row(store, name, found, top, config.verify) for name in names]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([f"{config.out_dir}: {len(found)} checkpoint(s)", *lines])


def _row(
    store: CheckpointStore, name: str, found: list[Checkpoint], top: Checkpoint | None, verify: bool
) -> tuple[str, ...]:
    try:
        checkpoint = store.load(name)
        if checkpoint is None:
            return (name, "", "", "", "", "storage", "not finished: never announced")
        if verify:
            for file, record in checkpoint.files.items():
                _verify(store.fs, store.path(name, file), record)
    except CheckpointError as error:
        return (name, "", "", "", "", "storage", f"DAMAGED: {error}")
    words = ["verified" if verify else "whole"]
    words += ["latest"] if checkpoint.name == found[0].name else []
    words += ["best"] if top and checkpoint.name == top.name else []
    return (*_facts(checkpoint, checkpoint.size_bytes), "storage", ", ".join(words))


def _memory_rows(config: InspectConfig, run_id: str) -> Iterator[tuple[str, ...]]:
    """Yield the states in the memory of this node, newest first; those of other nodes cannot be seen from here."""
    folder = run_path(config.memory_dir, run_id)
    states = states_in(folder)
    for name in newest_name_first(states):
        shares = states[name]
        try:
            for share, checkpoint in shares.items() if config.verify else ():
                for file, record in checkpoint.files.items():
                    path = share_path(folder, name, share, len(shares)) / file
                    _verify(LocalFileSystem(), str(path), record)
            word = "verified" if config.verify else "whole"
        except CheckpointError as error:
            word = f"DAMAGED: {error}"
        size_bytes = sum(checkpoint.size_bytes for checkpoint in shares.values())
        yield (*_facts(shares[0], size_bytes), "this node's memory", word)


def _facts(checkpoint: Checkpoint, size_bytes: int) -> tuple[str, ...]:
    loss = "" if checkpoint.val_loss is None else f"{checkpoint.val_loss:.4f}"
    saved = datetime.fromtimestamp(checkpoint.state["saved_at_s"], UTC).strftime("%Y-%m-%d %H:%M:%S")
    return (checkpoint.name, str(checkpoint.iter_num), loss, f"{size_bytes / 1e6:.1f}", saved)


def _verify(fs: Any, path: str, record: FileRecord) -> None:
    """Read a file a tensor at a time.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    for _ in stream_tensors(fs, path, record):
        pass
