"""Storage that fails in every way it can while a run saves to it: training goes on, and nothing half is announced.

Real servers fail for real: they are killed, their disk is full, and a proxy before them answers errors, breaks
connections or says nothing. Each test shows that its fault fired, and that the run ends with the bits of a calm one.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.local import LocalFileSystem
from s3fs import S3FileSystem

from orchestrator.checkpoint.orphans import delete_orphans
from orchestrator.checkpoint.save import upload as durable
from orchestrator.checkpoint.save.node_memory import SnapshotBuffer
from orchestrator.checkpoint.snapshot import Snapshot, tensors_equal
from orchestrator.checkpoint.store import CheckpointStore
from orchestrator.checkpoint.tensor_file import write_file
from orchestrator.config import TrainConfig
from orchestrator.distributed.device import resolve
from orchestrator.distributed.world import World
from orchestrator.errors import StorageError
from orchestrator.loop import train
from orchestrator.storage import retry, transfer
from orchestrator.storage.options import storage_options_of
from orchestrator.storage.transfer import locate
from orchestrator.telemetry.emit import open_telemetry
from orchestrator.telemetry.format import print_record
from orchestrator.telemetry.metrics import read_metrics
from tests.conftest import Storage, Undisturbed, forget_clients, in_steps
from tests.support import faults, ranks
from tests.support.proxy import Fault, FaultyProxy
from tests.support.servers import S3Server, SFTPServer
from tests.support.tmpfs import small_tmpfs

Record = dict[str, Any]
Calm = Callable[[TrainConfig], Snapshot]
_PATIENCE_S = 60.0


def puts(name: str) -> Callable[[str, str], bool]:
    """Return what matches the writing of files with this in their path."""
    return lambda method, path: method == "PUT" and name in path


def gets(name: str) -> Callable[[str, str], bool]:
    """Return what matches the reading of files with this in their path."""
    return lambda method, path: method == "GET" and name in path


def wait_for(is_true: Callable[[], Any], pause_s: float = 0.002) -> None:
    deadline_s = time.monotonic() + _PATIENCE_S
    while not is_true():
        assert time.monotonic() < deadline_s
        time.sleep(pause_s)


@dataclass
class Run:
    """A run in this process, with telemetry as `python -m orchestrator.loop` has it.

    each: called in every iteration, before its step.
    mark: what it returns is noted with every record, such as how often a fault has fired by then.
    """

    config: TrainConfig
    attempt: str = "a"
    each: Callable[[], None] = lambda: None
    mark: Callable[[], int] = lambda: 0
    stop_after: int | None = None
    records: list[Record] = field(default_factory=list)

    def train(self) -> Run:
        world = World(attempt=self.attempt)
        iterations = iter(range(10**6))

        def should_stop() -> bool:
            self.each()
            return self.stop_after is not None and next(iterations) >= self.stop_after

        with open_telemetry(self.config, world, print_record) as tell:

            def note(record: Record) -> None:
                self.records.append({**record, "mark": self.mark()})
                tell(record)

            train(resolve(self.config), world, note, should_stop=in_steps(should_stop))
        return self

    def of(self, kind: str) -> list[int]:
        """Return the iterations of all records of a kind."""
        return [record["iter"] for record in self.records if record["kind"] == kind]

    def why(self, iter_num: int) -> str:
        """Return why the checkpoint of an iteration has failed."""
        (why,) = (r["why"] for r in self.records if r["kind"] == "checkpoint_failed" and r["iter"] == iter_num)
        return str(why)

    def steps_meanwhile(self, ended: str) -> int:
        """Return how many steps were done from the first mark on until an upload ended: checkpoint[_failed]."""
        begin = next(i for i, record in enumerate(self.records) if record["mark"])
        end = next(i for i, record in enumerate(self.records) if i >= begin and record["kind"] == ended)
        return sum(record["kind"] == "step" for record in self.records[begin:end])

    def has(self, kind: str) -> bool:
        """Return whether there is a record of a kind."""
        return bool(self.of(kind))

    def slowly(self, is_over: Callable[[], Any], act: Callable[[], None] = lambda: None, pause_s: float = 0.1) -> Run:
        """Act in every iteration, and let it take its time until it is over: milliseconds do not outlast a fault."""

        def each() -> None:
            act()
            if not is_over():
                time.sleep(pause_s)

        self.each = each
        return self


def store_of(config: TrainConfig) -> CheckpointStore:
    return CheckpointStore(config.out_dir, storage_options_of(config))


def check_whole(config: TrainConfig, final: Snapshot) -> None:
    """Read every byte of every checkpoint that is announced, and compare the newest one's bits."""
    store = store_of(config)
    found = list(store.newest_first())
    assert found[0].iter_num == config.max_iters
    assert store.damaged == {}
    states = [store.read(checkpoint) for checkpoint in found]
    assert tensors_equal(states[0], final)


def newest_whole(config: TrainConfig) -> int:
    """Return the iteration of the newest checkpoint that is announced, having read every byte of it."""
    store = store_of(config)
    newest = next(store.newest_first())
    store.read(newest)
    assert store.damaged == {}
    return newest.iter_num


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Calm:
    """The final state of a run that nothing happens to, on a disk."""
    known: dict[tuple[int, int], Snapshot] = {}

    def final(config: TrainConfig) -> Snapshot:
        key = (config.n_embd, config.max_iters)
        if key not in known:
            local = replace(config, out_dir=str(tmp_path_factory.mktemp("calm") / "run"), storage_options="")
            Run(local).train()
            store = store_of(local)
            known[key] = store.read(store.select("latest"))
        return known[key]

    return final


@pytest.fixture
def config(tiny: TrainConfig) -> TrainConfig:
    """A checkpoint every 8 of 40 iterations, each of which is told of."""
    return replace(tiny, max_iters=40, checkpoint_interval=8, log_interval=1)


@pytest.fixture
def large(config: TrainConfig) -> TrainConfig:
    """So large that s3fs sends it in parts: 4 MB of weights and 8 MB of moments; 5 MB is S3's smallest part."""
    return replace(config, n_embd=144, n_layer=4, max_iters=16)


@pytest.fixture
def on_s3(config: TrainConfig, faulty_s3: Storage, monkeypatch: pytest.MonkeyPatch) -> TrainConfig:
    """A run on S3 behind the proxy. The client does not try again by itself, so that it is our patience that counts."""
    limits = {"connect_timeout": 2.0, "read_timeout": 0.5, "retries": {"total_max_attempts": 1}}
    monkeypatch.setattr(transfer, "_S3_LIMITS", limits)
    monkeypatch.setattr(transfer, "_S3_ROUNDS", 1)
    forget_clients()
    return replace(config, out_dir=f"{faulty_s3.url}/run")


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Try again soon: a server of the tests' own is back in a second."""
    monkeypatch.setattr(retry, "_LONGEST_PAUSE_S", 1.0)


@pytest.fixture(autouse=True)
def no_secret(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str], tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[None]:
    """Look for the credentials in what each test has logged, printed and stored."""
    with caplog.at_level(logging.DEBUG, "orchestrator"):
        yield
    said = "".join(caplog.handler.format(r) for r in caplog.get_records("call") if r.name.startswith("orchestrator"))
    stored = {str(path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    if "s3_server" in request.fixturenames:
        server: S3Server = request.getfixturevalue("s3_server")
        options = {"key": server.key, "secret": server.secret, "endpoint_url": server.endpoint}
        fs, folder = locate(f"{server.url}/{tmp_path.name}", options)
        fs.invalidate_cache()
        stored |= {path: fs.cat_file(path) for path in fs.find(folder)}
    secrets = [S3Server.secret]
    if "sftp_server" in request.fixturenames:
        sftp: SFTPServer = request.getfixturevalue("sftp_server")
        secrets.append(sftp.key_file.read_text(encoding="utf-8").splitlines()[1])
    for secret in secrets:
        assert secret not in said + "".join(capfd.readouterr())
        assert [path for path, content in stored.items() if secret.encode() in content] == []


def fault_of(kind: str, proxy: FaultyProxy, matches: Callable[[str, str], bool], times: int) -> Fault:
    match kind:
        case "500":
            return proxy.answer(500, "InternalError", matches, times)
        case "503":
            return proxy.answer(503, "SlowDown", matches, times)
        case "reset":
            return proxy.reset(matches, times, after_bytes=70_000)
    return proxy.hang(matches, times)


def kinds(*fast: str) -> Any:
    """Let a test run with each kind of fault, by default with these."""
    reasons = {
        "500": "the server has failed",
        "503": "the server is busy",
        "reset": "EndpointConnectionError",
        "hang": "ReadTimeoutError",
    }
    slow = {kind: () if kind in fast else pytest.mark.slow for kind in reasons}
    return pytest.mark.parametrize(
        ("kind", "reason"), [pytest.param(kind, reason, marks=slow[kind]) for kind, reason in reasons.items()]
    )


def slow(*values: object) -> Any:
    """One more case of the same, which is not among those that run by default."""
    return pytest.param(*values, marks=pytest.mark.slow)


@kinds("503", "reset")
def test_a_fault_that_passes_is_outlasted(
    kind: str, reason: str, on_s3: TrainConfig, proxy: FaultyProxy, calm: Calm, caplog: pytest.LogCaptureFixture
) -> None:
    times = 4 if kind == "reset" else 2  # aiohttp sends once more where a connection that was used before breaks
    fault = fault_of(kind, proxy, puts("model-"), times)
    run = Run(on_s3, mark=lambda: fault.fired).train()
    assert fault.fired == times
    assert [text for text in caplog.messages if "trying again (2)" in text and reason in text]
    assert run.of("checkpoint_failed") == []
    assert run.steps_meanwhile("checkpoint") >= 1
    check_whole(on_s3, calm(on_s3))


@kinds("500")
def test_a_fault_that_lasts_costs_a_checkpoint(
    kind: str, reason: str, on_s3: TrainConfig, proxy: FaultyProxy, calm: Calm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "RETRY_FOR_S", 0.2)
    run = Run(on_s3)
    fault = fault_of(kind, proxy, lambda *asked: run.has("checkpoint") and puts("optimizer-")(*asked), times=10**6)
    run.mark = lambda: fault.fired
    healed: list[int] = []

    def heal() -> None:
        if run.has("checkpoint_failed") and not healed:
            healed.append(newest_whole(on_s3))
            proxy.heal()

    run.slowly(lambda: healed, heal).train()
    assert fault.fired >= 2
    (failed,) = run.of("checkpoint_failed")
    assert reason in run.why(failed)
    assert healed == run.of("checkpoint")[:1]
    assert run.steps_meanwhile("checkpoint_failed") >= 1
    assert run.of("step") == list(range(40))
    check_whole(on_s3, calm(on_s3))


def test_the_last_state_waits_in_node_memory_where_storage_is_gone(
    on_s3: TrainConfig, proxy: FaultyProxy, calm: Calm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "RETRY_FOR_S", 0.2)
    fault = fault_of("500", proxy, puts("checkpoint_00000040_"), times=10**6)
    run = Run(on_s3, mark=lambda: fault.fired)
    with pytest.raises(StorageError, match=r"could not be saved: rank 0: the server has failed .* as the test asked"):
        run.train()
    assert fault.fired >= 2
    assert newest_whole(on_s3) < 40
    proxy.heal()
    again = Run(on_s3, "b").train()
    assert again.records[0]["from"] == "checkpoint_00000040_a"
    assert again.records[0]["from_storage_bytes"] == 0
    assert again.of("checkpoint") == [40]
    check_whole(on_s3, calm(on_s3))


def test_slow_storage_gets_the_newest_states_and_steps_do_not_wait(
    config: TrainConfig, faulty_s3: Storage, proxy: FaultyProxy, calm: Calm
) -> None:
    config = replace(config, out_dir=f"{faulty_s3.url}/run", checkpoint_interval=4)
    proxy.bytes_per_s = 250e3
    run = Run(config, mark=lambda: sum(puts("/model-")(*asked) for asked in proxy.traffic.seen)).train()
    saved, skipped = run.of("checkpoint"), run.of("checkpoint_skipped")
    assert skipped
    assert {*range(4, 41, 4)} <= {*saved, *skipped}, "none is lost without a word"
    assert not {*saved} & {*skipped}
    assert saved[-1] == 40
    assert run.steps_meanwhile("checkpoint") >= 8, "two more came due while the first was on its way"
    whys = {record["why"] for record in run.records if record["kind"] == "checkpoint_skipped"}
    assert whys == {"the one before was still being saved"}
    check_whole(config, calm(config))


@pytest.mark.parametrize("in_parts", [slow(False), True], ids=["one put", "multipart"])
def test_s3_is_killed_in_mid_upload_and_comes_back(
    in_parts: bool, large: TrainConfig, faulty_s3: Storage, proxy: FaultyProxy, s3_server: S3Server, calm: Calm
) -> None:
    options = {"default_block_size": 5 * 2**20} if in_parts else {}
    config = replace(large, out_dir=f"{faulty_s3.url}/run", storage_options=json.dumps(options))
    wanted = "optimizer-"
    is_back = threading.Event()
    killed_at: list[int] = []

    def has_begun() -> bool:
        """Is a body on its way?"""
        paths = [path for method, path in proxy.traffic.seen if method == "PUT" and wanted in path]
        return bool([path for path in paths if not in_parts or "partNumber=" in path])

    def kill() -> None:
        wait_for(has_begun)
        before = proxy.traffic.bytes_up
        wait_for(lambda: proxy.traffic.bytes_up > before + 200_000)
        killed_at.append(proxy.traffic.bytes_up - before)
        s3_server.kill()
        time.sleep(1.0)
        proxy.bytes_per_s = None
        s3_server.start()
        is_back.set()

    proxy.bytes_per_s = 8e6
    killer = threading.Thread(target=kill)
    killer.start()
    run = Run(config, mark=lambda: len(killed_at))
    run.slowly(is_back.is_set, pause_s=0.25).train()
    killer.join()
    assert killed_at[0] < 6e6, "in the middle of it"
    assert run.steps_meanwhile("checkpoint") >= 1
    check_whole(config, calm(config))


def test_sftp_is_killed_in_mid_upload_and_comes_back(
    large: TrainConfig, sftp: Storage, sftp_server: SFTPServer, calm: Calm, caplog: pytest.LogCaptureFixture
) -> None:
    config = replace(large, out_dir=f"{sftp.url}/run", storage_options=json.dumps(sftp.options))
    folder = Path(sftp.url.partition(f":{sftp_server.port}")[2], "run")
    is_back = threading.Event()
    killed_at: list[int] = []

    def sizes() -> list[int]:
        return [path.stat().st_size for path in folder.glob("checkpoint_*/optimizer-*")]

    def kill() -> None:
        wait_for(lambda: max(sizes(), default=0) > 100_000, pause_s=0.0005)
        sftp_server.kill()
        killed_at.extend(sizes())
        time.sleep(1.0)
        sftp_server.start()
        is_back.set()

    killer = threading.Thread(target=kill)
    killer.start()
    run = Run(config, mark=lambda: len(killed_at)).slowly(is_back.is_set, pause_s=0.25).train()
    killer.join()
    assert killed_at[0] < 6e6, "in the middle of it"
    assert [text for text in caplog.messages if "trying again" in text]
    assert run.of("checkpoint_failed") == []
    assert run.steps_meanwhile("checkpoint") >= 1
    check_whole(config, calm(config))


@pytest.mark.parametrize("kind", ["disk", "sftp"])
def test_a_full_disk_costs_a_checkpoint_and_no_room(
    kind: str, config: TrainConfig, tmp_path: Path, calm: Calm, request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    with ExitStack() as mounts:
        if kind == "sftp":
            sftp, server = request.getfixturevalue("sftp"), request.getfixturevalue("sftp_server")
            folder = mounts.enter_context(small_tmpfs(server.files / tmp_path.name, "4m"))
            config = replace(config, out_dir=f"{sftp.url}/run", storage_options=json.dumps(sftp.options))
            monkeypatch.setattr(retry, "RETRY_FOR_S", 0.2)  # the protocol has no word for it: it is tried again
        else:
            folder = mounts.enter_context(small_tmpfs(tmp_path / "disk", "4m"))
            config = replace(config, out_dir=f"{folder}/run")
        ballast = Path(folder, "ballast")
        run = Run(config, mark=ballast.exists)
        left: list[int] = []

        def fill_and_free() -> None:
            if run.has("checkpoint") and not left and not ballast.exists():
                fill(ballast, but_bytes=150_000)
            elif run.has("checkpoint_failed") and ballast.exists():
                assert newest_whole(config) == run.of("checkpoint")[0]
                left.append(len(list(Path(folder, "run").glob("checkpoint_*"))))
                ballast.unlink()

        run.slowly(lambda: left, fill_and_free).train()
        (failed,) = run.of("checkpoint_failed")
        assert run.steps_meanwhile("checkpoint_failed") >= 1
        if kind == "disk":
            assert f"[Errno {errno.ENOSPC}]" in run.why(failed)
            assert not [text for text in caplog.messages if "trying again (" in text]
            assert left == [1], "what had been written of it was taken back"
            assert {r["iter"] for r in read_metrics(config.out_dir) if r["kind"] == "step"} == set(range(40))
        check_whole(config, calm(config))
        assert len(list(Path(folder, "run").glob("checkpoint_*"))) <= config.keep_checkpoints + 1


def fill(path: Path, but_bytes: int) -> None:
    """Write a file that leaves so much room on its disk."""
    stat = os.statvfs(path.parent)
    path.write_bytes(bytes(max(0, stat.f_bavail * stat.f_frsize - but_bytes)))


def test_unfinished_uploads_of_this_run_are_taken_back_and_no_others(
    large: TrainConfig, s3: Storage, s3_server: S3Server, tmp_path: Path, calm: Calm
) -> None:
    options: Record = {"key": s3_server.key, "secret": s3_server.secret, "endpoint_url": s3_server.endpoint}
    options["default_block_size"] = 5 * 2**20
    config = replace(large, out_dir=f"{s3.url}/run", storage_options=json.dumps(options))
    fault = faults.Fault("during", 8, 0, tmp_path / "fired", nth=2)  # the first file is sent in one piece
    killed = ranks.train(config, 1, tmp_path / "killed.log", [fault])
    assert fault.marker.exists(), killed.said
    store = store_of(config)
    bucket = store.root.partition("/")[0]
    folders = {
        f"{tmp_path.name}/run": True,
        f"{tmp_path.name}/run-2": False,
        f"{tmp_path.name}": False,
    }
    keys = {f"{folder}/checkpoint_00000008_x/model": is_ours for folder, is_ours in folders.items()}
    for key in keys:
        store.fs.call_s3("create_multipart_upload", Bucket=bucket, Key=key)

    def unfinished() -> set[str]:
        found = store.fs.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=tmp_path.name).get("Uploads", [])
        return {upload["Key"] for upload in found}

    ours = {key for key in unfinished() if key.startswith(f"{tmp_path.name}/run/")}
    assert [key for key in ours if "optimizer-" in key], "what the kill has left"
    assert ours | keys.keys() == unfinished()
    again = Run(config, "b").train()
    assert again.records[0]["from_storage_bytes"] == 0, "from node memory"
    assert unfinished() == {key for key, is_ours in keys.items() if not is_ours}
    check_whole(config, calm(config))


def test_unfinished_uploads_are_taken_back_however_many_an_answer_lists(
    s3: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CheckpointStore(f"{s3.url}/run")
    bucket, _, folder = store.root.partition("/")
    for number in range(5):
        key = f"{folder}/checkpoint_00000008_x/model-{number // 2}"  # two of one key
        store.fs.call_s3("create_multipart_upload", Bucket=bucket, Key=key)
    call, pages = store.fs.call_s3, []

    def two_at_a_time(method: str, **arguments: Any) -> Any:
        if method != "list_multipart_uploads":
            return call(method, **arguments)
        pages.append(call(method, **arguments, MaxUploads=2))
        return pages[-1]

    monkeypatch.setattr(store.fs, "call_s3", two_at_a_time)
    delete_orphans(store)
    assert [len(page["Uploads"]) for page in pages] == [2, 2, 1]
    monkeypatch.undo()
    assert not store.fs.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=folder).get("Uploads")


def test_leftovers_that_cannot_be_listed_hold_up_nobody(on_s3: TrainConfig, proxy: FaultyProxy) -> None:
    refused = proxy.answer(501, "NotImplemented", lambda method, path: method == "GET" and "uploads" in path, 9)
    delete_orphans(store_of(on_s3))
    assert refused.fired


def test_an_upload_whose_end_was_lost_is_sent_again(
    large: TrainConfig, faulty_s3: Storage, proxy: FaultyProxy, calm: Calm
) -> None:
    """The server has forgotten an upload in parts: somebody took it back, or the answer to its completion was lost."""
    options = {"default_block_size": 5 * 2**20}
    config = replace(large, out_dir=f"{faulty_s3.url}/run", storage_options=json.dumps(options))
    is_end = lambda method, path: method == "POST" and "optimizer-" in path and "uploadId" in path
    forgotten = proxy.answer(404, "NoSuchUpload", is_end)
    run = Run(config, mark=lambda: forgotten.fired).train()
    assert forgotten.fired == 1
    assert run.of("checkpoint_failed") == []
    check_whole(config, calm(config))


def test_all_have_one_client_with_limits_unless_the_user_gives_others(s3: Storage) -> None:
    fs, _ = locate(f"{s3.url}/run")
    assert locate(f"{s3.url}/run/file")[0] is fs
    assert CheckpointStore(f"{s3.url}/run").fs is fs
    limits = fs.config_kwargs
    assert (limits["read_timeout"], limits["retries"]["total_max_attempts"], fs.retries) == (15, 3, 2)
    others, _ = locate(s3.url, {"config_kwargs": {"read_timeout": 99}})
    assert others.config_kwargs == {"read_timeout": 99}
    assert others.retries == type(fs).retries


class Liar(LocalFileSystem):  # type: ignore[misc]
    """A disk that keeps half of each file and reports success. No real server can be made to lie like this."""

    cachable = False
    lies = 0

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        file = super()._open(path, mode, **kwargs)
        if mode == "wb":
            Liar.lies += 1
            write = file.f.write
            file.write = lambda piece: write(piece[: len(piece) // 2])
        return file


def test_half_a_file_is_never_announced(config: TrainConfig, calm: Calm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "RETRY_FOR_S", 0.2)
    honest, run = write_file, Run(config)

    def lie_once(fs: Any, *rest: Any) -> Any:
        is_honest = not run.has("checkpoint") or run.has("checkpoint_failed")
        return honest(fs if is_honest else Liar(), *rest)

    monkeypatch.setattr(durable, "write_file", lie_once)
    run.slowly(lambda: run.has("checkpoint_failed")).train()
    assert Liar.lies >= 2, "it was tried again"
    (failed,) = run.of("checkpoint_failed")
    assert "but the storage holds" in run.why(failed)
    check_whole(config, calm(config))


def test_a_state_that_changes_in_node_memory_is_not_announced(
    on_s3: TrainConfig, calm: Calm, monkeypatch: pytest.MonkeyPatch
) -> None:
    seal, run = SnapshotBuffer.publish, Run(on_s3)
    flipped: list[str] = []

    def seal_and_flip(slot: SnapshotBuffer, name: str, *rest: Any) -> None:
        seal(slot, name, *rest)
        if run.has("checkpoint") and not run.has("checkpoint_failed"):
            (path,) = Path(on_s3.memory_dir).rglob(f"{name}.*/optimizer-*")
            flip_bit(path)
            flipped.append(name)

    monkeypatch.setattr(SnapshotBuffer, "publish", seal_and_flip)
    run.slowly(lambda: run.has("checkpoint_failed")).train()
    (failed,) = run.of("checkpoint_failed")
    assert f"checkpoint_{failed:08d}_a" in flipped
    assert "DamagedSourceError: optimizer-00000-of-00001.safetensors changed in node memory" in run.why(failed)
    check_whole(on_s3, calm(on_s3))


def flip_bit(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-100, os.SEEK_END)
        (byte,) = file.read(1)
        file.seek(-100, os.SEEK_END)
        file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("kind", [slow("500"), slow("503"), "reset"])
def test_a_restore_outlasts_what_its_client_does(
    kind: str, config: TrainConfig, faulty_s3: Storage, proxy: FaultyProxy, calm: Calm
) -> None:
    """With the client's own settings: it tries again by itself."""
    config = replace(config, out_dir=f"{faulty_s3.url}/run")
    Run(config, stop_after=19).train()
    fired = [fault_of(kind, proxy, gets(file), times=1) for file in ("model-", "optimizer-", "state.json")]
    for fault in fired:
        fault.after_bytes = 100
    again = Run(config, "b").train()
    assert [fault.fired for fault in fired] == [1, 1, 1]
    assert again.records[0]["from"] == "checkpoint_00000020_a"
    check_whole(config, calm(config))


@pytest.mark.parametrize(
    ("file", "kind"),
    [slow("model-", "500"), slow("model-", "reset"), slow("state.json", "503"), ("state.json", "reset")],
)
def test_a_restore_tries_again_before_it_takes_an_older_state(
    file: str, kind: str, on_s3: TrainConfig, proxy: FaultyProxy, calm: Calm
) -> None:
    Run(on_s3, stop_after=19).train()
    fault = fault_of(kind, proxy, gets(f"checkpoint_00000020_a/{file}"), times=2)
    fault.after_bytes = 100
    again = Run(on_s3, "b").train()
    assert fault.fired == 2
    assert again.records[0]["from"] == "checkpoint_00000020_a"
    check_whole(on_s3, calm(on_s3))


@pytest.mark.parametrize("kind", [slow("500"), "reset", slow("hang")])
def test_a_file_that_cannot_be_read_is_named_and_an_older_state_used(
    kind: str,
    on_s3: TrainConfig,
    proxy: FaultyProxy,
    calm: Calm,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(retry, "READ_AGAIN_FOR_S", 0.2)
    Run(on_s3, stop_after=19).train()
    before = [checkpoint.iter_num for checkpoint in store_of(on_s3).newest_first()]
    fault = fault_of(kind, proxy, gets("checkpoint_00000020_a/model-"), times=10**6)
    fault.after_bytes = 100
    again = Run(on_s3, "b", each=proxy.heal).train()
    assert fault.fired
    assert again.records[0]["iter"] == before[1]
    told = [text for text in caplog.messages if "checkpoint_00000020_a is not whole, falling back" in text]
    assert "model-00000-of-00001.safetensors" in told[0]
    check_whole(on_s3, calm(on_s3))


def set_patience(_rank: int) -> None:
    retry.RETRY_FOR_S = 0.2
    S3FileSystem.retries = 1


def test_a_fault_of_one_rank_is_told_by_all_and_the_next_checkpoint_is_whole(
    tiny: TrainConfig, faulty_s3: Storage, proxy: FaultyProxy, s3_server: S3Server, undisturbed: Undisturbed,
    tmp_path: Path,
) -> None:  # fmt: skip
    """The second of three ranks cannot write its share of the first checkpoint."""
    limits = {"retries": {"total_max_attempts": 1}}
    options = {
        "key": s3_server.key,
        "secret": s3_server.secret,
        "endpoint_url": proxy.endpoint,
        "config_kwargs": limits,
    }
    config = replace(tiny, out_dir=f"{faulty_s3.url}/run", storage_options=json.dumps(options))
    is_its = lambda method, path: bool(re.search(r"checkpoint_0000000[4-7]_.*00001-of-00003", path)) and method == "PUT"
    fault = proxy.answer(500, "InternalError", is_its, 10**6)
    ended = ranks.train(config, 3, tmp_path / "ranks.log", prepare=set_patience)
    assert ended.is_done, ended.said
    assert fault.fired >= 2
    failed = [r for r in read_metrics(config.out_dir, options) if r["kind"] == "checkpoint_failed"]
    assert failed
    assert max(record["iter"] for record in failed) < 8
    assert failed[0]["why"].startswith("rank 1: the server has failed (InternalError to PutObject")
    check_whole(config, undisturbed(tiny, 3))


ENDS = """
import sys
from orchestrator.storage import retry, transfer
retry.RETRY_FOR_S = 0.2
transfer._S3_LIMITS = {"read_timeout": 0.5, "retries": {"total_max_attempts": 1}}
from orchestrator.worker.plain import main
sys.exit(main())
"""


@pytest.mark.parametrize("kind", ["500", slow("hang")])
def test_the_process_ends_after_failed_uploads(
    kind: str, config: TrainConfig, faulty_s3: Storage, proxy: FaultyProxy
) -> None:
    fault = fault_of(kind, proxy, puts("/checkpoint_"), times=10**6)
    config = replace(config, out_dir=f"{faulty_s3.url}/run", max_iters=16)
    flags = [f"--{key}={value}" for key, value in vars(config).items()]
    done = subprocess.run([sys.executable, "-c", ENDS, *flags], timeout=60, capture_output=True, check=False)
    said = (done.stdout + done.stderr).decode()
    assert fault.fired
    assert done.returncode == 1, said
    assert "error: out_dir=" in said
    assert "the last state could not be saved" in said
    assert "Traceback" not in said
    assert S3Server.secret not in said
