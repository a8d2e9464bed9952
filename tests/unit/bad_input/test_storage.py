"""Storage that is mistyped, unreachable, silent or not writable, and packages that are missing."""

from __future__ import annotations

import importlib.util
import socket
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.config import TrainConfig
from orchestrator.driver.preflight import plan
from tests.support.commands import Refused, everything_in, flags


@pytest.mark.parametrize("out_dir", ["/proc/run", "/proc/1/run/deeper", "{tmp_path}/text/run", "{tmp_path}/text"])
def test_storage_that_cannot_be_written(refused: Refused, tiny: TrainConfig, tmp_path: Path, out_dir: str) -> None:
    if sys.platform != "linux" and out_dir.startswith("/proc"):
        pytest.skip("/proc is Linux's")
    (tmp_path / "text").write_text("a file, no folder")
    out_dir = out_dir.format(tmp_path=tmp_path)
    said = refused("train", *flags(tiny, out_dir=out_dir))
    assert said.startswith(f"error: out_dir={out_dir} cannot be written: ")
    assert said.endswith("check the path, permissions and free space")


@pytest.fixture
def _s3() -> None:
    pytest.importorskip("s3fs").S3FileSystem.clear_instance_cache()  # it would keep the address of another test


@pytest.mark.usefixtures("_s3")
def test_unreachable_storage(refused: Refused, tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:  # bound and not listening: connections are refused, and nobody else takes the port
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{closed.getsockname()[1]}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "name-of-the-key")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "the-secret")
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
        said = refused("train", *flags(tiny, out_dir="s3://bucket/run"))
    assert "error: out_dir=s3://bucket/run cannot be read: the server cannot be reached (EndpointConnection" in said
    assert said.endswith("check the address, the network and the credentials")
    assert "name-of-the-key" not in said
    assert "the-secret" not in said


@pytest.mark.usefixtures("_s3")
def test_silent_storage(refused: Refused, tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.storage.run_folder._FIRST_ANSWER_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as mute:  # accepts, and never says a word
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{mute.getsockname()[1]}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        said = refused("train", *flags(tiny, out_dir="s3://silent/run"))
    assert "error: out_dir=s3://silent/run cannot be read: no answer in 0.5 s; check the address" in said


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("xyz://bucket/run", "xyz://bucket/run: no such protocol; give a path, or a URL such as s3://bucket/run"),
        ("s33://bucket/run", "s33://bucket/run: no such protocol; give a path, or a URL such as s3://bucket/run; did"),
        ("gs://bucket/run", "the package for gs:// is not installed: pip install 'nanogpt-orchestrator[gcs]'"),
        ("abfs://bucket/run", "the package for abfs:// is not installed: pip install 'nanogpt-orchestrator[azure]'"),
    ],
)
def test_unknown_protocol(
    refused: Refused, finished: TrainConfig, monkeypatch: pytest.MonkeyPatch, url: str, message: str
) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)  # as where they are not installed
    monkeypatch.setitem(sys.modules, "adlfs", None)
    assert message in refused("train", *flags(finished, out_dir=url))
    assert message in refused("inspect", f"--out_dir={url}")
    assert message in refused("export", f"--out_dir={finished.out_dir}", f"--to={url}")


def test_a_whole_bucket_is_no_run(refused: Refused, tiny: TrainConfig) -> None:
    pytest.importorskip("s3fs")
    said = refused("train", *flags(tiny, out_dir="s3://bucket"))
    assert said == "error: out_dir=s3://bucket is a whole bucket: give a folder in it, s3://bucket/run"


@pytest.mark.parametrize("key", ["out_dir", "init_from"])
def test_a_password_in_a_url_is_refused_and_not_repeated(refused: Refused, tiny: TrainConfig, key: str) -> None:
    said = refused("train", *flags(tiny, **{key: "sftp://me:hush@host/run"}))
    assert said.startswith(f"error: {key} holds a password")
    assert "hush" not in said


@pytest.mark.parametrize(
    ("key", "package"), [("wandb_log", "wandb"), ("tensorboard_log", "tensorboard"), ("mlflow_log", "mlflow")]
)
def test_a_missing_extra_is_named(
    refused: Refused, tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch, key: str, package: str
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == package else find(name))
    said = refused("train", *flags(tiny, **{key: True}))
    assert said == f"error: {key}=True needs a package: pip install 'nanogpt-orchestrator[{package}]'"


def test_mlflow_needs_a_store(refused: Refused, tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    said = refused("train", *flags(tiny, out_dir="memory://bucket/run", mlflow_log=True))
    assert said.startswith("error: mlflow_log=True needs a store, and out_dir=memory://bucket/run can hold none")


def test_check_of_storage_leaves_nothing(tiny: TrainConfig, tmp_path: Path) -> None:
    before = everything_in(tmp_path)
    assert plan(replace(tiny, out_dir=str(tmp_path / "new" / "deeper" / "run"))).start.iter_num == 0
    assert everything_in(tmp_path) == before
