"""Registry: Ray Train's list of checkpoints in out_dir. Others may use it; we never need it.

A run resumes from the checkpoints that lie in storage whole, so the list may be missing, old or damaged. But Ray ends a
run whose list cannot be written, and waits for a write that hangs. Here we give up such a write, with a warning.

Ray also writes an empty file, to see whether it can write. We write none: preflight has found that out before, and an
evaluation reads where nobody may write.
"""

from __future__ import annotations

import io
import logging
import threading

import pyarrow
from pyarrow.fs import FileInfo, FileType, FSSpecHandler, PyFileSystem

from orchestrator.errors import CheckpointError
from orchestrator.storage.reasons import reason_of
from orchestrator.storage.run_folder import RunFolder

REGISTRY_FILE = "checkpoint_manager_snapshot.json"

_TRIAL_FILE = ".validate_storage_marker"  # Source: Ray 2.60, train/v2/_internal/constants.py
_WRITE_S = 10.0
_writing: list[threading.Thread] = []  # of the controller's process: the latest

logger = logging.getLogger(__name__)


def storage_for_ray(folder: RunFolder) -> PyFileSystem:
    """Return a filesystem for Ray Train, on which the registry is written if that can be done."""
    return PyFileSystem(_Handler(folder))


class _Handler(FSSpecHandler):  # type: ignore[misc]
    """Travels, with the folder's client, to Ray's controller and to the workers."""

    def __init__(self, folder: RunFolder) -> None:
        super().__init__(folder.fs)
        self._folder = folder

    def open_output_stream(self, path: str, metadata: dict[str, str] | None) -> pyarrow.NativeFile:
        if path.rpartition("/")[2] == REGISTRY_FILE:
            return pyarrow.PythonFile(_Registry(self._folder, path), mode="w")
        if path.rpartition("/")[2] == _TRIAL_FILE:
            return pyarrow.PythonFile(io.BytesIO(), mode="w")
        return super().open_output_stream(path, metadata)

    def get_file_info(self, paths: list[str]) -> list[FileInfo]:
        return [
            FileInfo(path, FileType.File, size=0)
            if path.rpartition("/")[2] == _TRIAL_FILE
            else super(_Handler, self).get_file_info([path])[0]
            for path in paths
        ]

    def create_dir(self, path: str, recursive: bool) -> None:
        """Make none: a run's folder is there before Ray is started, and an evaluation needs none."""


class _Registry(io.BytesIO):
    """The list as it is being written; it goes to storage as a whole, when it is closed."""

    def __init__(self, folder: RunFolder, path: str) -> None:
        super().__init__()
        self._folder, self._name = folder, path.removeprefix(folder.path(""))

    def close(self) -> None:
        if not self.closed and not any(thread.is_alive() for thread in _writing):  # one that hangs is not joined
            _writing[:] = [threading.Thread(target=self._write, args=(self.getvalue(),), daemon=True)]
            _writing[0].start()
            _writing[0].join(_WRITE_S)
        super().close()

    def _write(self, content: bytes) -> None:
        try:
            self._folder.write(self._name, content)
        except CheckpointError as error:  # the next checkpoint writes the list again
            logger.warning("Ray's list of checkpoints could not be written: %s", reason_of(error.__cause__))
