"""The files of a Hugging Face folder: which tensors are in them, as their headers tell, and each when it is asked for.

The folder lies on a disk, at an fsspec URL, or at the Hugging Face Hub. Never a pickle that could run code. Must not
know what the tensors are good for (`pretrained.py`).
"""

from __future__ import annotations

import json
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import torch
from fsspec.implementations.local import LocalFileSystem
from safetensors import SafetensorError, safe_open
from torch import Tensor

from model.huggingface import HUB_OWNER, PretrainedError, UnreachableError

TENSOR_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
ADAPTER_CONFIG, ADAPTER_FILES = "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")  # peft's
_OF_OTHERS = ("tf_model.h5", "flax_model.msgpack")  # of other frameworks
_DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8},
    **{"BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2},
}
_LARGEST_HEADER_BYTES = 100_000_000  # as the safetensors library has it
_BLOCK_BYTES = 2**18  # that is read ahead from storage: a header is smaller, and some would read 50 MB
_LFS_POINTER = b"version https://git-lfs"
# What a damaged file makes of torch.load, besides pickle.PickleError
DAMAGE = (
    *(ArithmeticError, AssertionError, AttributeError, EOFError, ImportError, LookupError, MemoryError, OSError),
    *(RuntimeError, TypeError, ValueError, struct.error, zipfile.BadZipFile, zlib.error),
)


@dataclass(frozen=True)
class Stored:
    """One tensor in a file: what it is, and how to read it, mapped where the file is on a disk."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]


@dataclass(frozen=True)
class Folder:
    """Where the files of a model lie.

    title: what messages call it.
    fetch: the name of a file -> where it lies on this machine, copied if need be, or FileNotFoundError.
    open: the same, as a file to read parts of.
    """

    title: str
    fetch: Callable[[str], Path]
    open: Callable[[str], AbstractContextManager[BinaryIO]]

    def has(self, name: str) -> bool:
        try:
            with self.open(name):
                return True
        except FileNotFoundError:
            return False


def stored_tensors(folder: Folder, files: tuple[str, ...] = TENSOR_FILES) -> dict[str, Stored]:
    """Return the tensors of the first of these files that is there, by the file's names.

    Raises:
        PretrainedError: none is there, or what is there is damaged, incomplete or holds more than tensors.
    """
    for name in files:
        try:
            found = _shards(name, folder) if name.endswith(".index.json") else _tensors_of(name, folder)
        except FileNotFoundError as error:
            if error.args != (name,):
                raise PretrainedError(f"{folder.title}: {name} names a file that is not there: {error}") from error
            continue
        except PretrainedError:
            raise
        except ValueError as error:
            raise _unreadable(name, folder, error) from error
        return found
    if files == TENSOR_FILES and (refusal := adapter_only(folder)):
        raise refusal
    others = [name for name in _OF_OTHERS if folder.has(name)]
    hint = f"; {' and '.join(others)} is of another framework: save the model from PyTorch" if others else ""
    raise PretrainedError(f"{folder.title}: none of {', '.join(files)} there{hint}")


def _unreadable(name: str, folder: Folder, error: Exception) -> PretrainedError:
    return PretrainedError(f"{folder.title}: {name} cannot be read: {error}")


def adapter_only(folder: Folder) -> PretrainedError | None:
    """Return why a folder without weights of its own is no model, if it is that of an adapter, as peft saves it."""
    if not folder.has(ADAPTER_CONFIG):
        return None
    return PretrainedError(
        f"{folder.title} holds an adapter ({ADAPTER_CONFIG}), which is no model: merge it into the one that it was "
        "made for (peft's merge_and_unload), save that, and give its folder"
    )


def _shards(index: str, folder: Folder) -> dict[str, Stored]:
    with _opened(index, folder) as file:
        content = json.loads(file.read())  # a ValueError of its own where it is damaged
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise ValueError("it has no weight_map from tensors to files")
    found: dict[str, Stored] = {}
    for shard in sorted(set(weight_map.values())):
        if PurePosixPath(shard).name != shard:
            raise ValueError(f"shard {shard!r} lies outside the folder")
        found |= _tensors_of(shard, folder)
    if lost := [name for name in weight_map if name not in found]:
        raise ValueError(f"{weight_map[lost[0]]} lacks {lost[0]}")
    return found


def _tensors_of(name: str, folder: Folder) -> dict[str, Stored]:
    with _opened(name, folder) as file:
        start = file.read(len(_LFS_POINTER))
        if start == _LFS_POINTER:
            raise ValueError(f"{name} is a pointer of Git LFS, not the file: fetch it with `git lfs pull`")
        if name.endswith(".safetensors"):
            entries = _safetensors_entries(file)
            return {
                key: Stored(shape, dtype, partial(_read_safetensor, name, key, folder))
                for key, (shape, dtype) in entries.items()
            }
        is_mapped = start.startswith(b"PK")  # a file of the old format, no zip, cannot be
        loaded = cache(lambda: _load_whole(name, folder, is_mapped))
        file.seek(0)
        outline = _load(file, name, map_location="meta") if is_mapped else loaded()
    return {
        key: Stored(tuple(tensor.shape), tensor.dtype, lambda key=key: loaded()[key])  # type: ignore[misc]
        for key, tensor in outline.items()
    }


def _opened(name: str, folder: Folder) -> AbstractContextManager[BinaryIO]:
    """Open a file; its own name is what a FileNotFoundError has to tell."""
    try:
        return folder.open(name)
    except FileNotFoundError:
        raise FileNotFoundError(name) from None


def _safetensors_entries(file: BinaryIO) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return shapes and types from the header of a safetensors file.

    Source for the format: https://github.com/huggingface/safetensors

    Raises:
        ValueError: it is no such file, or its end is missing.
    """
    file.seek(0, 2)
    size_bytes = file.tell()  # what seek returns, some file servers' files keep to themselves
    file.seek(0)
    length_bytes = struct.unpack("<Q", file.read(8))[0] if size_bytes >= 8 else 0
    if not 2 <= length_bytes <= min(size_bytes - 8, _LARGEST_HEADER_BYTES):
        raise ValueError("it is cut off or no safetensors file")
    try:
        header = json.loads(file.read(length_bytes))
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        found = {
            name: (tuple(int(length) for length in entry["shape"]), _DTYPES[entry["dtype"]])
            for name, entry in entries.items()
        }
        end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"its header is damaged ({type(error).__name__}: {error})") from None
    if size_bytes != 8 + length_bytes + end:
        raise ValueError(
            f"it has {size_bytes:,} bytes instead of {8 + length_bytes + end:,}; is it still being copied?"
        )
    return found


def _read_safetensor(name: str, key: str, folder: Folder) -> Tensor:
    path = folder.fetch(name)
    try:
        # Each is mapped by itself: its memory is free once it is dropped.
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(key)  # type: ignore[no-any-return]
    except (SafetensorError, ValueError, RuntimeError, OSError) as error:  # its header contradicts itself, for one
        raise _unreadable(name, folder, error) from error


def _load_whole(name: str, folder: Folder, is_mapped: bool) -> dict[str, Tensor]:
    path = folder.fetch(name)
    try:
        return _load(path, name, mmap=is_mapped)
    except ValueError as error:
        raise _unreadable(name, folder, error) from error


def _load(file: Path | BinaryIO, name: str, **options: Any) -> dict[str, Tensor]:
    try:
        content = torch.load(file, weights_only=True, **{"map_location": "cpu", **options})
    except pickle.UnpicklingError:  # PyTorch's own message advises to switch the protection off
        raise ValueError("it holds more than tensors, or is no PyTorch file; convert it to safetensors") from None
    except DAMAGE as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"it is cut off, damaged or no PyTorch file ({type(error).__name__}: {reason})") from None
    if not isinstance(content, dict) or not all(isinstance(x, Tensor) for x in content.values()):
        inside = f" (keys: {', '.join(map(str, list(content)[:5]))})" if isinstance(content, dict) else ""
        raise ValueError(f"{name} is no dictionary of tensors{inside}")
    return content


def folder_at(source: str, fs: Any, path: str, scratch: Path) -> Folder:
    """Return a folder that an fsspec filesystem has; what does not lie on this machine is fetched to scratch."""

    @contextmanager
    def reachable(name: str, of_the_reader: tuple[type[Exception], ...] = ()) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise FileNotFoundError(name) from None
        except of_the_reader:
            raise
        except Exception as error:  # every storage library has exceptions of its own
            raise UnreachableError(f"{source}: cannot fetch {name}: {type(error).__name__}: {error}") from error

    def fetch(name: str) -> Path:
        if isinstance(fs, LocalFileSystem):
            if not Path(path, name).is_file():
                raise FileNotFoundError(name)
            return Path(path, name)
        if not (scratch / name).exists():
            with reachable(name):
                fs.get_file(f"{path}/{name}", str(scratch / name))
        return scratch / name

    @contextmanager
    def open_file(name: str) -> Iterator[BinaryIO]:
        if isinstance(fs, LocalFileSystem):
            with fetch(name).open("rb") as file:
                yield file
            return
        with reachable(name):
            remote = fs.open(f"{path}/{name}", "rb", block_size=_BLOCK_BYTES)
        with remote, reachable(name, (ValueError,)):  # bytes are fetched when they are read, and may be no tensors
            yield remote

    return Folder(source, fetch, open_file)


def hub_folder(model_type: str, revision: str = "") -> Folder:
    """Return a folder of the Hugging Face Hub, or of its local cache where the Hub was visited before.

    revision: a commit, branch or tag; default: the newest that is here, else at the Hub.
    """
    # Imported here: it is slow to import, and only those who fetch from the Hub need it.
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    def fetch(name: str) -> Path:
        repo, commit = f"{HUB_OWNER}/{model_type}", revision or None
        with suppress(LocalEntryNotFoundError):  # the Hub is asked, which takes half a minute offline, if need be only
            return Path(hf_hub_download(repo, name, revision=commit, local_files_only=True))
        try:
            return Path(hf_hub_download(repo, name, revision=commit))
        except EntryNotFoundError as e:
            if isinstance(e, LocalEntryNotFoundError):  # neither the Hub nor the cache answered
                raise _unreachable(model_type, e) from e
            raise FileNotFoundError(name) from e
        except OSError as e:
            raise _unreachable(model_type, e) from e

    return Folder(model_type, fetch, lambda name: fetch(name).open("rb"))


def hub_commit(model_type: str, revision: str = "") -> str:
    """Return the commit of the weights that `hub_folder` has fetched to this machine, "" if it has fetched none.

    Source: the layout of the Hub's cache, snapshots/<commit>/<file>, https://huggingface.co/docs/huggingface_hub
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    for name in TENSOR_FILES:
        with suppress(LocalEntryNotFoundError):
            repo = f"{HUB_OWNER}/{model_type}"
            path = Path(hf_hub_download(repo, name, revision=revision or None, local_files_only=True))
            return path.parent.name if path.parent.parent.name == "snapshots" else ""
    return ""


def _unreachable(model_type: str, cause: Exception) -> UnreachableError:
    return UnreachableError(
        f"{model_type}: cannot reach the Hugging Face Hub ({type(cause).__name__}: {cause}). Download config.json and "
        f"model.safetensors of {HUB_OWNER}/{model_type} on a machine that can, and pass the path or URL of their "
        "folder instead of the name."
    )
