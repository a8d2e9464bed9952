"""Write one state to storage from all ranks together: every tensor once, by its owner, and announced at the end.

Storage may fail in any way and at any byte: what is transient is tried again, the rest is the answer, never an
exception. What was announced before stays. Knows no live model, and not where the bytes come from.
"""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

import tenacity
from fsspec.implementations.local import LocalFileSystem
from torch import Tensor

from orchestrator.checkpoint.files import FileRecord, write_file
from orchestrator.checkpoint.folders import PROBE_FILE, delete_folder
from orchestrator.checkpoint.ownership import owners, split
from orchestrator.checkpoint.reasons import has_expired, is_refused, reason_of
from orchestrator.checkpoint.snapshot import Snapshot
from orchestrator.checkpoint.store import CheckpointStore, UndeletableError
from orchestrator.checkpoint.transfer import is_there, make_folder
from orchestrator.errors import CheckpointError, UnreadableError
from orchestrator.world import World

logger = logging.getLogger(__name__)

RETRY_FOR_S = 300.0  # from the first failure of a file; the next checkpoint begins anew
READ_AGAIN_FOR_S = 60.0
_LONGEST_PAUSE_S = 20.0
_REFUSALS = 2  # with credentials that were read again; not every server says that those before have expired
_LASTING = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG}

T = TypeVar("T")
Files = dict[str, dict[str, Tensor]]  # file name -> tensor name -> tensor
Pieces = Callable[[], Iterable[bytes | memoryview]]  # a file's bytes, from the first one on at every call


class DamagedSourceError(Exception):
    """What was to be uploaded is not what was put there: memory has failed."""


def files_of(snapshot: Snapshot, world_size: int) -> Files:
    """Return the files of a state's checkpoint. Each is one rank's; model and optimizer never share one."""
    owner = owners({**snapshot.model, **snapshot.optimizer}, world_size)
    kinds = {"model": snapshot.model, "optimizer": snapshot.optimizer}
    files = {
        f"{kind}-{rank:05d}-of-{world_size:05d}.safetensors": split(owner, rank, tensors)
        for kind, tensors in kinds.items()
        for rank in range(world_size)
    }
    return {file: tensors for file, tensors in files.items() if tensors}


def rank_of(file: str) -> int:
    """Return the rank that writes a file to storage."""
    return int(file.split("-")[1])


def tensor_index(files: Files) -> dict[str, dict[str, Any]]:
    """Return where every tensor lies and what it is, for state.json."""
    return {
        name: {"file": file, "shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
        for file, tensors in files.items()
        for name, tensor in tensors.items()
    }


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
            record = patiently(partial(_write, store, name, file, pieces, written), store)
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


def announce(
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
        _take_back(store, name)
    failed = world.broadcast_json([failure["error"] for failure in failures])
    return "; ".join(failed) or None


def _commit(store: CheckpointStore, name: str, state: dict[str, Any], attempt: str) -> list[dict[str, Any]]:
    """Announce it; return why not, if so, as `upload` does."""

    def commit() -> list[dict[str, Any]]:
        if store.is_taken_over(attempt):
            return [{"error": "a later attempt of this run writes here now, this one was given up"}]
        store.commit(name, state)
        return []

    try:
        return patiently(commit, store)
    except Exception as error:  # as above
        return [_failure(error)]


def _take_back(store: CheckpointStore, name: str) -> None:
    """Delete what was written of a checkpoint before the disk was full: it would take the room of the next one."""
    try:
        delete_folder(store.fs, store.path(name))
    except Exception as error:  # it goes when a later one is announced
        logger.info("%s was not deleted: %s", name, reason_of(error))


def _prune(store: CheckpointStore, keep: int, attempt: str) -> None:
    try:
        if not store.insisting(lambda: store.is_taken_over(attempt)):  # a late writer's idea of old may be wrong
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


def patiently(
    call: Callable[[], T],
    store: CheckpointStore,
    may_pass: Callable[[BaseException], bool] | None = None,
    for_s: float | None = None,
) -> T:
    """Return call()'s value; while it fails for what may pass, call again, later and later, for RETRY_FOR_S in all.

    Pauses are drawn at random, so that the ranks of a run do not all come back at the same moment.

    Raises:
        Exception: the last one of the storage's.
    """

    failed_at_s: list[float] = []

    def is_enough(_attempt: tenacity.RetryCallState) -> bool:
        failed_at_s.append(time.monotonic())  # a large file may take longer than that before it fails first
        return failed_at_s[-1] - failed_at_s[0] >= (RETRY_FOR_S if for_s is None else for_s)

    def before_sleep(attempt: tenacity.RetryCallState) -> None:
        error, number = attempt.outcome.exception() if attempt.outcome else None, attempt.attempt_number
        if not error or not is_refused(error):
            logger.info("storage failed, trying again (%d): %s", number, reason_of(error))
        elif number == 1:
            logger.info("storage has refused us, credentials are read again: %s", reason_of(error))
        with suppress(CheckpointError):  # still down: the next call says so
            store.reconnect(error)

    refused: list[BaseException] = []

    def is_worth_it(error: BaseException) -> bool:
        if (may_pass or is_transient)(error):
            return True
        if not is_refused(error) or isinstance(store.fs, LocalFileSystem):
            return False
        refused.append(error)
        return len(refused) <= _REFUSALS

    retry = tenacity.Retrying(
        retry=tenacity.retry_if_exception(is_worth_it),
        wait=tenacity.wait_random_exponential(multiplier=0.5, max=_LONGEST_PAUSE_S),
        stop=is_enough,
        before_sleep=before_sleep,
        reraise=True,
    )
    return retry(call)


def patiently_read(call: Callable[[], T], store: CheckpointStore) -> T:
    """Return call()'s value; where storage does not answer, ask again for a while: an older state costs more.

    Raises:
        UnreadableError: it has not answered for READ_AGAIN_FOR_S.
    """
    return patiently(call, store, lambda error: isinstance(error, UnreadableError), READ_AGAIN_FOR_S)


def is_transient(error: BaseException) -> bool:
    """Return whether a fault may pass by itself: all but what a storage says of permissions and room, and our bugs.

    What is not found may be there in the next attempt: a folder, or a multipart upload that the server has forgotten.
    Over SFTP a full disk is tried again as well: the protocol says "Failure" to that as to much else. Credentials that
    have expired may have been renewed by somebody, and are read again.
    """
    if has_expired(error):
        return True
    root: BaseException | None = error
    while root:
        if isinstance(root, (PermissionError, NotADirectoryError, IsADirectoryError)):
            return False
        if isinstance(root, OSError) and root.errno in _LASTING:
            return False
        root = root.__cause__
    return isinstance(error, Exception) and not isinstance(error, (TypeError, AttributeError, LookupError))
