"""Write one state to storage from all ranks together: every tensor once, by its owner, and announced at the end.

Storage may fail in any way and at any byte: what is transient is tried again, the rest is the answer, never an
exception. What was announced before stays. Knows no live model, and not where the bytes come from.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

from orchestrator.checkpoint.store import CheckpointStore, UndeletableError
from orchestrator.checkpoint.tensor_file import FileRecord, write_file
from orchestrator.distributed.world import World
from orchestrator.storage.folders import PROBE_FILE, delete_folder
from orchestrator.storage.reasons import reason_of
from orchestrator.storage.retry import is_transient, with_retries
from orchestrator.storage.transfer import is_there, make_folder

logger = logging.getLogger(__name__)


T = TypeVar("T")
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
            record = with_retries(partial(_write, store, name, file, pieces, written), store)
            if record != expected.get(file, record):
                raise DamagedSourceError(f"{file} changed in node memory after it was written there")
            records[file] = record.to_json()
    except Exception as error:  # every storage has exceptions of its own, and none of them may end the run
        return _failure(error)
    return {"files": records}


def _failure(error: Exception) -> dict[str, Any]:
    return {"error": reason_of(error), "may_pass": is_transient(error)}


def _write(store: CheckpointStore, name: str, file: str, pieces: Pieces, written: Callable[[int], None]) -> FileRecord:
    make_folder(store.fs, store.path(name))
    return write_file(store.fs, store.path(name, file), pieces(), written)


def commit(
    world: World, store: CheckpointStore, name: str, part: dict[str, Any], state: dict[str, Any], keep: int
) -> str | None:
    """Announce a checkpoint once every rank's part is in storage; return why not, on every rank alike.

    part: what `upload` returned on this rank.
    state: the content of state.json but for the records of the files.
    keep: the number of newest checkpoints that stay, besides the best; older ones are deleted.
    """
    parts = world.gather_json(part)
    failures = [part | {"error": f"rank {rank}: {part['error']}"} for rank, part in enumerate(parts) if "error" in part]
    if world.is_main and not failures:
        files = {file: record for part in parts for file, record in part["files"].items()}
        failures = _commit(store, name, {**state, "files": files}, world.attempt)
        if not failures:
            _prune(store, keep, world.attempt)
    if world.is_main and not all(failure.get("may_pass", True) for failure in failures):
        _discard(store, name)
    failed = world.broadcast_json([failure["error"] for failure in failures])
    return "; ".join(failed) or None


def _commit(store: CheckpointStore, name: str, state: dict[str, Any], attempt: str) -> list[dict[str, Any]]:
    """Announce it; return why not, if so, as `upload` does."""

    def commit() -> list[dict[str, Any]]:
        if store.is_fenced(attempt):
            return [{"error": "a later attempt of this run writes here now, this one was given up"}]
        store.commit(name, state)
        return []

    try:
        return with_retries(commit, store)
    except Exception as error:  # as above
        return [_failure(error)]


def _discard(store: CheckpointStore, name: str) -> None:
    """Delete what was written of a checkpoint before the disk was full: it would take the room of the next one."""
    try:
        delete_folder(store.fs, store.path(name))
    except Exception as error:  # it goes when a later one is announced
        logger.info("%s was not deleted: %s", name, reason_of(error))


def _prune(store: CheckpointStore, keep: int, attempt: str) -> None:
    try:
        if not store.insisting(lambda: store.is_fenced(attempt)):  # a late writer's idea of old may be wrong
            store.insisting(lambda: store.prune(keep))
    except UndeletableError as error:
        _keep_all(store, error)
    except Exception as error:  # what stays is only clutter
        logger.warning("old checkpoints were not deleted: %s", reason_of(error))


def _keep_all(store: CheckpointStore, error: UndeletableError) -> None:
    """Delete nothing from now on, and say so, once: where the probe of the start is still there, it was said then."""
    store.can_delete = False
    with suppress(Exception):
        if is_there(store.fs, store.path(PROBE_FILE)):
            return
    logger.warning("out_dir=%s: %s: old checkpoints stay until you delete them", store.out_dir, error)
