"""Runs whose folder lies on a real server: the same bits as on a disk, and no secret where it does not belong."""

from __future__ import annotations

import io
import json
import logging
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import paramiko
import pytest
import torch
from fsspec.core import url_to_fs

from orchestrator.checkpoint.snapshot import Snapshot, tensors_equal
from orchestrator.commands.export import ExportConfig, export
from orchestrator.commands.inspect_run import InspectConfig, inspect
from orchestrator.commands.sample import SampleConfig, sample
from orchestrator.config import TrainConfig
from orchestrator.driver.launch import launch
from orchestrator.driver.preflight import plan
from orchestrator.errors import CheckpointError, UserError
from orchestrator.storage.location import Connection, locate
from orchestrator.storage.options import storage_options_of
from orchestrator.storage.transfer import make_folder
from tests.conftest import Storage, Undisturbed, enter, forget_clients
from tests.support.ports import free_ports
from tests.support.runs import checkpoints_in, metrics_in
from tests.support.servers import S3Server, SFTPServer
from tests.support.storage_runs import run


@dataclass(frozen=True)
class Place:
    """A run's folder on a server, its storage_options as a user gives them, and what must be seen nowhere."""

    out_dir: str
    storage_options: str
    secrets: tuple[str, ...]


@pytest.fixture(params=["s3 by environment", "s3 by options", "sftp"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """A folder on each kind of server, credentials in the environment, inline and in a file."""
    if request.param == "sftp":
        sftp: Storage = request.getfixturevalue("sftp")
        file = tmp_path / "options.json"
        file.write_text(json.dumps(sftp.options), encoding="utf-8")
        key = Path(sftp.options["key_filename"]).read_text(encoding="utf-8").splitlines()[1]
        return Place(f"{sftp.url}/run", str(file), (key,))
    s3: Storage = request.getfixturevalue("s3")
    secrets = (S3Server.key, S3Server.secret)
    if request.param == "s3 by environment":
        return Place(f"{s3.url}/run", "", secrets)
    server: S3Server = request.getfixturevalue("s3_server")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name)
    options = {"key": server.key, "secret": server.secret, "endpoint_url": server.endpoint}
    return Place(f"{s3.url}/run", json.dumps(options), secrets)


def on(place: Place, config: TrainConfig) -> TrainConfig:
    return replace(config, out_dir=place.out_dir, storage_options=place.storage_options)


def state_in(config: TrainConfig) -> Snapshot:
    store = checkpoints_in(config.out_dir, storage_options_of(config))
    return store.read(store.select("latest"))


def files_of(config: TrainConfig) -> Iterator[tuple[str, bytes]]:
    fs, root = url_to_fs(config.out_dir, **(storage_options_of(config) or {}))
    fs.invalidate_cache()
    for path in fs.find(root):
        yield path, fs.cat_file(path)


def check_no_secret(config: TrainConfig, secrets: tuple[str, ...], said: str) -> None:
    """Look for the secrets in every file of the run and in what was said."""
    files = dict(files_of(config))
    assert any(path.endswith("state.json") for path in files)
    for secret in secrets:
        assert secret not in said
        assert [path for path, content in files.items() if secret.encode() in content] == []


def test_a_run_on_a_server_has_the_bits_of_one_on_a_disk(
    place: Place, tiny: TrainConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    config = on(place, tiny)
    local = replace(tiny, out_dir=str(tmp_path / "local"))
    with caplog.at_level(logging.DEBUG):
        run(local, "local")
        run(config, "a", stop_after=9)
        assert checkpoints_in(config.out_dir, storage_options_of(config)).select("latest").iter_num == 10
        run(config, "b")
    assert tensors_equal(state_in(config), state_in(local))
    assert {r["iter"] for r in metrics_in(config.out_dir, storage_options_of(config)) if r["kind"] == "step"} == set(
        range(24)
    )
    ours = "".join(record.getMessage() for record in caplog.records if record.name.startswith("orchestrator"))
    check_no_secret(config, place.secrets, ours + "".join(capfd.readouterr()))


def test_other_commands_read_a_run_on_a_server(place: Place, tiny: TrainConfig, tmp_path: Path) -> None:
    config = on(place, replace(tiny, max_iters=4))
    run(config, "a")
    where = {"out_dir": config.out_dir, "storage_options": config.storage_options}
    table = inspect(InspectConfig(**where, verify=True))
    assert "checkpoint_00000004_a" in table
    assert "verified, latest" in table
    assert "DAMAGED" not in table
    out = io.StringIO()
    sample(SampleConfig(**where, num_samples=1, max_new_tokens=5, device="cpu"), out)
    assert len(out.getvalue()) > 5
    export(ExportConfig(**where, to=str(tmp_path / "ckpt.pt")))
    content = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    assert place.secrets[-1] not in str(content["config"])
    export(ExportConfig(**where, to=f"{config.out_dir}-exported/ckpt.pt"))  # to the same server, with the same options
    imported = replace(config, out_dir=f"{config.out_dir}-exported", init_from="resume", max_iters=5)
    run(imported, "b")
    assert state_in(imported).iter_num == 5


def test_a_model_on_a_server_is_a_source_for_every_command(place: Place, tiny: TrainConfig, tmp_path: Path) -> None:
    config = on(place, replace(tiny, max_iters=4))
    run(config, "a")
    begun = replace(config, out_dir=f"{config.out_dir}-begun", init_from=config.out_dir, max_iters=6)
    assert plan(begun).start.iter_num == 4
    run(begun, "b")
    assert state_in(begun).iter_num == 6
    folder = f"{config.out_dir}-hf"
    export(ExportConfig(config.out_dir, "hf", storage_options=config.storage_options, to=folder))
    tuned = replace(config, out_dir=str(tmp_path / "tuned"), init_from=folder, init_weights_only=True)
    assert plan(tuned).start.iter_num == 0
    options = {"storage_options": config.storage_options, "init_from": folder}  # out_dir is no longer on the server
    assert "a Hugging Face folder" in inspect(InspectConfig(**options, verify=True))
    assert export(ExportConfig(**options, to=f"{folder}-back/ckpt.pt")).startswith("wrote")
    run(replace(tuned, max_iters=1), "c")
    assert state_in(tuned).iter_num == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # Ray and its parts warn of themselves
def test_ray_workers_on_s3(
    s3: Storage, s3_server: S3Server, tiny: TrainConfig, undisturbed: Undisturbed, capfd: pytest.CaptureFixture[str]
) -> None:
    options = {"key": s3_server.key, "secret": s3_server.secret}
    config = replace(tiny, out_dir=f"{s3.url}/run", storage_options=json.dumps(options), num_workers=2, max_failures=0)
    assert launch(config).iter_num == 24
    assert tensors_equal(state_in(config), undisturbed(tiny, 2))
    store = checkpoints_in(config.out_dir, options)
    assert store.folder.read_json("run.json")["config"]["storage_options"] == "(given inline)"
    check_no_secret(config, (s3_server.secret,), "".join(capfd.readouterr()))


def refusal(config: TrainConfig) -> str:
    """Return why a run is refused, which takes seconds and starts nothing."""
    t0 = time.monotonic()
    with pytest.raises(UserError) as caught:
        plan(config)
    assert time.monotonic() - t0 < 25
    assert S3Server.secret not in str(caught.value)
    return str(caught.value)


def test_a_mistyped_bucket_is_refused_and_not_made(s3: Storage, tiny: TrainConfig) -> None:
    message = refusal(replace(tiny, out_dir="s3://mistyped/run"))
    assert "out_dir=s3://mistyped/run: no such bucket (NoSuchBucket" in message
    fs, _ = url_to_fs(s3.url)
    assert "mistyped" not in fs.ls("", refresh=True)


def test_wrong_credentials_are_refused(s3: Storage, tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(tiny, out_dir=f"{s3.url}/run")
    assert "credentials" in refusal(replace(config, storage_options='{"key": "testkey", "secret": "wrong"}'))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    forget_clients()
    assert "NoCredentialsError" in refusal(config)


def test_an_address_where_nobody_listens_is_refused(
    s3_server: S3Server, tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    (port,) = free_ports(1)
    enter(monkeypatch, {**s3_server.environment, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"})
    message = refusal(replace(tiny, out_dir="s3://ckpt/nowhere"))
    assert "out_dir=s3://ckpt/nowhere cannot be read" in message
    assert "check the address" in message


def test_an_sftp_server_that_does_not_know_us_is_refused(
    sftp_server: SFTPServer, tiny: TrainConfig, tmp_path: Path
) -> None:
    strangers_key = tmp_path / "key"
    SFTPServer.make_key(strangers_key)
    options: dict[str, Any] = {**sftp_server.storage_options, "key_filename": str(strangers_key)}
    config = replace(tiny, out_dir=f"{sftp_server.url}/refused", storage_options=json.dumps(options))
    assert "AuthenticationException" in refusal(config)
    (port,) = free_ports(1)
    assert "cannot be opened" in refusal(replace(config, out_dir=f"sftp://me@127.0.0.1:{port}/run"))


def test_sftp_is_connected_to_again_and_does_not_dawdle(sftp: Storage, sftp_server: SFTPServer) -> None:
    fs, path = locate(f"{sftp.url}/file", sftp.options)
    make_folder(fs, fs._parent(path))
    fs.pipe_file(path, b"content")
    sftp_server.kill()
    with pytest.raises((OSError, EOFError, paramiko.SSHException)):
        fs.cat_file(path)
    with pytest.raises(CheckpointError, match=r"the server cannot be reached .NoValidConnectionsError"):
        locate(sftp.url, sftp.options)
    sftp_server.start()
    fs, path = locate(f"{sftp.url}/file", sftp.options)
    assert fs.cat_file(path) == b"content"
    assert fs.client.get_transport().sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    assert locate(f"{sftp.url}/file", sftp.options)[0] is fs


def test_a_lost_connection_is_closed_when_the_next_one_is_opened(sftp: Storage) -> None:
    connection = Connection(f"{sftp.url}/run", sftp.options)
    shared = connection.fs
    connection.reconnect()
    first = connection.fs
    connection.reconnect()
    assert shared.client.get_transport().is_active(), "others use it"
    assert first.client.get_transport() is None
    assert not connection.fs.exists(connection.path)
