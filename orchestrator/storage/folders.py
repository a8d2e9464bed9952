"""Folders in storage: whether a run can write into one, and deleting one. Knows nothing of what lies in them."""

from __future__ import annotations

import errno
import logging
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from orchestrator.errors import CheckpointError
from orchestrator.storage.reasons import is_refused, reason_of
from orchestrator.storage.transfer import locate, make_folder

logger = logging.getLogger(__name__)

PROBE_FILE = ".writable"  # one name for all: where nothing can be deleted, it stays
_PLAIN = re.compile(r"[\w./=,+@%~ -]*", re.ASCII)
_PROBES = 3  # another driver that starts at the same moment deletes ours


def check_writable(folder_url: str, storage_options: dict[str, Any] | None = None) -> None:
    """Write an empty file into a run's folder and delete it again, with the folders that were made for it.

    Warns where nothing can be deleted: a run can do without.

    Raises:
        CheckpointError: it cannot be written.
    """
    fs, folder = locate(folder_url, storage_options)
    try:
        made = _missing_folders(folder) if isinstance(fs, LocalFileSystem) else []
    except OSError as error:
        raise _not_writable(folder_url, error) from error
    try:
        _write_probe(fs, folder)
        _delete_probe(fs, folder, folder_url)
    except Exception as error:  # every storage library has exceptions of its own
        raise _not_writable(folder_url, error) from error
    finally:
        for path in made:
            with suppress(OSError):  # never made, or somebody else has put something there
                path.rmdir()


def _not_writable(folder_url: str, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"out_dir={folder_url} cannot be written: {reason_of(error)}; check the path, permissions and free space"
    )


def _write_probe(fs: Any, folder: str) -> None:
    if isinstance(fs, LocalFileSystem) and os.path.lexists(folder) and not Path(folder).is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), folder)
    make_folder(fs, folder)
    for _ in range(_PROBES):
        fs.pipe_file(f"{folder.rstrip('/')}/{PROBE_FILE}", b"")
        if _PLAIN.fullmatch(folder) or _is_listed(fs, folder):
            return
    raise OSError("what is written there is not found there again, so the server knows it by another path")


def _is_listed(fs: Any, folder: str) -> bool:
    """Return whether the probe is found by whoever lists the folder: some servers change odd letters of a path."""
    fs.invalidate_cache()
    with suppress(FileNotFoundError):
        return any(path.rsplit("/", 1)[-1] == PROBE_FILE for path in fs.ls(folder, detail=False))
    return False


def _delete_probe(fs: Any, folder: str, folder_url: str) -> None:
    try:
        fs.rm_file(f"{folder.rstrip('/')}/{PROBE_FILE}")
    except FileNotFoundError:  # another driver that starts at this moment
        return
    except Exception as error:
        if not is_refused(error):
            raise
        logger.warning(
            "out_dir=%s: nothing can be deleted there (%s): old checkpoints stay, whatever keep_checkpoints says, "
            "until you delete them",
            folder_url,
            reason_of(error),
        )


def _missing_folders(folder: str) -> list[Path]:
    """Return what would have to be made, the deepest first."""
    return [path for path in (Path(folder), *Path(folder).parents) if not path.exists()]


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
