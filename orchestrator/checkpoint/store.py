"""CheckpointStore: the checkpoints of one run as they lie in storage.

    <out_dir>/checkpoint_<iter_num>_<attempt>/state.json                            written last: without it, nothing
                                             /model-00000-of-00002.safetensors      nanoGPT's parameter names
                                             /optimizer-00000-of-00002.safetensors  exp_avg.<parameter>, ..., step

Whatever lies here whole is the truth about a run; Ray's registry is a cache of it. Knows nothing of ranks (`save/`,
`restore/`) or of live models (`state.py`).
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import xxhash
from torch import Tensor

from orchestrator.checkpoint.snapshot import Adapters, Snapshot, undescribe
from orchestrator.checkpoint.tensor_file import FileRecord, read_tensors
from orchestrator.checkpoint.tensor_slice import TensorSlice, assemble
from orchestrator.errors import CheckpointError, UndeletableError, nearest
from orchestrator.storage.run_folder import RunFolder

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
ADAPTER_FORMAT_VERSION = 2  # of a state that is adapters alone: a program that knows none of them must refuse it
_CHOICES = ("auto", "latest", "best")
_NAME = re.compile(r"checkpoint_(\d{8,})_(\w+)")
_WITHDRAWN_TEXT = '{"withdrawn": true}'


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
    def adapters(self) -> Adapters | None:
        """The base model of a state that is adapters alone."""
        found = self.state.get("adapters")
        return Adapters.from_json(found) if found else None

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

    def slices(self) -> dict[str, list[TensorSlice]]:
        """Return the slices in every file, in their order there, without their values: file -> slices."""
        found: dict[str, list[TensorSlice]] = {}
        for key, entry in self.state["tensors"].items():
            outline = torch.empty(entry["shape"], device="meta")
            found.setdefault(entry["file"], []).append(TensorSlice.from_json(key, entry, outline))
        return found

    def snapshot(self, tensors: dict[str, Tensor]) -> Snapshot:
        """Return the state with these tensors of its files, put together from slices; it may lack the optimizer's."""
        parts: dict[bool, list[TensorSlice]] = {True: [], False: []}
        for key, tensor in tensors.items():
            entry = self.state["tensors"][key]
            parts[entry["file"].startswith("model-")].append(TensorSlice.from_json(key, entry, tensor))
        return undescribe(self.state, assemble(parts[True]), assemble(parts[False]))


class CheckpointStore:
    """The checkpoints in a run's folder.

    damaged: checkpoints that we have found not to be whole, and why.
    can_delete: until storage does not let us.
    """

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self.damaged: dict[str, str] = {}
        self.can_delete = True

    def names(self) -> list[str]:
        """Return the names of all checkpoint directories, whole or not, highest iteration first.

        Raises:
            CheckpointError: there is no such bucket.
            StorageUnavailableError: the storage does not answer.
        """
        return newest_name_first(name for name in self.folder.list() if _NAME.fullmatch(name))

    def load(self, name: str) -> Checkpoint | None:
        """Return a checkpoint, or None where it was never committed.

        Raises:
            CheckpointError: its state.json is damaged or of another format.
            StorageUnavailableError: the storage does not answer.
        """
        text = self.folder.read(f"{name}/state.json")
        if text is None or text == _WITHDRAWN_TEXT.encode():
            return None
        return Checkpoint(name, parse_state(text, self.folder.path(name, "state.json")))

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
            tensors |= read_tensors(self.folder.fs, self.folder.path(checkpoint.name, name), record)
        return checkpoint.snapshot(tensors)

    def _nothing(self, which: str) -> CheckpointError:
        where = f"{self.folder.key}={self.folder.out_dir} holds no"
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
                f"out_dir={self.folder.out_dir} holds a run, but no whole checkpoint of it: {_listed(self.damaged)}. "
                "Restore one from a copy, or give another --out_dir to begin anew"
            )

    def _whole(self) -> list[Checkpoint]:
        """Return the committed checkpoints; of one that was evaluated later, that one alone."""
        found = [checkpoint for checkpoint in self.newest_first() if checkpoint.name not in self.damaged]
        done = {checkpoint.iter_num for checkpoint in found if checkpoint.is_evaluated}
        return [checkpoint for checkpoint in found if checkpoint.is_evaluated or checkpoint.iter_num not in done]

    def commit(self, name: str, state: dict[str, Any], attempt: str) -> bool:
        """Commit a checkpoint whose files are all written; return False, and do nothing, if a later attempt writes."""
        if self.folder.is_fenced(attempt):
            return False
        self.folder.write_whole(f"{name}/state.json", state_text(state))
        return True

    def prune(self, keep: int) -> list[str]:
        """Delete all but the newest `keep` committed checkpoints and the best one; return what was deleted.

        Those that were begun up to the iteration of the newest committed one and never committed go too. Beginnings of
        later ones stay, for somebody may be writing them; damaged ones stay, for the storage may have been at fault.
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

    def delete_checkpoint(self, name: str) -> None:
        """Delete state.json first, so that at no moment half a checkpoint looks whole.

        Raises:
            UndeletableError: storage refuses that.
            CheckpointError: it fails at it.
        """
        self.folder.delete(f"{name}/state.json")
        self.folder.delete_folder(name)

    def withdraw(self, name: str) -> None:
        """Undo the commit of a checkpoint: delete it or, where storage refuses that, mark it as none."""
        try:
            self.delete_checkpoint(name)
        except UndeletableError:
            self.folder.write_whole(f"{name}/state.json", _WITHDRAWN_TEXT)


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
    if version not in (FORMAT_VERSION, ADAPTER_FORMAT_VERSION):
        newest = ADAPTER_FORMAT_VERSION
        remedy = "update this program" if version > newest else "read it with the program that wrote it"
        raise CheckpointError(f"{path} has format {version}: {remedy}, this one knows {FORMAT_VERSION} and {newest}")
    if checksum != _checksum(state):
        raise CheckpointError(f"{path} is damaged: its checksum differs from the one recorded when it was written")
    return state


def newest_name_first(names: Iterable[str]) -> list[str]:
    """Return names of checkpoints by iteration, highest first. Clocks play no part: those of two nodes may differ."""
    return sorted(names, key=lambda name: (-iter_num_of(name), name))


def iter_num_of(name: str) -> int:
    """Return the iteration in the name of a checkpoint."""
    return int(name.split("_")[1])


def _checksum(state: dict[str, Any]) -> str:
    return xxhash.xxh3_128(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _listed(damaged: dict[str, str]) -> str:
    return "; ".join(f"{name} ({why})" for name, why in damaged.items())
