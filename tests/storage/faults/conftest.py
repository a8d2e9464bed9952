"""Settings for runs on storage that fails, short pauses before retries, and a look for secrets after each test."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.checkpoint.snapshot import Snapshot
from orchestrator.config import TrainConfig
from orchestrator.storage import location, retry
from orchestrator.storage.location import locate
from tests.conftest import Storage, forget_clients
from tests.support.servers import S3Server, SFTPServer
from tests.support.storage_runs import Calm, Run, store_of


@pytest.fixture(scope="package")
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
    monkeypatch.setattr(location, "_S3_LIMITS", limits)
    monkeypatch.setattr(location, "_S3_ROUNDS", 1)
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
