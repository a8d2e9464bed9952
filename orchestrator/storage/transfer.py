"""Transfer: single files and folders in any storage, to and from this machine. Knows nothing of their content."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from orchestrator.errors import CheckpointError, MissingFileError, StorageUnavailableError
from orchestrator.storage.location import check_place, locate
from orchestrator.storage.reasons import is_transient, lacks_bucket, reason_of, translated


def exists(url: str, storage_options: dict[str, Any] | None = None) -> bool:
    """Return whether there is a file or folder.

    Raises:
        CheckpointError: storage that cannot be reached.
    """
    fs, path = locate(url, storage_options)
    with translated(f"{url} cannot be looked for", CheckpointError):
        return is_there(fs, path)


def is_there(fs: Any, path: str) -> bool:
    """Return whether there is a file or folder; fsspec's `exists` says no as well where a server does not answer."""
    try:
        fs.info(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        if lacks_bucket(error):
            raise
        return False
    return True


@contextmanager
def local_copy(url: str, storage_options: dict[str, Any] | None = None) -> Iterator[Path]:
    """Lend a file as one on this machine: itself where it is local, else a copy that we delete afterwards.

    Raises:
        CheckpointError: no such file, or storage that refuses us.
        StorageUnavailableError: the storage does not answer.
    """
    fs, path = locate(url, storage_options)
    with ExitStack() as stack:
        try:
            file = stack.enter_context(local_copy_of(fs, path))
        except MissingFileError as error:
            what = "the path" if isinstance(fs, LocalFileSystem) else "bucket and path"
            raise CheckpointError(f"{url}: no such file; check {what}") from error
        except StorageUnavailableError as error:
            kind = StorageUnavailableError if is_transient(error) else CheckpointError
            raise kind(f"{url}: cannot be fetched: {reason_of(error.__cause__)}") from error
        yield file


@contextmanager
def local_copy_of(fs: Any, path: str) -> Iterator[Path]:
    """Lend a file as `local_copy` does.

    Raises:
        MissingFileError: no such file.
        StorageUnavailableError: the storage does not answer.
    """
    if isinstance(fs, LocalFileSystem):
        if not Path(path).is_file():
            raise MissingFileError(f"{path} is missing")
        yield Path(path)
        return
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch, Path(path).name)
        with translated(f"{path} cannot be read", StorageUnavailableError):
            try:
                fs.get_file(path, str(file))
            except FileNotFoundError as error:
                if lacks_bucket(error):
                    raise
                raise MissingFileError(f"{path} is missing") from error
        yield file


@contextmanager
def atomic_write(url: str, storage_options: dict[str, Any] | None = None) -> Iterator[Path]:
    """Lend a scratch file to write, and put it in its place once the block ends without an error.

    Raises:
        CheckpointError: the file could not be written; what was at the url before is still there.
    """
    fs, path = locate(url, storage_options)
    check_place(fs, path, url)
    with atomic_write_to(fs, path, url) as scratch_file:
        yield scratch_file


@contextmanager
def atomic_write_to(fs: Any, path: str, url: str, *, is_lasting: bool = True) -> Iterator[Path]:
    """Lend a scratch file as `atomic_write` does; url: for messages.

    Local: a temporary name beside it, then a rename. Object stores, which cannot rename: one put, checked by size.
    is_lasting: on a local disk, wait until no power cut could take it back, which on a busy disk is a second or more.

    Raises:
        CheckpointError: the file could not be written; what was at the path before is still there.
    """
    with translated(f"{url}: cannot be written", advice="check permissions and free space"):
        if isinstance(fs, LocalFileSystem):
            target = Path(path)
            target.parent.mkdir(parents=True, exist_ok=True)
            # two nodes may have equal process ids
            scratch_file = target.with_name(f".{target.name}.{os.urandom(4).hex()}.tmp")
            try:
                yield scratch_file
                if is_lasting:
                    with scratch_file.open("rb+") as file:
                        os.fsync(file.fileno())  # the content must be on disk before the name is
                scratch_file.replace(target)
            finally:
                scratch_file.unlink(missing_ok=True)
            return
        with tempfile.TemporaryDirectory() as scratch:
            scratch_file = Path(scratch, Path(path).name)
            yield scratch_file
            make_folder(fs, fs._parent(path))
            fs.put_file(str(scratch_file), path)
            fs.invalidate_cache()
            if fs.size(path) != scratch_file.stat().st_size:  # some clients report success for half a file
                raise OSError(f"{fs.size(path)} of {scratch_file.stat().st_size} bytes arrived")


def append_lines(path: Path, text: str) -> None:
    """Append whole lines to a file on a disk. If a crash has cut off its last line, begin a new one.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        size_bytes = file.seek(0, 2)
        file.seek(max(0, size_bytes - 1))
        is_cut_off = file.read(1) not in (b"", b"\n")
        file.write(("\n" + text if is_cut_off else text).encode())


def make_folder(fs: Any, path: str) -> None:
    """Make a folder on file servers. On object stores there are none, and theirs would make a mistyped bucket."""
    if not path.startswith("/"):
        return
    try:
        fs.makedirs(path, exist_ok=True)
    except OSError:  # over SFTP: another rank has made it since this one looked
        if not fs.isdir(path):
            raise


@contextmanager
def removing_new_folders(fs: Any, path: str) -> Iterator[None]:
    """Remove the folders on a disk, path and those above, that the block makes and leaves empty.

    Raises:
        OSError: it cannot be found out which of them exist.
    """
    is_local = isinstance(fs, LocalFileSystem)
    missing = [each for each in (Path(path), *Path(path).parents) if is_local and not each.exists()]
    try:
        yield
    finally:
        for folder in missing:  # the deepest first
            with suppress(OSError):  # never made, or somebody else has put something there
                folder.rmdir()


def delete_folder(fs: Any, path: str) -> None:
    """Delete a folder with all that is in it, and nothing else: fsspec's `rm` takes `[`, `*` and `?` for a pattern.

    Raises:
        Exception: the storage's own.
    """
    if isinstance(fs, LocalFileSystem):  # which knows no patterns
        fs.rm(path, recursive=True)
        return
    found = fs.find(path, withdirs=True, detail=True)
    inside = [name for name in found if name == path or name.startswith(f"{path}/")]
    for name in sorted(inside, reverse=True):  # what is in a folder comes before it
        if found[name]["type"] != "directory":
            fs.rm_file(name)
        elif path.startswith("/"):
            fs.rmdir(name)
        else:  # there are no folders in an object store, but some keep a mark of one
            with suppress(OSError):
                fs.rm_file(name)
    fs.invalidate_cache()
