"""A checkpoint of the store a tensor at a time, for formats that are written without the state in memory."""

from __future__ import annotations

import json
import mmap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from fsspec.implementations.local import LocalFileSystem
from torch import Tensor

from orchestrator.checkpoint.snapshot import Snapshot
from orchestrator.checkpoint.store import Checkpoint, CheckpointStore
from orchestrator.checkpoint.tensor_file import stream_tensors
from orchestrator.errors import CheckpointError, DamagedError, StorageUnavailableError
from orchestrator.storage.transfer import local_copy_of

T = TypeVar("T")


def first_whole(store: CheckpointStore, which: str, read: Callable[[Checkpoint], T]) -> tuple[Checkpoint, T]:
    """Select a checkpoint and return it with what `read` makes of it; a damaged one is passed over for an older one.

    Raises:
        CheckpointError: there is none, or the one that was asked for by name is damaged.
    """
    while True:
        checkpoint = store.select(which)
        try:
            return checkpoint, read(checkpoint)
        except DamagedError as error:
            if which == checkpoint.name:
                raise
            store.reject(checkpoint.name, str(error))


def outline(checkpoint: Checkpoint, model_only: bool = False) -> Snapshot:
    """Return a checkpoint's state with tensors that have shape and type but no content (on the device meta)."""
    entries = _entries(checkpoint, model_only)
    return checkpoint.snapshot({name: _empty(entry) for name, entry in entries.items()})


def stream(store: CheckpointStore, checkpoint: Checkpoint, model_only: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of a checkpoint once, in the order of its files; with model_only the optimizer's stay unread.

    Whether the bytes are right is known at the end only: deliver nothing before the iterator is exhausted.

    Raises:
        DamagedError: naming the file that is missing, damaged or not what state.json says.
    """
    missing = {name: _empty(entry) for name, entry in _entries(checkpoint, model_only).items()}
    try:
        for file, record in (checkpoint.model_files if model_only else checkpoint.files).items():
            path = store.folder.path(checkpoint.name, file)
            for name, tensor in stream_tensors(store.folder.fs, path, record):
                expected = missing.pop(name, None)
                if expected is None or (expected.shape, expected.dtype) != (tensor.shape, tensor.dtype):
                    raise CheckpointError(f"{path} is damaged: its {name} is not the one that state.json tells of")
                yield name, tensor
        if missing:
            raise CheckpointError(f"{checkpoint.name} is damaged: no file of it has {', '.join(sorted(missing)[:5])}")
    except StorageUnavailableError:
        raise
    except CheckpointError as error:
        raise DamagedError(str(error)) from None


def mapped(store: CheckpointStore, checkpoint: Checkpoint, model_only: bool = False) -> Snapshot:
    """Return a checkpoint's state, verified, with tensors that are mapped from its files: they take no memory.

    What lies elsewhere than on a disk of this machine is fetched into scratch files, which the tensors outlive.

    Raises:
        DamagedError: naming the file that is missing or damaged.
        StorageUnavailableError: the storage does not answer.
    """
    tensors: dict[str, Tensor] = {}
    entries = _entries(checkpoint, model_only)
    for file, record in (checkpoint.model_files if model_only else checkpoint.files).items():
        try:
            with local_copy_of(store.folder.fs, store.folder.path(checkpoint.name, file)) as path:
                for _ in stream_tensors(LocalFileSystem(), str(path), record):  # one after the other, and dropped
                    pass
                tensors |= _mapped(path, {name: each for name, each in entries.items() if each["file"] == file})
        except StorageUnavailableError:
            raise
        except CheckpointError as error:
            raise DamagedError(str(error)) from None
    if missing := sorted(entries.keys() - tensors.keys()):
        raise DamagedError(f"{checkpoint.name} is damaged: no file of it has {', '.join(missing[:5])}")
    return checkpoint.snapshot(tensors)


def _mapped(path: Path, entries: dict[str, dict[str, Any]]) -> dict[str, Tensor]:
    """Return tensors of a file that was verified: views of its bytes, of which none is read before it is used.

    Raises:
        DamagedError: they are not what state.json tells of.
    """
    with path.open("rb") as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    data_at = 8 + int.from_bytes(content[:8], "little")
    found = {}
    for name, place in json.loads(content[8:data_at]).items():
        empty = _empty(entries[name]) if name in entries else torch.empty(0)
        start, end = place["data_offsets"]
        if name not in entries or place["shape"] != list(empty.shape) or end - start != empty.nbytes:
            raise DamagedError(f"{path} is damaged: its {name} is not the one that state.json tells of")
        flat = torch.frombuffer(content, dtype=empty.dtype, count=empty.numel(), offset=data_at + start)
        found[name] = flat.view(empty.shape)
    return found


def _entries(checkpoint: Checkpoint, model_only: bool) -> dict[str, dict[str, Any]]:
    files = checkpoint.model_files if model_only else checkpoint.files
    return {name: entry for name, entry in checkpoint.state["tensors"].items() if entry["file"] in files}


def _empty(entry: dict[str, Any]) -> Tensor:
    return torch.empty(entry["shape"], dtype=getattr(torch, entry["dtype"]), device="meta")
