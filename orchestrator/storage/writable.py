"""Whether a run can write into its folder: tried before anything is started. Leaves the folder as it was."""

from __future__ import annotations

import errno
import logging
import os
import re
from contextlib import suppress
from pathlib import Path

from orchestrator.errors import CheckpointError
from orchestrator.storage.reasons import is_refused, reason_of, translated
from orchestrator.storage.run_folder import RunFolder
from orchestrator.storage.transfer import make_folder, removing_new_folders

logger = logging.getLogger(__name__)

PROBE_FILE = ".writable"  # one name for all: where nothing can be deleted, it stays
_PLAIN = re.compile(r"[\w./=,+@%~ -]*", re.ASCII)
_PROBES = 3  # another driver that starts at the same moment deletes ours


def check_writable(folder: RunFolder) -> None:
    """Write an empty file into a run's folder and delete it again, with the folders that were made for it.

    Warns where nothing can be deleted: a run can do without.

    Raises:
        CheckpointError: it cannot be written.
    """
    what = f"out_dir={folder.out_dir} cannot be written"
    with (
        translated(what, CheckpointError, "check the path, permissions and free space"),
        removing_new_folders(folder.fs, folder.root),
    ):
        _write_probe(folder)
        _delete_probe(folder)


def _write_probe(folder: RunFolder) -> None:
    if folder.is_local and os.path.lexists(folder.root) and not Path(folder.root).is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), folder.root)
    make_folder(folder.fs, folder.root)
    for _ in range(_PROBES):
        folder.fs.pipe_file(folder.path(PROBE_FILE), b"")
        if _PLAIN.fullmatch(folder.root) or _is_listed(folder):
            return
    raise OSError("what is written there is not found there again, so the server knows it by another path")


def _is_listed(folder: RunFolder) -> bool:
    """Return whether the probe is found by whoever lists the folder: some servers change odd letters of a path."""
    folder.fs.invalidate_cache()
    with suppress(FileNotFoundError):
        return any(path.rsplit("/", 1)[-1] == PROBE_FILE for path in folder.fs.ls(folder.root, detail=False))
    return False


def _delete_probe(folder: RunFolder) -> None:
    try:
        with translated("the probe cannot be deleted"), suppress(FileNotFoundError):  # another driver has deleted it
            folder.fs.rm_file(folder.path(PROBE_FILE))
    except CheckpointError as error:
        if not is_refused(error):
            raise error.__cause__ or error from None
        logger.warning(
            "out_dir=%s: nothing can be deleted there (%s): old checkpoints stay, whatever keep_checkpoints says, "
            "until you delete them",
            folder.out_dir,
            reason_of(error.__cause__),
        )
