"""Single files between this machine and a path or fsspec URL, for the formats that other programs read.

A file appears whole or not at all. Nothing here knows what is in a file.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from orchestrator.errors import CheckpointError


def exists(url: str, storage_options: dict[str, Any] | None = None) -> bool:
    """Return whether there is a file or folder.

    Raises:
        CheckpointError: storage that cannot be reached.
    """
    fs, path = _locate(url, storage_options)
    try:
        return bool(fs.exists(path))
    except Exception as error:  # every storage library has exceptions of its own
        raise CheckpointError(f"{url} cannot be looked for: {type(error).__name__}: {error}") from error


@contextmanager
def fetched(url: str, storage_options: dict[str, Any] | None = None) -> Iterator[Path]:
    """Lend a file as one on this machine: itself where it is local, else a copy that is deleted afterwards.

    Raises:
        CheckpointError: no such file, or storage that cannot be reached.
    """
    fs, path = _locate(url, storage_options)
    if isinstance(fs, LocalFileSystem):
        if not Path(path).is_file():
            raise CheckpointError(f"{url}: no such file; check the path")
        yield Path(path)
        return
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch, Path(path).name)
        try:
            fs.get_file(path, str(copy))
        except FileNotFoundError:
            raise CheckpointError(f"{url}: no such file; check bucket and path") from None
        except Exception as error:  # every storage library has exceptions of its own
            raise CheckpointError(f"{url}: cannot be fetched: {type(error).__name__}: {error}") from error
        yield copy


@contextmanager
def delivered(url: str, storage_options: dict[str, Any] | None = None) -> Iterator[Path]:
    """Lend a scratch file to write, and put it in its place once the block ends without an error.

    Local: a temporary name beside it, then a rename. Object stores, which cannot rename: one put, checked by size.

    Raises:
        CheckpointError: the file could not be written; what was at the url before is still there.
    """
    fs, path = _locate(url, storage_options)
    try:
        if isinstance(fs, LocalFileSystem):
            with _renamed_onto(Path(path)) as scratch_file:
                yield scratch_file
            return
        with tempfile.TemporaryDirectory() as scratch:
            scratch_file = Path(scratch, Path(path).name)
            yield scratch_file
            fs.makedirs(fs._parent(path), exist_ok=True)  # a folder on file servers, nothing on object stores
            fs.put_file(str(scratch_file), path)
            fs.invalidate_cache()
            if fs.size(path) != scratch_file.stat().st_size:  # some clients report success for half a file
                raise OSError(f"{fs.size(path)} of {scratch_file.stat().st_size} bytes arrived")
    except CheckpointError:
        raise
    except Exception as error:  # every storage library has exceptions of its own
        reason = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{url}: cannot be written: {reason}; check permissions and free space") from error


@contextmanager
def _renamed_onto(path: Path) -> Iterator[Path]:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())  # the content must be on disk before the name is
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _locate(url: str, storage_options: dict[str, Any] | None) -> tuple[Any, str]:
    try:
        fs, path = url_to_fs(str(url), **(storage_options or {}))
    except (ValueError, ImportError) as error:  # an unknown protocol, or one whose package is not installed
        raise CheckpointError(f"{url}: {error}") from error
    return fs, path
