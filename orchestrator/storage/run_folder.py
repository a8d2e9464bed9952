"""RunFolder: the folder of one run, in any storage that fsspec knows.

    <out_dir>/run.json        the run's id, its driver's start_id and its settings
             /attempt.json    which attempt may commit checkpoints

What else lies there is for others to know: checkpoints (`CheckpointStore`), records (`MetricsLog`), the driver's lease.
"""

from __future__ import annotations

import errno
import json
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import xxhash
from fsspec.exceptions import FSTimeoutError

from orchestrator.errors import CheckpointError, StorageUnavailableError, UndeletableError
from orchestrator.storage import retry
from orchestrator.storage.location import Connection, check_place
from orchestrator.storage.options import StorageSettings, storage_options_of
from orchestrator.storage.reasons import has_expired, is_refused, lacks_bucket, reason_of, translated
from orchestrator.storage.transfer import append_lines, atomic_write_to, delete_folder, is_there, make_folder

RUN_FILE = "run.json"
_ATTEMPT_FILE = "attempt.json"
_FIRST_ANSWER_S = 20.0  # storage that says nothing for so long is taken for unreachable

P = ParamSpec("P")
T = TypeVar("T")


class RunFolder:
    """A run's folder, a path or any fsspec URL. Open it once in a process and pass it on: threads may share it.

    If storage refuses us or the connection is lost, a method reads the credentials again, connects anew and tries once
    more. `with_retries` goes on for minutes. key: the setting that names the folder, for messages.
    root: its path in the client; is_local: it lies on a disk.

    Raises:
        StorageUnavailableError: all methods, for a fault that may pass. A fault in reading always may.
        CheckpointError: all methods, for one that will not pass.
    """

    def __init__(self, out_dir: str, storage_options: dict[str, Any] | None = None, key: str = "out_dir") -> None:
        self.out_dir, self.key = out_dir, key
        try:
            self._connection = Connection(out_dir, storage_options)
            self.root, self.is_local = self._connection.path, self._connection.is_local
            check_place(self.fs, self.root, out_dir)
        except CheckpointError as error:
            raise CheckpointError(f"{key}={error}") from None

    @property
    def fs(self) -> Any:
        """The client at this moment, for whoever streams large files. Its exceptions are its own."""
        return self._connection.fs

    def path(self, *parts: str) -> str:
        return "/".join((self.root.rstrip("/"), *parts))

    def read(self, name: str, timeout_s: float | None = None) -> bytes | None:
        """Return a file's content, None where there is none. timeout_s: of a request, where the client has a limit."""
        path = self.path(name)
        return self._connection.call(f"{path} cannot be read", _cat, path, timeout_s, to=StorageUnavailableError)

    def read_json(self, name: str, timeout_s: float | None = None) -> dict[str, Any]:
        """Return a JSON file's content, {} where it is missing or damaged."""
        try:
            value = json.loads(self.read(name, timeout_s) or b"{}")
        except ValueError:
            return {}
        return value if isinstance(value, dict) else {}

    def write(self, name: str, content: bytes) -> None:
        """Write a file whose loss does no harm, with one request: a crash may leave half of it."""

        def put(fs: Any) -> None:
            make_folder(fs, self.root)
            fs.pipe_file(self.path(name), content)

        self._connection.call(f"{self.path(name)} cannot be written", put)

    def write_whole(self, name: str, text: str, *, is_lasting: bool = True) -> None:
        """Write a file whole or not at all; is_lasting: see `transfer.atomic_write_to`."""
        url = f"{self.out_dir.rstrip('/')}/{name}"

        def replace(fs: Any) -> None:
            with atomic_write_to(fs, self.path(name), url, is_lasting=is_lasting) as file:
                file.write_text(text)

        self._connection.call(f"{url}: cannot be written", replace)

    def write_json(self, name: str, value: dict[str, Any], *, is_lasting: bool = True) -> None:
        """Write a JSON file as `write_whole` does."""
        self.write_whole(name, json.dumps(value, indent=1, allow_nan=False), is_lasting=is_lasting)

    def append(self, name: str, lines: str) -> None:
        """Append whole lines to a file on a disk: object stores cannot append."""
        with translated(f"{self.path(name)} cannot be written"):
            append_lines(Path(self.path(name)), lines)

    def exists(self, name: str) -> bool:
        """Return whether there is such a file or folder."""
        what = f"{self.out_dir.rstrip('/')}/{name} cannot be looked for"
        return self._connection.call(what, is_there, self.path(name), to=StorageUnavailableError)

    def list(self) -> list[str]:
        """Return the names of the files and folders in this one, none where it does not exist.

        Raises:
            CheckpointError: there is no such bucket.
        """
        what, advice = f"{self.key}={self.out_dir} cannot be read", "check the address, the network and the credentials"
        try:
            return self._connection.call(what, _list, self.root, to=StorageUnavailableError, advice=advice)
        except StorageUnavailableError as error:
            if lacks_bucket(error):
                reason = reason_of(error.__cause__)
                raise CheckpointError(f"out_dir={self.out_dir}: {reason}; make it, or check its name") from error
            if isinstance(error.__cause__, FSTimeoutError):
                raise StorageUnavailableError(f"{what}: no answer in {_FIRST_ANSWER_S:g} s; {advice}") from error
            raise

    def delete(self, name: str) -> None:
        """Delete a file, if it is there.

        Raises:
            UndeletableError: storage lets us delete nothing.
        """

        def delete(fs: Any) -> None:
            fs.invalidate_cache()  # a listing from before would hide the file
            if is_there(fs, self.path(name)):
                fs.rm_file(self.path(name))

        with _telling_undeletable():
            self._connection.call(f"{self.path(name)} cannot be deleted", delete)

    def delete_folder(self, name: str) -> None:
        """Delete a folder with all that is in it, as `delete` does."""
        with _telling_undeletable():
            self._connection.call(f"{self.path(name)} cannot be deleted", delete_folder, self.path(name))

    def fence(self, attempt: str) -> None:
        """Make this attempt the one that may commit checkpoints."""
        self.write_json(_ATTEMPT_FILE, {"attempt": attempt}, is_lasting=False)  # after a power cut nobody is late

    def is_fenced(self, attempt: str) -> bool:
        """Return whether a later attempt writes here: the others have given this one up."""
        return bool(self.read_json(_ATTEMPT_FILE).get("attempt", attempt) != attempt)

    def run_id(self, *, make: bool = True) -> str:
        """Return the lasting id by which nodes know this run's states in their memory. make: one, if it has none."""
        known = self.read_json(RUN_FILE)
        if make and "run_id" not in known:
            known["run_id"] = uuid.uuid4().hex
            self.write_json(RUN_FILE, known)
        # a copy of the folder is another run, though its run.json is equal
        return f"{known.get('run_id', '')}_{xxhash.xxh3_64(self.root.rstrip('/').encode()).hexdigest()}"

    def with_retries(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Return call(*args, **kwargs), retrying for minutes: see `retry.with_retries`."""
        return retry.with_retries(partial(call, *args, **kwargs), self._connection)

    def read_with_retries(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Return call(*args, **kwargs), retrying while storage does not answer: an older state would cost more.

        Raises:
            StorageUnavailableError: it has not answered for retry.READ_AGAIN_FOR_S.
        """
        return retry.with_retries(
            partial(call, *args, **kwargs),
            self._connection,
            may_pass=lambda error: isinstance(error, StorageUnavailableError),
            for_s=retry.READ_AGAIN_FOR_S,
        )


def open_run_folder(config: StorageSettings) -> RunFolder:
    """Open the folder that a command's settings name; raises as RunFolder does."""
    return RunFolder(config.out_dir, storage_options_of(config))


def _cat(fs: Any, path: str, timeout_s: float | None) -> bytes | None:
    limit = {"timeout": timeout_s} if timeout_s and fs.async_impl else {}
    try:
        return bytes(fs.cat_file(path, **limit))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        if error.errno != errno.ESTALE:  # NFS: another process replaced it while we opened it
            raise
        return bytes(fs.cat_file(path, **limit))


def _list(fs: Any, root: str) -> list[str]:
    fs.invalidate_cache()
    limit = {"timeout": _FIRST_ANSWER_S} if fs.async_impl else {}
    try:
        return [entry.rstrip("/").rsplit("/", 1)[-1] for entry in fs.ls(root, detail=False, **limit)]
    except (FileNotFoundError, NotADirectoryError) as error:
        if lacks_bucket(error):
            raise
        return []


@contextmanager
def _telling_undeletable() -> Iterator[None]:
    try:
        yield
    except CheckpointError as error:
        if is_refused(error) and not has_expired(error):
            raise UndeletableError(f"nothing can be deleted there ({reason_of(error.__cause__)})") from error
        raise
