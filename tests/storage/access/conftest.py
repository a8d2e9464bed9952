"""A folder on every kind of storage, a short run, keys in a file, and a client that does not retry by itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.config import TrainConfig
from orchestrator.storage import location, retry
from tests.conftest import Storage, enter, forget_clients
from tests.support.keys import write_keys
from tests.support.proxy import FaultyProxy
from tests.support.servers import S3Server


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
    monkeypatch.setattr(location, "_S3_LIMITS", limits)
    monkeypatch.setattr(location, "_S3_ROUNDS", 1)
    monkeypatch.setattr(retry, "_LONGEST_PAUSE_S", 0.2)
    forget_clients()


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
