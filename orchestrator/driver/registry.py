"""What Ray Train keeps in out_dir: its list of checkpoints, which is of use to others and never needed; no more.

An empty file with which Ray tries whether it can write is not written at all: that is found out before Ray is started,
and an evaluation reads where nobody may write.

What a run goes on from is what lies in storage whole. So the list may be missing, old or damaged; but Ray ends a run
whose list cannot be written, and waits for one that hangs. Here such a write is given up, with a warning.
"""

from __future__ import annotations

import io
import logging
import threading
from typing import Any

import fsspec
import pyarrow
from pyarrow.fs import FileInfo, FileType, FSSpecHandler, PyFileSystem

from orchestrator.storage.reasons import is_refused, reason_of

REGISTRY_FILE = "checkpoint_manager_snapshot.json"

_TRIAL_FILE = ".validate_storage_marker"  # Source: Ray 2.60, train/v2/_internal/constants.py
_WRITE_S = 10.0
_writing: list[threading.Thread] = []  # of the controller's process: the latest

logger = logging.getLogger(__name__)


def storage_for_ray(fs: fsspec.AbstractFileSystem) -> PyFileSystem:
    """Return a filesystem for Ray Train, on which the registry is written if that can be done."""
    return PyFileSystem(_Handler(fs))


class _Handler(FSSpecHandler):  # type: ignore[misc]
    def open_output_stream(self, path: str, metadata: dict[str, str] | None) -> pyarrow.NativeFile:
        if path.rpartition("/")[2] == REGISTRY_FILE:
            return pyarrow.PythonFile(_Registry(self, path), mode="w")
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

    def __init__(self, handler: _Handler, path: str) -> None:
        super().__init__()
        self._handler, self._path = handler, path

    def close(self) -> None:
        if not self.closed and not any(thread.is_alive() for thread in _writing):  # one that hangs is not joined
            _writing[:] = [threading.Thread(target=self._write, args=(self.getvalue(),), daemon=True)]
            _writing[0].start()
            _writing[0].join(_WRITE_S)
        super().close()

    def _write(self, content: bytes) -> None:
        try:
            self._put(content)
        except Exception as error:  # whatever it is, the next checkpoint writes the list again
            logger.warning("Ray's list of checkpoints could not be written: %s", reason_of(error))

    def _put(self, content: bytes) -> None:
        try:
            self._handler.fs.pipe_file(self._path, content)
        except Exception as error:
            if not is_refused(error):
                raise
            self._handler.fs = _with_new_credentials(self._handler.fs)
            self._handler.fs.pipe_file(self._path, content)


def _with_new_credentials(fs: Any) -> Any:
    """Return a client like this one that has read its credentials again: somebody may have renewed them."""
    fs.clear_instance_cache()
    again = type(fs)(*fs.storage_args, **fs.storage_options)
    again.retries = getattr(fs, "retries", None)
    return again
