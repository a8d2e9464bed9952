"""CheckpointStore: the checkpoints of one run as they lie in storage.

    <out_dir>/checkpoint_<iter_num>_<attempt>/state.json                            written last: without it, nothing
                                             /model-00000-of-00002.safetensors      nanoGPT's parameter names
                                             /optimizer-00000-of-00002.safetensors  exp_avg.<parameter>, ..., step

The truth about a run is what lies here whole; Ray's registry is a cache of it. Knows nothing of ranks (`save.py`,
`restore.py`) or of live models (`state.py`).
"""

from __future__ import annotations

import json
import logging
import re
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import xxhash
from fsspec.exceptions import FSTimeoutError
from fsspec.implementations.local import LocalFileSystem
from torch import Tensor

from orchestrator.checkpoint.snapshot import Snapshot, undescribe
from orchestrator.checkpoint.tensor_file import FileRecord, read_tensors
from orchestrator.checkpoint.tensor_slice import TensorSlice, assemble
from orchestrator.errors import CheckpointError, StorageUnavailableError, nearest
from orchestrator.storage.folders import delete_folder
from orchestrator.storage.options import read_again
from orchestrator.storage.reasons import has_expired, is_refused, lacks_bucket, reason_of
from orchestrator.storage.transfer import atomic_write, check_place, is_there, locate, renewed

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
RUN_FILE = "run.json"
_ATTEMPT_FILE = "attempt.json"
_FIRST_ANSWER_S = 20.0  # storage that says nothing for so long is taken for unreachable
_CHOICES = ("auto", "latest", "best")
_NAME = re.compile(r"checkpoint_(\d{8,})_(\w+)")
_WITHDRAWN_TEXT = b'{"withdrawn": true}'

T = TypeVar("T")


class UndeletableError(Exception):
    """Storage that can be written does not let us delete."""


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint: its directory name and the content of its state.json."""

    name: str
    state: dict[str, Any]

    @property
    def iter_num(self) -> int:
        return int(self.state["iter_num"])

    @property
    def val_loss(self) -> float | None:
        value = self.state["val_loss"]
        return None if value is None else float(value)

    @property
    def is_evaluated(self) -> bool:
        """Whether the evaluation of its iteration is behind it, or none was due."""
        return bool(self.state.get("is_evaluated", True))

    @property
    def files(self) -> dict[str, FileRecord]:
        return {name: FileRecord(**record) for name, record in self.state["files"].items()}

    @property
    def model_files(self) -> dict[str, FileRecord]:
        return {name: record for name, record in self.files.items() if name.startswith("model-")}

    @property
    def size_bytes(self) -> int:
        return sum(record.size_bytes for record in self.files.values())

    def snapshot(self, tensors: dict[str, Tensor]) -> Snapshot:
        """Return the state with these tensors of its files, put together from slices; it may lack the optimizer's."""
        parts: dict[bool, list[TensorSlice]] = {True: [], False: []}
        for key, tensor in tensors.items():
            entry = self.state["tensors"][key]
            parts[entry["file"].startswith("model-")].append(TensorSlice.from_json(key, entry, tensor))
        return undescribe(self.state, assemble(parts[True]), assemble(parts[False]))


class CheckpointStore:
    """The checkpoints in one run's folder, which is a path or any fsspec URL; key: the setting that names it."""

    def __init__(self, out_dir: str, storage_options: dict[str, Any] | None = None, key: str = "out_dir") -> None:
        self.out_dir, self.storage_options, self.key = out_dir, storage_options, key
        try:
            self.fs, self.root = locate(out_dir, storage_options)
            check_place(self.fs, self.root, out_dir)
        except CheckpointError as error:
            raise CheckpointError(f"{key}={error}") from None
        self._is_shared = True  # fsspec hands out one client to all
        self.damaged: dict[str, str] = {}  # checkpoints that were found not to be whole, and why
        self.can_delete = True  # until storage says that it lets us not

    def reconnect(self, error: BaseException | None = None) -> None:
        """Open a new connection to file servers, which keep one: it may have been lost with the server.

        error: what has failed. Where storage has refused it, credentials are read again.
        """
        if isinstance(self.fs, LocalFileSystem):
            return
        if self.fs.async_impl:
            if error and is_refused(error):
                self.fs, self.storage_options = renewed(self.fs, self.out_dir, self.storage_options)
            return
        lost, self.storage_options = self.fs, read_again(self.storage_options)
        self.fs, _ = locate(self.out_dir, {**(self.storage_options or {}), "skip_instance_cache": True})
        if not self._is_shared and hasattr(lost, "client"):
            lost.client.close()  # of SSH: nobody else has it
        self._is_shared = False

    def insisting(self, call: Callable[[], T], *, tells: bool = True) -> T:
        """Return call()'s value; where storage refuses it, call once more with credentials that were read again.

        tells: say so where that has helped.

        Raises:
            Exception: the second one.
        """
        try:
            return call()
        except Exception as error:  # every storage has exceptions of its own
            if isinstance(self.fs, LocalFileSystem) or not is_refused(error):
                raise
            self.reconnect(error)
            value = call()
            if tells:
                logger.info("storage had refused us, credentials are read again: %s", reason_of(error))
            return value

    def path(self, *parts: str) -> str:
        return "/".join((self.root.rstrip("/"), *parts))

    def names(self) -> list[str]:
        """Return the names of all checkpoint directories, whole or not, highest iteration first."""
        self.fs.invalidate_cache()
        try:
            limit = {"timeout": _FIRST_ANSWER_S} if self.fs.async_impl else {}
            entries = self.fs.ls(self.root, detail=False, **limit)
        except Exception as error:  # every storage has exceptions of its own
            if lacks_bucket(error):
                raise CheckpointError(
                    f"out_dir={self.out_dir}: {reason_of(error)}; make it, or check its name"
                ) from error
            if isinstance(error, FileNotFoundError | NotADirectoryError):
                return []
            is_late = isinstance(error, FSTimeoutError)
            reason = f"no answer in {_FIRST_ANSWER_S:g} s" if is_late else reason_of(error)
            raise StorageUnavailableError(
                f"{self.key}={self.out_dir} cannot be read: {reason}; "
                "check the address, the network and the credentials"
            ) from error
        found = [name for entry in entries if _NAME.fullmatch(name := entry.rstrip("/").rsplit("/", 1)[-1])]
        return newest_name_first(found)

    def load(self, name: str) -> Checkpoint | None:
        """Return a checkpoint, or None where it was never committed.

        Raises:
            CheckpointError: its state.json is damaged or of another format.
            StorageUnavailableError: the storage does not answer.
        """
        text = self._read(f"{name}/state.json")
        if text is None or text == _WITHDRAWN_TEXT:
            return None
        return Checkpoint(name, parse_state(text, self.path(name, "state.json")))

    def _read(self, name: str) -> bytes | None:
        path = self.path(name)
        try:
            return bytes(self.fs.cat_file(path))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except Exception as error:  # every storage has exceptions of its own
            raise StorageUnavailableError(f"{path} cannot be read: {reason_of(error)}") from error

    def newest_first(self) -> Iterator[Checkpoint]:
        """Yield the committed checkpoints; one with a damaged state.json is passed over with a warning."""
        for name in self.names():
            try:
                checkpoint = self.load(name)
            except CheckpointError as error:
                self.reject(name, str(error))
                continue
            if checkpoint:
                yield checkpoint

    def reject(self, name: str, why: str) -> None:
        """Note that a checkpoint is not whole: it is passed over, and it does not count among those that are kept."""
        if name not in self.damaged:
            logger.warning("checkpoint %s is not whole, falling back to the one before: %s", name, why)
        self.damaged[name] = why

    def select(self, which: str = "auto") -> Checkpoint:
        """Return a checkpoint by name, the `latest`, the `best` (validation loss), or `auto`: what nanoGPT's ckpt.pt
        would hold, the latest with always_save_checkpoint and the best without.

        Raises:
            CheckpointError: there is none.
        """
        found = self._whole()
        if which not in _CHOICES:
            found = [checkpoint for checkpoint in found if checkpoint.name == which]
        if not found:
            raise self._nothing(which)
        keeps_best = not found[0].state["config"].get("always_save_checkpoint", True)
        if which == "best" or (which == "auto" and keeps_best):
            return best(found) or found[0]
        return found[0]

    def read(self, checkpoint: Checkpoint, model_only: bool = False) -> Snapshot:
        """Read and verify a checkpoint's tensors; the optimizer's files are not touched with model_only.

        Raises:
            CheckpointError: naming the file that is missing or damaged.
        """
        tensors: dict[str, Tensor] = {}
        for name, record in (checkpoint.model_files if model_only else checkpoint.files).items():
            tensors |= read_tensors(self.fs, self.path(checkpoint.name, name), record)
        return checkpoint.snapshot(tensors)

    def _nothing(self, which: str) -> CheckpointError:
        where = f"{self.key}={self.out_dir} holds no"
        if which not in _CHOICES:
            there = ", ".join(self.names()) or "none"
            return CheckpointError(
                f"{where} whole checkpoint {which}; there are: {there}{nearest(which, self.names())}"
            )
        if self.damaged:
            return CheckpointError(f"{where} whole checkpoint: {_listed(self.damaged)}")
        return CheckpointError(f"{where} checkpoint: train there first, or give another --out_dir")

    def check_not_lost(self) -> None:
        """Refuse to begin anew over a run of which every checkpoint is damaged.

        Raises:
            CheckpointError: naming each and why.
        """
        if self.damaged:
            raise CheckpointError(
                f"out_dir={self.out_dir} holds a run, but no whole checkpoint of it: {_listed(self.damaged)}. "
                "Restore one from a copy, or give another --out_dir to begin anew"
            )

    def _whole(self) -> list[Checkpoint]:
        """Return the committed checkpoints; of one that was evaluated later, that one alone."""
        found = [checkpoint for checkpoint in self.newest_first() if checkpoint.name not in self.damaged]
        done = {checkpoint.iter_num for checkpoint in found if checkpoint.is_evaluated}
        return [checkpoint for checkpoint in found if checkpoint.is_evaluated or checkpoint.iter_num not in done]

    def commit(self, name: str, state: dict[str, Any]) -> Checkpoint:
        """Announce a checkpoint whose files are all written: after this it exists."""
        self._write_text(f"{name}/state.json", state_text(state))
        return Checkpoint(name, state)

    def identify(self) -> str:
        """Return the lasting id by which nodes know the states of this run in their memory; make one if it has none.

        Raises:
            CheckpointError: it cannot be written.
        """
        known = self.read_json(RUN_FILE)
        if "run_id" not in known:
            known["run_id"] = uuid.uuid4().hex
            self.write_json(RUN_FILE, known)
        return self.known_as(known["run_id"])

    def known_as(self, run_id: str) -> str:
        """Return the id of the run in this folder: a copy of it is another run, though its run.json is equal."""
        return f"{run_id}_{xxhash.xxh3_64(self.root.rstrip('/').encode()).hexdigest()}"

    def fence(self, attempt: str) -> None:
        """Make this attempt the one that may announce checkpoints.

        Raises:
            CheckpointError: it cannot be written.
        """
        self.write_json(_ATTEMPT_FILE, {"attempt": attempt}, is_lasting=False)  # after a power cut nobody is late

    def is_fenced(self, attempt: str) -> bool:
        """Return whether a later attempt writes here: this one was cut off, and given up by the others."""
        return bool(self.read_json(_ATTEMPT_FILE).get("attempt", attempt) != attempt)

    def write_json(self, name: str, value: dict[str, Any], *, is_lasting: bool = True) -> None:
        """Write a JSON file whole or not at all; is_lasting: see `atomic_write`."""
        self._write_text(name, json.dumps(value, indent=1, allow_nan=False), is_lasting=is_lasting)

    def _write_text(self, name: str, text: str, *, is_lasting: bool = True) -> None:
        url = f"{self.out_dir.rstrip('/')}/{name}"
        with atomic_write(url, self.storage_options, is_lasting=is_lasting) as file:
            file.write_text(text)

    def read_json(self, name: str) -> dict[str, Any]:
        """Return a JSON file's content, {} where it is missing or damaged.

        Raises:
            StorageUnavailableError: the storage does not answer, which is not the same.
        """
        try:
            value = json.loads(self._read(name) or b"{}")
        except ValueError:
            return {}
        return value if isinstance(value, dict) else {}

    def prune(self, keep: int) -> list[str]:
        """Delete all but the newest `keep` committed checkpoints and the best one; return what was deleted.

        What was begun up to the iteration of the newest committed one and never announced goes too. Beginnings of later
        ones stay, for somebody may be writing them; and what could not be read, for the storage may have been at fault.
        """
        if not self.can_delete or not self.names():  # asked first: what is refused here is no sign of damage
            return []
        found = self._whole()
        if not found:
            return []
        stay = {checkpoint.name for checkpoint in found[:keep]}
        if top := best(found):
            stay.add(top.name)
        stay |= self.damaged.keys()
        doomed = [name for name in self.names() if iter_num_of(name) <= found[0].iter_num and name not in stay]
        for name in doomed:
            self.delete_checkpoint(name)
        return doomed

    def delete_file(self, name: str) -> bool:
        """Delete a file of the run, where it is there; return whether it is gone: some storage lets us delete nothing.

        Raises:
            CheckpointError: it cannot be deleted, which may pass.
        """
        try:
            if is_there(self.fs, self.path(name)):
                self.fs.rm_file(self.path(name))
            return True
        except Exception as error:  # every storage has exceptions of its own
            if is_refused(error) and not has_expired(error):
                return False
            raise CheckpointError(f"{self.path(name)} cannot be deleted: {reason_of(error)}") from error

    def delete_checkpoint(self, name: str) -> None:
        """Delete state.json first, so that at no moment half a checkpoint looks whole.

        Raises:
            UndeletableError: storage refuses that.
            Exception: the storage's own.
        """
        announced = self.path(name, "state.json")
        try:
            if is_there(self.fs, announced):
                self.fs.rm_file(announced)
            delete_folder(self.fs, self.path(name))
        except Exception as error:
            if is_refused(error) and not has_expired(error):
                raise UndeletableError(f"nothing can be deleted there ({reason_of(error)})") from error
            raise

    def withdraw(self, name: str) -> None:
        """Make a checkpoint one that was never announced: it is deleted, or said to be none where that is refused."""
        try:
            self.delete_checkpoint(name)
        except UndeletableError:
            self._write_text(f"{name}/state.json", _WITHDRAWN_TEXT.decode())


def best(checkpoints: list[Checkpoint]) -> Checkpoint | None:
    """Return the one with the lowest validation loss, None where none was evaluated."""
    evaluated = [checkpoint for checkpoint in checkpoints if checkpoint.val_loss is not None]
    return min(evaluated, key=lambda checkpoint: (checkpoint.val_loss, -checkpoint.iter_num), default=None)


def checkpoint_name(iter_num: int, attempt: str) -> str:
    """Return the directory name: no two attempts share one, so a late writer cannot harm another's checkpoint."""
    return f"checkpoint_{iter_num:08d}_{attempt}"


def state_text(state: dict[str, Any]) -> str:
    """Return the content of a state.json: the state with its own checksum."""
    return json.dumps({**state, "checksum": _checksum(state)}, indent=1, allow_nan=False)


def parse_state(text: bytes, path: str) -> dict[str, Any]:
    """Return the state that a state.json tells of; path is for the message.

    Raises:
        CheckpointError: it is damaged, or of another format.
    """
    try:
        state: dict[str, Any] = json.loads(text)
        checksum, version = state.pop("checksum"), int(state["format_version"])
    except (ValueError, AttributeError, KeyError, TypeError):
        raise CheckpointError(f"{path} is damaged: it is not whole JSON") from None
    if version != FORMAT_VERSION:
        remedy = "update this program" if version > FORMAT_VERSION else "read it with the program that wrote it"
        raise CheckpointError(f"{path} has format {version}: {remedy}, this one knows {FORMAT_VERSION}")
    if checksum != _checksum(state):
        raise CheckpointError(f"{path} is damaged: its checksum differs from the one recorded when it was written")
    return state


def newest_name_first(names: Iterable[str]) -> list[str]:
    """Return names of checkpoints by iteration, highest first. Clocks play no part: those of two nodes may differ."""
    return sorted(names, key=_age)


def _age(name: str) -> tuple[int, str]:
    return -iter_num_of(name), name


def iter_num_of(name: str) -> int:
    """Return the iteration in the name of a checkpoint."""
    return int(name.split("_")[1])


def _checksum(state: dict[str, Any]) -> str:
    return xxhash.xxh3_128(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _listed(damaged: dict[str, str]) -> str:
    return "; ".join(f"{name} ({why})" for name, why in damaged.items())
