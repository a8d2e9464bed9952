"""Write one state to storage from all ranks together: every tensor once, by its owner, and announced at the end.

Storage may fail in any way and at any byte: what is transient is tried again, the rest is the answer, never an
exception. What was announced before stays. Knows no live model, and not where the bytes come from.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from orchestrator.checkpoint.store import CheckpointStore
from orchestrator.checkpoint.tensor_file import FileRecord, write_file
from orchestrator.distributed.world import World
from orchestrator.errors import CheckpointError, UndeletableError
from orchestrator.storage.reasons import is_transient, reason_of
from orchestrator.storage.run_folder import RunFolder
from orchestrator.storage.transfer import make_folder
from orchestrator.storage.writable import PROBE_FILE

logger = logging.getLogger(__name__)

Pieces = Callable[[], Iterable[bytes | memoryview]]  # a file's bytes, from the first one on at every call


class DamagedSourceError(Exception):
    """What was to be uploaded is not what was put there: memory has failed."""


def upload(
    store: CheckpointStore,
    name: str,
    files: dict[str, Pieces],
    expected: dict[str, FileRecord],
    written: Callable[[int], None] = lambda _bytes: None,
) -> dict[str, Any]:
    """Write files of a checkpoint; return {"files": their records} or {"error": why not}. Never raises.

    An error comes with "may_pass": whether it was of a kind that is tried again.
    expected: the checksums of those that were taken before.
    """
    records = {}
    try:
        for file, pieces in files.items():
            record = store.folder.with_retries(_write, store.folder, name, file, pieces, written)
            if record != expected.get(file, record):
                raise DamagedSourceError(f"{file} changed in node memory after it was written there")
            records[file] = asdict(record)
    except Exception as error:  # every storage has exceptions of its own, and the other ranks wait to hear of it
        return _failure(error)
    return {"files": records}


def _failure(error: Exception) -> dict[str, Any]:
    return {"error": reason_of(error), "may_pass": is_transient(error)}


def _write(folder: RunFolder, name: str, file: str, pieces: Pieces, written: Callable[[int], None]) -> FileRecord:
    make_folder(folder.fs, folder.path(name))
    return write_file(folder.fs, folder.path(name, file), pieces(), written)


def commit(
    world: World, store: CheckpointStore, name: str, part: dict[str, Any], state: dict[str, Any], keep: int
) -> str | None:
    """Commit a checkpoint once every rank's part is in storage; return why not, on every rank alike.

    part: what `upload` returned on this rank.
    state: the content of state.json but for the records of the files.
    keep: the number of newest checkpoints that stay, besides the best; older ones are deleted.
    """
    parts = world.gather_json(part)
    failures = [part | {"error": f"rank {rank}: {part['error']}"} for rank, part in enumerate(parts) if "error" in part]

    def commit_or_discard() -> list[str]:
        found = failures
        if not found:
            files = {file: record for part in parts for file, record in part["files"].items()}
            try:
                if store.folder.with_retries(store.commit, name, {**state, "files": files}, world.attempt):
                    _prune(store, keep, world.attempt)
                else:
                    found = [{"error": "a later attempt of this run writes here now, this one was given up"}]
            except CheckpointError as error:
                found = [_failure(error)]
        if not all(failure.get("may_pass", True) for failure in found):
            _discard(store.folder, name)
        return [failure["error"] for failure in found]

    return "; ".join(world.on_main(commit_or_discard)) or None


def _discard(folder: RunFolder, name: str) -> None:
    """Delete the files of a checkpoint that filled the disk: they would take the room of the next one."""
    try:
        folder.delete_folder(name)
    except CheckpointError as error:  # it goes when a later one is committed
        logger.info("%s was not deleted: %s", name, reason_of(error.__cause__))


def _prune(store: CheckpointStore, keep: int, attempt: str) -> None:
    try:
        if not store.folder.is_fenced(attempt):  # a late writer's idea of old may be wrong
            store.prune(keep)
    except UndeletableError as error:
        _keep_all(store, error)
    except CheckpointError as error:  # old checkpoints only take room
        logger.warning("old checkpoints were not deleted: %s", reason_of(error.__cause__ or error))


def _keep_all(store: CheckpointStore, error: UndeletableError) -> None:
    """Delete nothing from now on, and say so, once: where the probe of the start is still there, it was said then."""
    store.can_delete = False
    with suppress(CheckpointError):
        if store.folder.exists(PROBE_FILE):
            return
    logger.warning("out_dir=%s: %s: old checkpoints stay until you delete them", store.folder.out_dir, error)
