"""Reads a file of torch.save's without running anything from it: tensors, plain values, numpy's numbers and paths.

numpy's own reconstructors are never called: what a file says of a number is decoded here, by its type's letter. What
else asks for code is refused, and the message says under which key it lies. Knows nothing of what is in the file.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from model.weight_files import DAMAGE
from orchestrator.checkpoint.formats.progress import Progress
from orchestrator.errors import CheckpointError
from orchestrator.storage.reasons import reason_of

_PIECE_BYTES = 2**20
_NUMBER = re.compile(r"[biuf]\d{1,2}|U\d{1,4}")  # the types of numpy whose bytes are read, and text
_GLOBAL = re.compile(r"GLOBAL (\S+)")  # in what PyTorch says of what it does not load
_LFS_POINTER = b"version https://git-lfs"
# raised by Python's and PyTorch's parsers when they read a damaged file, or one of another kind
_PARSER_ERRORS = (*DAMAGE, pickle.PickleError)


def load_torch_file(path: Path, source: str) -> dict[str, Any]:
    """Return the dictionary in a file of torch.save's, verified; numpy's scalars and arrays as plain values.

    Tensors are mapped, not read: what is not asked for is never fetched from the disk.

    Raises:
        CheckpointError: the file is damaged, of another kind, or asks for code to be run; source is what it calls it.
    """
    _refuse_others(path, source)
    _verify(path, source)
    try:
        with torch.serialization.safe_globals(_PLAIN):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        content = _plain(content)
    except (pickle.UnpicklingError, _NotPlainError) as error:
        raise _refusal(path, source, error) from None
    except _PARSER_ERRORS as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"{source} is not a file of torch.save's ({reason}); check the path") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{source} holds a {type(content).__name__}, not nanoGPT's dictionary; check the path")
    return content


def _refuse_others(path: Path, source: str) -> None:
    """Name the kinds of files that people take for one of torch.save's.

    Raises:
        CheckpointError: it is one of them.
    """
    try:
        with path.open("rb") as file:
            start = file.read(32)
    except OSError as error:
        raise CheckpointError(f"{source} cannot be read: {reason_of(error)}") from None
    if start.startswith(_LFS_POINTER):
        raise CheckpointError(f"{source} is a pointer of Git LFS, not the file: fetch it with `git lfs pull`")
    if len(start) > 8 and start[8:9] == b"{" and int.from_bytes(start[:8], "little") < path.stat().st_size:
        raise CheckpointError(
            f"{source} is a safetensors file, not nanoGPT's ckpt.pt: give the Hugging Face folder that it belongs to, "
            "with its config.json"
        )


def _verify(path: Path, source: str) -> None:
    """Compare every record with its checksum in the zip file: torch.load does not, a flipped bit would pass."""
    remedy = "copy it again, or take an older one"
    try:
        damaged = _damaged_record(path, source)
    except OSError as error:
        raise CheckpointError(f"{source} cannot be read: {reason_of(error)}") from None
    except _PARSER_ERRORS as error:
        what = "is cut off or not a file of torch.save's"
        raise CheckpointError(f"{source} {what} ({error}); is it still being written? Else {remedy}") from None
    if damaged:
        raise CheckpointError(f"{source} is damaged: the checksum of its record {damaged} is wrong; {remedy}")


def _damaged_record(path: Path, source: str) -> str | None:
    progress = Progress(f"verifying {source}", path.stat().st_size)
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            try:
                with archive.open(info) as record:
                    while piece := record.read(_PIECE_BYTES):
                        progress.add(len(piece))
            except zipfile.BadZipFile:
                return info.filename
    return None


# numpy's numbers and paths, as plain values


class _NotPlainError(Exception):
    """A numpy value that is neither a number nor a text."""


class _Dtype:
    """What a pickle says of a numpy.dtype."""

    def __init__(self, code: str, *_: Any) -> None:
        if not (isinstance(code, str) and _NUMBER.fullmatch(code)):
            raise _NotPlainError(f"a numpy value of type {code!r}, which is no number")
        self.code, self.order = code, "<"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = ">" if state[1] == ">" else "<"

    def decode(self, raw: Any) -> Any:
        """Return the plain values (n) of an array's bytes."""
        if not isinstance(raw, bytes):
            raise _NotPlainError("a numpy value without its bytes")
        return np.frombuffer(raw, np.dtype(self.order + self.code)).tolist() if raw else []


def _scalar(dtype: _Dtype, raw: Any) -> Any:
    (value,) = _Dtype.decode(dtype, raw)
    return value


@dataclass
class _Array:
    """What a pickle says of a numpy.ndarray: made empty, and filled by its state."""

    values: list[Any] = field(default_factory=list)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, is_fortran, raw = state
        flat = np.array(_Dtype.decode(dtype, raw))
        self.values = flat.reshape(tuple(map(int, shape)), order="F" if is_fortran else "C").tolist()


class _NumpyArrayType:
    """Stands for the class numpy.ndarray where it is an argument."""


def _array(*_: Any) -> _Array:
    return _Array()


def _no_bytes(*_: Any) -> bytes:
    return b""


def _path(*parts: str) -> str:
    return "/".join(map(str, parts)).replace("//", "/")


_PLAIN: list[Any] = [
    (_Dtype, "numpy.dtype"),
    *((_scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    *((_array, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
    (_NumpyArrayType, "numpy.ndarray"),
    _Array,
    *((_no_bytes, name) for name in ("builtins.bytes", "__builtin__.bytes")),
    *((_path, f"pathlib.{name}") for name in ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath", "Path")),
    *((_path, f"pathlib._local.{name}") for name in ("PosixPath", "WindowsPath")),
]


def _plain(value: Any) -> Any:
    """Return a value with lists in the place of arrays."""
    if isinstance(value, _Array):
        return value.values
    if type(value) is dict:
        return {key: _plain(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(_plain, value))
    return value


# what asks for code


def _refusal(path: Path, source: str, error: Exception) -> CheckpointError:
    """Return the refusal: what is asked for, and under which key it lies where that can be told."""
    asked = _GLOBAL.search(str(error))
    is_ours = isinstance(error, _NotPlainError)
    wanted = str(error) if is_ours else f"it asks for {asked[1]}" if asked else "its pickle does more than that"
    with suppress(*_PARSER_ERRORS):  # then the message names no key
        wanted = next(("{} is of {}".format(*found) for found in _unknown(_Outline(path).load(), "")), wanted)
    return CheckpointError(
        f"{source} holds more than tensors and plain values, and nothing is run from a checkpoint: {wanted}; "
        "load it where you trust it, and save model, optimizer and plain values only"
    )


class _Unknown:
    """Stands for whatever a pickle asks for; takes all that is done to it, and does nothing."""

    name = ""

    def __new__(cls, *_args: Any, **_options: Any) -> _Unknown:
        return super().__new__(cls)

    def __init__(self, *_args: Any, **_options: Any) -> None: ...
    def __setstate__(self, _state: Any) -> None: ...
    def __setitem__(self, _key: Any, _value: Any) -> None: ...
    def __call__(self, *_args: Any) -> _Unknown:
        return self

    def append(self, _item: Any) -> None: ...
    def extend(self, _items: Any) -> None: ...


class _Dict(dict[Any, Any]):
    """Stands for an ordered dictionary, which may have attributes besides."""

    def __setstate__(self, _state: Any) -> None: ...


class _Outline(pickle.Unpickler):
    """Reads the shape of a pickle: no class or function of it is ever looked up."""

    def __init__(self, path: Path) -> None:
        archive = zipfile.ZipFile(path)
        (name,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
        super().__init__(archive.open(name))

    def find_class(self, module: str, name: str) -> Any:
        known = f"{module}.{name}"
        if known == "collections.OrderedDict":
            return _Dict
        is_tensors = known.startswith(("torch.", "numpy.", "_codecs.", "pathlib.")) or known in ("builtins.set",)
        return type("_Unknown", (_Unknown,), {"name": "" if is_tensors else known})

    def persistent_load(self, _pid: Any) -> Any:
        return None


def _unknown(value: Any, where: str) -> Iterator[tuple[str, str]]:
    """Yield the places of what is unknown, and what it is."""
    if isinstance(value, _Unknown) and value.name:
        yield where, value.name
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _unknown(item, f"{where}[{key!r}]" if where else repr(key))
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from _unknown(item, f"{where}[{i}]")
