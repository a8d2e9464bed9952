"""RunFolder: opened once in a process; it raises our errors, and gets new connections and credentials by itself."""

from __future__ import annotations

import errno
import os
import pickle
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from orchestrator.config import TrainConfig
from orchestrator.driver.journal import open_journal
from orchestrator.driver.lease import Lease
from orchestrator.driver.preflight import plan
from orchestrator.driver.registry import storage_for_ray
from orchestrator.errors import CheckpointError, StorageUnavailableError, UndeletableError
from orchestrator.storage import location
from orchestrator.storage.run_folder import RunFolder
from orchestrator.telemetry.records import AttemptStarting
from orchestrator.worker import plain


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The URLs of which a client was asked for, in this process."""
    urls: list[str] = []
    connect = location._connect

    def noting(url: str, *rest: Any) -> Any:
        urls.append(url)
        return connect(url, *rest)

    monkeypatch.setattr(location, "_connect", noting)
    return urls


@pytest.fixture(params=["disk", "object store"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> RunFolder:
    is_disk = request.param == "disk"
    return RunFolder(str(tmp_path / "run") if is_disk else f"memory://run-folder/{request.node.name}")


def failing(error: BaseException) -> Callable[..., Any]:
    def call(*_args: Any, **_options: Any) -> Any:
        raise error

    return call


def flags(config: TrainConfig) -> list[str]:
    return [f"--{key}={value}" for key, value in asdict(config).items()]


def test_a_run_opens_its_folder_once_and_any_other_url_once(tiny: TrainConfig, opened: list[str]) -> None:
    assert plain.main(flags(replace(tiny, max_iters=4))) == 0
    assert opened == [tiny.out_dir]
    opened.clear()
    assert plain.main(flags(replace(tiny, max_iters=8))) == 0
    assert opened == [tiny.out_dir], "it resumes"
    opened.clear()
    other = f"{tiny.out_dir}-2"
    assert plain.main(flags(replace(tiny, out_dir=other, init_from=tiny.out_dir, max_iters=9))) == 0
    assert opened == [other, tiny.out_dir]


def test_a_driver_opens_it_once(tiny: TrainConfig, opened: list[str]) -> None:
    planned = plan(replace(tiny, out_dir=f"memory://run-folder/{Path(tiny.out_dir).parent.name}"))
    lease = Lease(planned.folder, beat_interval_s=60)
    with lease.held(), open_journal(lease) as journal:
        lease.confirm()
        journal.begin()
        journal.emit(AttemptStarting(number=1, num_workers=1))
        pickle.loads(pickle.dumps(storage_for_ray(planned.folder)))  # to Ray's controller and workers
    assert opened == [planned.config.out_dir]


def test_files_are_written_read_listed_and_deleted(folder: RunFolder) -> None:
    assert folder.list() == []
    assert folder.read("file") is None
    folder.write("file", b"content")
    folder.write_json("a.json", {"a": 1})
    assert (folder.read("file"), folder.read_json("a.json")) == (b"content", {"a": 1})
    assert folder.exists("file")
    assert sorted(folder.list()) == ["a.json", "file"]
    for name in ("file", "file", "a.json"):
        folder.delete(name)
    assert folder.list() == []


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff"])
def test_damaged_json_is_as_none(folder: RunFolder, content: bytes) -> None:
    folder.write("a.json", content)
    assert folder.read_json("a.json") == {}


def test_lines_are_appended_and_a_line_that_was_cut_off_is_ended(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path / "run"))
    folder.append("lines", "one\ntwo\n")
    with Path(folder.path("lines")).open("a") as file:
        file.write("thr")
    folder.append("lines", "four\n")
    assert folder.read("lines") == b"one\ntwo\nthr\nfour\n"


def test_a_fence_holds_off_all_but_the_last(folder: RunFolder) -> None:
    assert not folder.is_fenced("a")
    folder.fence("a")
    folder.fence("b")
    assert (folder.is_fenced("a"), folder.is_fenced("b")) == (True, False)


def test_a_run_keeps_its_id_and_a_copy_of_it_has_another(tmp_path: Path) -> None:
    folder, copy = RunFolder(str(tmp_path / "run")), RunFolder(str(tmp_path / "copy"))
    assert folder.run_id(make=False) == folder.run_id(make=False)
    assert not folder.exists("run.json")
    made = folder.run_id()
    assert made == folder.run_id() == folder.run_id(make=False)
    copy.write_json("run.json", folder.read_json("run.json"))
    assert copy.run_id() != made
    assert copy.run_id().split("_")[0] == made.split("_")[0]


WRITES: list[Callable[[RunFolder], None]] = [
    lambda folder: folder.write("file", b""),
    lambda folder: folder.write_json("file", {}),
    lambda folder: folder.delete("file"),
]


@pytest.mark.parametrize("act", WRITES)
@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OSError("503 Slow Down"), StorageUnavailableError),
        (ConnectionResetError("gone"), StorageUnavailableError),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), CheckpointError),
    ],
)
def test_an_error_says_whether_it_may_pass(
    act: Callable[[RunFolder], None], error: Exception, kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder("memory://run-folder/errors")
    folder.write("file", b"")
    for name in ("pipe_file", "put_file", "rm_file"):
        monkeypatch.setattr(MemoryFileSystem, name, failing(error))
    with pytest.raises(CheckpointError) as caught:
        act(folder)
    assert type(caught.value) is kind
    assert "None" not in str(caught.value)


def test_reading_may_always_succeed_later(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(folder.fs), "cat_file", failing(PermissionError("no")))
    with pytest.raises(StorageUnavailableError, match="file cannot be read: access denied"):
        folder.read("file")


def test_storage_that_lets_us_delete_nothing_is_told_apart(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.write("file", b"")
    monkeypatch.setattr(type(folder.fs), "rm_file", failing(PermissionError("no")))
    with pytest.raises(UndeletableError, match=r"nothing can be deleted there \(access denied"):
        folder.delete("file")


class Ssh:
    """The part of an SFTP client that says whether it is connected."""

    def __init__(self) -> None:
        self.is_active = True

    def get_transport(self) -> Any:
        return type("Transport", (), {"is_active": lambda _transport: self.is_active})()

    def close(self) -> None:
        self.is_active = False


class Server(MemoryFileSystem):  # type: ignore[misc]
    """A file server whose clients keep a connection."""

    cachable = False
    made: list[Any] = []  # noqa: RUF012

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.client = Ssh()
        self.made.append(self)

    def cat_file(self, path: str, **options: Any) -> Any:
        if not self.client.is_active:
            raise OSError("Socket is closed")
        return super().cat_file(path, **options)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    monkeypatch.setattr(location, "_connect", lambda *_: (Server(), "/server/run"))
    Server.made.clear()
    folder = RunFolder("memory://server/run")
    folder.write("file", b"content")
    return folder


def test_a_lost_connection_is_opened_again(server: RunFolder) -> None:
    server.fs.client.close()
    assert server.read("file") == b"content"
    assert len(Server.made) == 2


def test_of_two_threads_that_lose_it_one_opens_it_again(server: RunFolder) -> None:
    lost = server.fs
    lost.client.close()
    assert server._connection.reconnect(OSError("Socket is closed"), lost)
    assert not server._connection.reconnect(OSError("Socket is closed"), lost), "somebody has done so"
    assert len(Server.made) == 2
    assert server.fs.client.is_active


def test_a_refusal_that_stays_is_raised(server: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Server, "cat_file", failing(PermissionError("no")))
    with pytest.raises(StorageUnavailableError, match="access denied"):
        server.read("file")
    assert len(Server.made) == 2, "credentials were read again, once"


def test_its_client_travels_with_it(tmp_path: Path, opened: list[str]) -> None:
    folder = RunFolder(str(tmp_path))
    copy = pickle.loads(pickle.dumps(folder))
    copy.write("file", b"x")
    assert folder.read("file") == b"x"
    assert opened == [str(tmp_path)]
