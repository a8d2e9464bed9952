"""MLflow: a run and its later attempts are one run there, in a local store."""

from __future__ import annotations

import logging
import sqlite3
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator.config import TrainConfig
from orchestrator.errors import ConfigError
from orchestrator.storage.run_folder import RunFolder
from orchestrator.telemetry.mlflow_sink import MlflowSink
from orchestrator.telemetry.records import Record, Stamped, Step
from orchestrator.telemetry.sinks import Sinks, sinks_of

pytest.importorskip("mlflow")


def step(iter_num: int, loss: float) -> Record:
    return Step(iter=iter_num, loss=loss, lr=1e-3, dt_s=0.1, mfu=None, tflops=None, tokens_per_s=10.0, grad_norm=1.0)


@pytest.fixture(autouse=True)
def _no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")


def runs_in(out_dir: Path) -> list[Any]:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{out_dir}/mlflow.db")
    return list(client.search_runs([each.experiment_id for each in client.search_experiments()]))


def losses_in(out_dir: Path) -> list[tuple[int, float]]:
    with sqlite3.connect(out_dir / "mlflow.db") as database:
        return sorted(database.execute("select step, value from metrics where key = 'step/loss'"))


def test_a_killed_attempt_is_continued_in_the_same_run(tmp_path: Path) -> None:
    killed = MlflowSink(RunFolder(str(tmp_path)), "nano", {"n_layer": 2, "max_iters": 10})
    for iter_num in range(3):
        killed.write(Stamped(step(iter_num, 3.0), 1000.0 + iter_num, "a"))
    killed.flush()
    killed._last.result(timeout=60)  # and it is never closed
    (run,) = runs_in(tmp_path)
    assert (run.info.status, run.info.run_name) == ("RUNNING", tmp_path.name)

    again = MlflowSink(RunFolder(str(tmp_path)), "nano", {"n_layer": 2, "max_iters": 20, "seed": 1})
    for iter_num in range(2, 4):
        again.write(Stamped(step(iter_num, 2.0), 2000.0 + iter_num, "b"))
    again.close()
    (run,) = runs_in(tmp_path)
    assert run.info.status == "FINISHED"
    assert run.info.run_id == (tmp_path / "mlflow_run_id").read_text()
    assert losses_in(tmp_path) == [(0, 3.0), (1, 3.0), (2, 2.0), (2, 3.0), (3, 2.0)]
    assert run.data.params == {"n_layer": "2", "max_iters": "10", "seed": "1"}, "those of the first attempt are final"
    assert not (tmp_path / "mlruns").exists()


def test_a_run_that_the_store_does_not_know_begins_anew(tmp_path: Path) -> None:
    (tmp_path / "mlflow_run_id").write_text("0" * 32)
    sink = MlflowSink(RunFolder(str(tmp_path)), "nano", {})
    sink.write(Stamped(step(0, 3.0), 1000.0, "a"))
    sink.close()
    (run,) = runs_in(tmp_path)
    assert run.info.run_id == (tmp_path / "mlflow_run_id").read_text() != "0" * 32


def test_training_waits_for_no_store_and_goes_on_without_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nowhere://server")
    sinks: Sinks = sinks_of(lambda: MlflowSink(RunFolder(str(tmp_path)), "nano", {}))
    deadline_s = time.monotonic() + 60
    while "MlflowSink is left out" not in caplog.text:
        sinks.write(Stamped(step(0, 3.0), 1000.0, "a"))
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    assert "training goes on" in caplog.text
    assert logging.getLogger("mlflow").level == logging.WARNING


def test_a_bucket_holds_no_store() -> None:
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_URI"):
        MlflowSink(RunFolder("memory://bucket/run"), "nano", {})


def test_a_folder_that_no_uri_can_name_holds_no_store(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"its URI can hold no `\?`"):
        MlflowSink(RunFolder(str(tmp_path / "lr=1e-3?")), "nano", {})


def test_a_store_lies_in_a_folder_of_any_other_name(tmp_path: Path) -> None:
    folder = tmp_path / "a b'\"#%d %20 &x=ü"
    folder.mkdir()
    sink = MlflowSink(RunFolder(str(folder)), "of / '%d#? ü", {})
    sink.write(Stamped(step(0, 3.0), 1000.0, "a"))
    sink._begun.result(timeout=60)
    sink.close()
    assert losses_in(folder) == [(0, 3.0)]


def test_a_password_is_not_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:hush@server")
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_PASSWORD on the nodes") as refused:
        MlflowSink(RunFolder(str(tmp_path)), "nano", {})
    assert "hush" not in str(refused.value)


@pytest.mark.slow
def test_two_starts_of_a_command_are_one_run(tiny: TrainConfig) -> None:
    for max_iters in (8, 12):
        config = replace(tiny, mlflow_log=True, max_iters=max_iters)
        flags = [f"--{key}={value}" for key, value in asdict(config).items()]
        done = subprocess.run(
            [sys.executable, "-m", "orchestrator.loop", *flags], capture_output=True, check=False, timeout=120
        )
        assert done.returncode == 0, done.stderr.decode()
        assert b"mlflow" not in done.stderr + done.stdout.replace(b"mlflow_", b"")
    assert len(runs_in(Path(tiny.out_dir))) == 1
    assert [iter_num for iter_num, _ in losses_in(Path(tiny.out_dir))] == list(range(12))
