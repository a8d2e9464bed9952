"""Storage as people have it: names with any letters, renewed keys, no permission to delete, wrong addresses."""

from __future__ import annotations

import errno
import http.server
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.local import LocalFileSystem

from orchestrator.checkpoint.snapshot import tensors_equal
from orchestrator.checkpoint.store import CheckpointStore
from orchestrator.commands.inspect_run import InspectConfig, inspect
from orchestrator.config import TrainConfig
from orchestrator.distributed.device import resolve
from orchestrator.distributed.world import World
from orchestrator.driver.launch import launch
from orchestrator.driver.lease import LEASE_FILE, Lease
from orchestrator.driver.preflight import plan
from orchestrator.errors import CheckpointError, UserError
from orchestrator.loop import train
from orchestrator.storage import retry, transfer
from orchestrator.storage.folders import PROBE_FILE, check_writable, delete_folder
from orchestrator.storage.options import storage_options_of
from orchestrator.storage.transfer import atomic_write, exists, local_copy, locate
from orchestrator.telemetry.emit import open_telemetry
from orchestrator.telemetry.format import print_record
from orchestrator.telemetry.metrics import MetricsLog, read_metrics
from tests.conftest import Storage, enter, forget_clients
from tests.support.ports import free_ports
from tests.support.proxy import FaultyProxy
from tests.support.servers import S3Server

ODD_NAMES = (
    "lr=[1e-3]",
    "a*b",
    "who?",
    "{a,b}",
    "run #1",
    "100%20 a+b&c=d;e,f",
    "größe-β",
    "mid~dle",
    "a::b",
    'it\'s "so"',
    "-rf",
)
Run = Callable[..., list[dict[str, Any]]]


@pytest.fixture(params=["s3", "sftp", "disk"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "disk":
        return Storage(str(tmp_path / "disk"))
    storage: Storage = request.getfixturevalue(request.param)
    return storage


@pytest.fixture
def config(tiny: TrainConfig) -> TrainConfig:
    return replace(tiny, max_iters=24, checkpoint_interval=4, eval_interval=24)


@pytest.fixture
def one_try(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client does not try again by itself, and we do so soon."""
    limits = {"connect_timeout": 2.0, "read_timeout": 2.0, "retries": {"total_max_attempts": 1}}
    monkeypatch.setattr(transfer, "_S3_LIMITS", limits)
    monkeypatch.setattr(transfer, "_S3_ROUNDS", 1)
    monkeypatch.setattr(retry, "_LONGEST_PAUSE_S", 0.2)
    forget_clients()


def run(
    config: TrainConfig,
    attempt: str = "a",
    each: Callable[[], None] = lambda: None,
    records: list[dict[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """Train in this process, with telemetry as `python -m orchestrator.loop` has it; return the records."""
    records = [] if records is None else records
    world = World(attempt=attempt)

    def should_stop() -> int:
        each()
        return 0

    with open_telemetry(config, world, print_record) as tell:

        def note(record: dict[str, Any]) -> None:
            records.append(record)
            tell(record)

        train(resolve(config), world, note, should_stop=should_stop)
    return records


def kinds(records: list[dict[str, Any]], kind: str) -> list[int]:
    return [record["iter"] for record in records if record["kind"] == kind]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_name_has_no_meaning_but_itself(name: str, place: Storage) -> None:
    out_dir = f"{place.url}/{name}/run"
    check_writable(out_dir, place.options)
    store = CheckpointStore(out_dir, place.options)
    assert store.root.endswith(f"/{name}/run")
    with atomic_write(f"{out_dir}/checkpoint_00000004_a/state.json", place.options) as file:
        file.write_text("{}")
    assert store.names() == ["checkpoint_00000004_a"]
    assert exists(f"{out_dir}/checkpoint_00000004_a/state.json", place.options)
    with local_copy(f"{out_dir}/checkpoint_00000004_a/state.json", place.options) as copy:
        assert copy.read_text() == "{}"
    log = MetricsLog(out_dir, "a", storage_options=place.options)
    log.write({"kind": "step", "iter": 0})
    log.close()
    assert len(read_metrics(out_dir, place.options)) == 1
    store.delete_checkpoint("checkpoint_00000004_a")
    assert store.names() == []


@pytest.mark.parametrize(("name", "other"), [("run[12]", "run1"), ("r*", "run"), ("r?n", "run"), ("[a-z]", "b")])
def test_what_a_pattern_would_match_stays(name: str, other: str, place: Storage) -> None:
    folders = [f"{name}/checkpoint_x", f"{name}/checkpoint_x2", f"{other}/checkpoint_x"]
    for folder in folders:
        for file in ("f", "deeper/g"):
            with atomic_write(f"{place.url}/{folder}/{file}", place.options) as scratch:
                scratch.write_text(folder)
    fs, path = locate(f"{place.url}/{name}/checkpoint_x", place.options)
    delete_folder(fs, path)
    there = [folder for folder in folders if exists(f"{place.url}/{folder}/deeper/g", place.options)]
    assert there == folders[1:]
    assert [folder for folder in folders if exists(f"{place.url}/{folder}/f", place.options)] == folders[1:]


def test_a_run_in_such_a_folder_keeps_no_more_than_it_should(
    s3: Storage, config: TrainConfig, caplog: pytest.LogCaptureFixture
) -> None:
    config = replace(config, out_dir=f"{s3.url}/lr=[1e-3],b=*/run")
    neighbour = replace(config, out_dir=f"{s3.url}/lr=1,b=2/run", max_iters=4)
    run(neighbour)
    assert len(kinds(run(config), "checkpoint")) >= 3
    store = CheckpointStore(config.out_dir)
    held = [name for name in store.names() if store.fs.find(store.path(name))]
    assert len(held) <= config.keep_checkpoints + 1
    assert len(CheckpointStore(neighbour.out_dir).names()) == 1
    assert "were not deleted" not in caplog.text


@pytest.mark.parametrize("path", ["a//b", "a/./b", "a/../b"])
def test_a_path_that_an_object_store_does_not_resolve_is_refused(path: str, s3: Storage, tiny: TrainConfig) -> None:
    odd = path[2:-2] or "//"
    with pytest.raises(CheckpointError, match=rf"has {odd.replace('.', '[.]')} in its path".replace("[//]", "//")):
        plan(replace(tiny, out_dir=f"{s3.url}/{path}"))
    with pytest.raises(CheckpointError, match="leave it out"), atomic_write(f"{s3.url}/{path}"):
        pass


def test_a_version_of_an_object_is_read_and_not_written(s3: Storage, s3_server: S3Server, tiny: TrainConfig) -> None:
    fs, _ = locate(s3.url)
    bucket = f"versioned-{Path(s3.url).name[-20:].replace('_', '-')}"
    fs.call_s3("create_bucket", Bucket=bucket)
    fs.make_bucket_versioned(bucket)
    first = fs.pipe_file(f"{bucket}/file", b"first")["VersionId"]
    fs.pipe_file(f"{bucket}/file", b"second")
    url = f"s3://{bucket}/file?versionId={first}"
    with local_copy(url) as copy:
        assert copy.read_bytes() == b"first"
    with pytest.raises(CheckpointError, match="names a version of an object"):
        plan(replace(tiny, out_dir=url))
    with pytest.raises(CheckpointError, match="names a version of an object"), atomic_write(url):
        pass
    config = replace(tiny, out_dir=f"s3://{bucket}/run", max_iters=12)
    run(config)
    assert 1 <= len(CheckpointStore(config.out_dir).names()) <= config.keep_checkpoints + 1
    assert s3_server.secret not in url


def test_dots_on_a_disk_and_a_server_are_resolved_there(tmp_path: Path, sftp: Storage) -> None:
    (tmp_path / "real" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "real" / "deep")
    assert CheckpointStore(f"{tmp_path}/link/../run").root == f"{tmp_path}/real/run"
    fs, path = locate(f"{sftp.url.replace(sftp.url.split('127.0.0.1')[1][6:], '')}/~/x", sftp.options)
    assert path == f"{fs.ftp.normalize('.').rstrip('/')}/x"
    assert locate(f"{sftp.url}/who?/x#y", sftp.options)[1].endswith("/who?/x#y")


# keys that are renewed


def write_keys(path: Path, key: str, secret: str) -> None:
    text = f"[default]\naws_access_key_id = {key}\naws_secret_access_key = {secret}\n"
    temporary = path.with_suffix(".new")
    temporary.write_text(text)
    temporary.replace(path)


@pytest.fixture
def keys_file(proxy: FaultyProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The credentials file from which clients take their keys, in place of the environment."""
    file = tmp_path / "credentials"
    write_keys(file, S3Server.key, S3Server.secret)
    enter(monkeypatch, proxy.environment)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    forget_clients()
    return file


@pytest.mark.usefixtures("one_try")
@pytest.mark.parametrize(
    ("status", "code"),
    [
        (400, "ExpiredToken"),
        pytest.param(403, "InvalidAccessKeyId", marks=pytest.mark.slow),
        (403, "AccessDenied"),
        pytest.param(403, "RequestExpired", marks=pytest.mark.slow),
    ],
)
def test_keys_that_are_renewed_in_mid_run_are_picked_up(
    status: int, code: str, config: TrainConfig, faulty_s3: Storage, proxy: FaultyProxy, keys_file: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    config = replace(config, out_dir=f"{faulty_s3.url}/run")
    faults: list[Any] = []
    iterations = iter(range(10**6))

    def renew() -> None:
        if next(iterations) == 9:
            write_keys(keys_file, S3Server.new_key, S3Server.new_secret)
            faults.append(proxy.expire(S3Server.key, status, code))

    with caplog.at_level(logging.INFO, "orchestrator"):
        records = run(config, each=renew)
    assert faults[0].fired
    assert kinds(records, "checkpoint_failed") == []
    assert kinds(records, "checkpoint")[-1] == 24
    assert {r["iter"] for r in read_metrics(config.out_dir) if r["kind"] == "step"} == set(range(24))
    store = CheckpointStore(config.out_dir)
    assert len([name for name in store.names() if store.fs.find(store.path(name))]) <= config.keep_checkpoints + 1
    told = [text for text in caplog.messages if "credentials are read again: " in text]
    assert len(told) == 1
    assert "metrics cannot be written" not in caplog.text
    assert S3Server.new_secret not in caplog.text


@pytest.mark.usefixtures("one_try")
def test_keys_that_are_renewed_late_are_waited_for(
    config: TrainConfig, faulty_s3: Storage, proxy: FaultyProxy, keys_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """They have expired, the next ones come later; meanwhile the file is there by half, and gone."""
    config = replace(config, out_dir=f"{faulty_s3.url}/run")
    store = CheckpointStore(config.out_dir)
    fault = proxy.expire(S3Server.key)
    contents = iter(["[default]\naws_access_key_id = te", None, None])

    def write_json() -> None:
        try:
            store.write_json("run.json", {"a": 1})
        except CheckpointError:
            if (content := next(contents, "end")) == "end":
                write_keys(keys_file, S3Server.new_key, S3Server.new_secret)
            elif content:
                keys_file.write_text(str(content))
            else:
                keys_file.unlink(missing_ok=True)
            raise

    with caplog.at_level(logging.INFO, "orchestrator"):
        retry.with_retries(write_json, store)
    assert fault.fired
    assert store.read_json("run.json") == {"a": 1}
    assert len(caplog.messages) == 1, "said once"


@pytest.mark.usefixtures("one_try")
def test_keys_that_stay_expired_cost_checkpoints_and_not_the_run(
    config: TrainConfig, faulty_s3: Storage, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "RETRY_FOR_S", 0.3)
    config = replace(config, out_dir=f"{faulty_s3.url}/run", checkpoint_interval=8)
    records: list[dict[str, Any]] = []
    faults: list[Any] = []

    def expire() -> None:
        if not faults and kinds(records, "step"):
            faults.append(proxy.expire(S3Server.key))
        if kinds(records, "checkpoint_failed"):
            proxy.heal()
        elif kinds(records, "step")[-1:] > [8]:
            time.sleep(0.2)

    run(config, each=expire, records=records)
    failed = [record for record in records if record["kind"] == "checkpoint_failed"]
    assert failed
    assert "the credentials have expired (ExpiredToken to PutObject" in failed[0]["why"]
    assert kinds(records, "step") == list(range(24))
    assert kinds(records, "checkpoint")[-1] == 24


@pytest.mark.usefixtures("one_try")
def test_keys_in_a_file_of_options_are_renewed_too(
    config: TrainConfig, faulty_s3: Storage, proxy: FaultyProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    file = tmp_path / "options.json"
    file.write_text(json.dumps({"key": S3Server.key, "secret": S3Server.secret}))
    config = replace(config, out_dir=f"{faulty_s3.url}/run", storage_options=str(file))
    iterations = iter(range(10**6))

    def renew() -> None:
        if next(iterations) == 5:
            file.write_text(json.dumps({"key": S3Server.new_key, "secret": S3Server.new_secret}))
            proxy.expire(S3Server.key)

    records = run(config, each=renew)
    assert kinds(records, "checkpoint_failed") == []
    assert kinds(records, "checkpoint")[-1] == 24
    found = read_metrics(config.out_dir, storage_options_of(config))
    assert {r["iter"] for r in found if r["kind"] == "step"} == set(range(24))


@pytest.mark.usefixtures("one_try")
def test_a_driver_shows_life_with_the_new_keys(
    faulty_s3: Storage, proxy: FaultyProxy, keys_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = CheckpointStore(f"{faulty_s3.url}/run")
    lease = Lease(store, beat_interval_s=50)
    with lease.held():
        before = store.read_json(LEASE_FILE)["beat"]
        proxy.expire(S3Server.key)
        write_keys(keys_file, S3Server.new_key, S3Server.new_secret)
        lease.beat()
        assert store.read_json(LEASE_FILE)["beat"] == before + 1
    assert not store.read_json(LEASE_FILE)
    assert "cannot show" not in caplog.text


# what is allowed, and what is not


def deletes(method: str, path: str) -> bool:
    return (method == "DELETE" and "uploadId" not in path) or (method == "POST" and path.endswith("?delete"))


@pytest.mark.usefixtures("one_try")
def test_a_bucket_in_which_nothing_can_be_deleted_is_warned_of_once(
    config: TrainConfig, faulty_s3: Storage, proxy: FaultyProxy, caplog: pytest.LogCaptureFixture
) -> None:
    config = replace(config, out_dir=f"{faulty_s3.url}/run")
    refused = proxy.answer(403, "AccessDenied", deletes, 10**6)
    saved = 0
    with caplog.at_level(logging.INFO, "orchestrator"):
        planned = plan(config)
        for attempt in ("a", "b"):
            lease = Lease(planned.store, beat_interval_s=60)
            lease.wait_until_free()
            with lease.held():
                records = run(replace(config, max_iters=24 if attempt == "a" else 32), attempt)
            assert kinds(records, "checkpoint_failed") == []
            saved += len(kinds(records, "checkpoint"))
    assert refused.fired
    assert len([text for text in caplog.messages if "nothing can be deleted there (access denied" in text]) == 1
    assert [record for record in caplog.records if record.levelname == "WARNING"][1:] == []
    store = CheckpointStore(config.out_dir)
    assert len(store.names()) == saved > config.keep_checkpoints + 1, "all of them stay"
    assert [path for path in store.fs.ls(store.root, detail=False) if ".writable" in path] == [store.path(PROBE_FILE)]
    Lease(store, sleep=lambda _s: pytest.fail("it was given back")).wait_until_free()


@pytest.mark.usefixtures("one_try")
def test_who_has_no_driver_is_told_when_it_prunes(
    config: TrainConfig, faulty_s3: Storage, proxy: FaultyProxy, caplog: pytest.LogCaptureFixture
) -> None:
    proxy.answer(403, "AccessDenied", deletes, 10**6)
    config = replace(config, out_dir=f"{faulty_s3.url}/run", keep_checkpoints=1)
    run(config, each=lambda: time.sleep(0.05))
    (told,) = [text for text in caplog.messages if "nothing can be deleted there" in text]
    assert "old checkpoints stay until you delete them" in told


@pytest.mark.usefixtures("one_try")
def test_a_checkpoint_that_cannot_be_deleted_can_be_withdrawn(faulty_s3: Storage, proxy: FaultyProxy) -> None:
    store = CheckpointStore(f"{faulty_s3.url}/run")
    store.write_json("checkpoint_00000004_a/state.json", {"damaged": 1})
    proxy.answer(403, "AccessDenied", deletes, 10**6)
    store.withdraw("checkpoint_00000004_a")
    assert store.load("checkpoint_00000004_a") is None
    assert store.names() == ["checkpoint_00000004_a"]


def test_a_bucket_that_may_only_be_read_is_evaluated_and_looked_at(
    s3: Storage, config: TrainConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = replace(config, out_dir=f"{s3.url}/run", max_iters=4)
    run(config)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", S3Server.reader_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", S3Server.reader_secret)
    forget_clients()
    with pytest.raises(CheckpointError, match=r"cannot be written: access denied \(AccessDenied to PutObject"):
        plan(replace(config, max_iters=8))
    evaluation = replace(config, eval_only=True)
    assert plan(evaluation).start.iter_num == 4
    assert kinds(run(evaluation, "b"), "eval") == [4]
    assert "metrics cannot be written" in caplog.text
    assert "whole, latest" in inspect(InspectConfig(out_dir=config.out_dir))


@pytest.mark.usefixtures("one_try")
def test_a_bucket_that_cannot_be_listed_is_refused(tiny: TrainConfig, faulty_s3: Storage, proxy: FaultyProxy) -> None:
    proxy.answer(403, "AccessDenied", lambda method, path: method == "GET" and "list-type" in path, 10**6)
    with pytest.raises(CheckpointError, match=r"cannot be read: access denied \(AccessDenied to ListObjectsV2"):
        plan(replace(tiny, out_dir=f"{faulty_s3.url}/run"))


# words


def why_not(config: TrainConfig) -> str:
    with pytest.raises(UserError) as refused:
        plan(config)
    said = str(refused.value)
    assert "None" not in said
    assert "\n" not in said
    assert not {S3Server.secret, S3Server.reader_secret} & set(said.split())
    return said


@pytest.mark.usefixtures("one_try")
@pytest.mark.parametrize("message", ["as the test asked", None, ""])
@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        (404, "NoSuchBucket", "no such bucket (NoSuchBucket"),
        (403, "AccessDenied", "access denied (AccessDenied"),
        (403, "SignatureDoesNotMatch", "access denied, the secret key is wrong (SignatureDoesNotMatch"),
        (403, "InvalidAccessKeyId", "access denied, the server does not know this access key"),
        (400, "ExpiredToken", "the credentials have expired (ExpiredToken"),
        (403, "RequestTimeTooSkewed", "this machine's clock differs too much from the server's"),
        (400, "AuthorizationHeaderMalformed", "the region is wrong (AuthorizationHeaderMalformed"),
        (418, "NobodyKnowsThisOne", "the server has refused it (NobodyKnowsThisOne"),
    ],
)
def test_every_answer_is_told_in_words(
    status: int, code: str, words: str, message: str | None, tiny: TrainConfig, faulty_s3: Storage, proxy: FaultyProxy
) -> None:
    proxy.answer(status, code, lambda *_: True, 10**6, message)
    assert words in why_not(replace(tiny, out_dir=f"{faulty_s3.url}/run"))


@pytest.mark.usefixtures("one_try")
def test_what_servers_really_say_is_told_in_words(
    tiny: TrainConfig, s3: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(tiny, out_dir=f"{s3.url}/run")
    assert "no such bucket" in why_not(replace(tiny, out_dir="s3://mistyped/run"))
    with pytest.raises(CheckpointError, match="no such bucket"):
        inspect(InspectConfig(out_dir="s3://mistyped/run"))
    with pytest.raises(CheckpointError, match="no such bucket"), local_copy("s3://mistyped/ckpt.pt"):
        pass
    assert "there is no bucket in it" in why_not(replace(tiny, out_dir="s3:///ckpt/run"))
    for key, secret, words in (
        (S3Server.key, "wrong", "the secret key is wrong"),
        ("nobody", S3Server.secret, "does not know this access key"),
    ):
        options = json.dumps({"key": key, "secret": secret})
        assert words in why_not(replace(config, storage_options=options))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    forget_clients()
    assert "no credentials were found" in why_not(config)


@pytest.fixture
def web_server() -> Iterator[str]:
    """A server that is none of S3's."""

    class Page(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            page = b"<html><body><p>Welcome<br></body></html>\n" * 100
            self.send_response(200)
            self.send_header("Content-Length", str(len(page)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(page)

        do_HEAD = do_PUT = do_GET  # noqa: N815

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Page) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


@pytest.mark.usefixtures("one_try")
def test_an_address_that_is_not_of_s3_is_told_in_words(
    tiny: TrainConfig, s3_server: S3Server, web_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (port,) = free_ports(1)
    for endpoint, words in {
        f"http://{web_server}": "or is no S3 server: look at the address",
        f"https://{web_server}": "TLS has failed",
        f"http://127.0.0.1:{port}": "the server cannot be reached",
    }.items():
        enter(monkeypatch, {**s3_server.environment, "AWS_ENDPOINT_URL": endpoint})
        assert words in why_not(replace(tiny, out_dir="s3://ckpt/run")), endpoint


def test_a_disk_is_told_of_in_words(tiny: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    for path, words in {
        "file": "Not a directory",
        "file/run": "Not a directory",
        "x" * 300: "File name too long",
        "a/run": "Too many levels of symbolic links",
    }.items():
        assert words in why_not(replace(tiny, out_dir=f"{tmp_path}/{path}"))

    def full(_fs: Any, path: str, *_rest: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)

    monkeypatch.setattr(LocalFileSystem, "pipe_file", full)
    assert "cannot be written: OSError: [Errno 30] Read-only file system" in why_not(tiny)
    assert not Path(tiny.out_dir).exists()


def test_keys_of_two_runs_do_not_mix(s3: Storage, config: TrainConfig) -> None:
    """A client whose keys were read again is one for all who have the same options, and for nobody else."""
    fs, _ = locate(s3.url)
    options = {"key": S3Server.new_key, "secret": S3Server.new_secret}
    other, _ = locate(s3.url, options)
    again, _ = transfer.renewed(fs, s3.url, None)
    assert again is not fs
    assert transfer.renewed(fs, s3.url, None)[0] is again, "once for all"
    assert locate(f"{s3.url}/run")[0] is again
    assert other.key == S3Server.new_key
    config = replace(config, out_dir=f"{s3.url}/run", max_iters=4)
    run(config)
    store = CheckpointStore(config.out_dir, options)
    assert tensors_equal(store.read(store.select()), CheckpointStore(config.out_dir).read(store.select()))


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # Ray and its parts warn of themselves
def test_ray_trains_where_nothing_can_be_deleted_and_evaluates_where_nothing_can_be_written(
    tiny: TrainConfig, faulty_s3: Storage, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(tiny, out_dir=f"{faulty_s3.url}/lr=[1e-3] *?/run", max_failures=0, keep_checkpoints=1)
    refused = proxy.answer(403, "AccessDenied", deletes, 10**6)
    assert launch(replace(config, max_iters=8)).iter_num == 8
    assert launch(replace(config, max_iters=16)).iter_num == 16
    assert refused.fired
    store = CheckpointStore(config.out_dir)
    held = store.names()
    assert [held[0].split("_")[1], held[-1].split("_")[1]] == ["00000016", "00000004"]
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", S3Server.reader_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", S3Server.reader_secret)
    forget_clients()
    assert launch(replace(config, max_iters=16, eval_only=True)).iter_num == 16


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_keys_are_renewed_under_ray(
    tiny: TrainConfig, faulty_s3: Storage, proxy: FaultyProxy, keys_file: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = replace(tiny, out_dir=f"{faulty_s3.url}/run", max_failures=0, num_workers=2, max_iters=600)
    config = replace(config, checkpoint_interval=20, eval_interval=600)

    def renew() -> None:
        deadline_s = time.monotonic() + 120
        while not any(m == "PUT" and "checkpoint_" in path and "state.json" in path for m, path in proxy.traffic.seen):
            assert time.monotonic() < deadline_s
            time.sleep(0.05)
        write_keys(keys_file, S3Server.new_key, S3Server.new_secret)
        faults.append(proxy.expire(S3Server.key))

    faults: list[Any] = []
    renewing = threading.Thread(target=renew)
    renewing.start()
    assert launch(config).iter_num == 600
    renewing.join()
    said = "".join(capfd.readouterr())
    assert faults[0].fired
    assert "was not saved" not in said
    assert "could not be written" not in said
    assert "cannot show" not in said
    assert 1 <= said.count("credentials are read again") <= 2
