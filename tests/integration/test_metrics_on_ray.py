"""A cluster's dashboards show a run: Prometheus scrapes it, Grafana's queries find it, Ray lists it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import ray

from orchestrator.config import TrainConfig
from orchestrator.driver.ray_metrics import RayMetrics
from orchestrator.telemetry.goodput import Ledger
from orchestrator.telemetry.records import Stamped, Step
from tests.support.dashboard import queries
from tests.support.head import ENVIRONMENT, Head, started_head
from tests.support.prometheus import Prometheus
from tests.support.servers import ServerMissingError

pytestmark = pytest.mark.filterwarnings("default")  # Ray and its parts warn of themselves

QUICK = {"RAY_metrics_report_interval_ms": "3000"}  # by default Ray exports every ten seconds
TRACKED = {"RAY_TRAIN_ENABLE_STATE_TRACKING": "1"}  # Ray's own switch of its page about Ray Train
FOUND_S = 120.0


@pytest.fixture
def head() -> Iterator[Head]:
    with started_head(QUICK) as head:
        yield head


@pytest.fixture
def prometheus(head: Head, tmp_path: Path) -> Iterator[Prometheus]:
    try:
        prometheus = Prometheus(tmp_path, head.scrape_targets)
    except ServerMissingError as missing:
        pytest.skip(str(missing))
    yield prometheus
    prometheus.close()


@pytest.mark.slow
def test_every_query_of_the_dashboard_finds_a_run_that_lost_a_worker(
    tiny: TrainConfig, head: Head, prometheus: Prometheus, tmp_path: Path
) -> None:
    config = replace(tiny, num_workers=2, max_iters=1_000_000, eval_interval=50, checkpoint_interval=50, log_interval=5)
    command = [sys.executable, "-m", "orchestrator", "train"]
    command += [f"--{key}={value}" for key, value in asdict(config).items()]
    environment = ENVIRONMENT | QUICK | TRACKED | {"RAY_ADDRESS": head.address}
    said = tmp_path / "run.log"
    with said.open("w") as file:
        run = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
    try:
        check_query_for_mfu(head, prometheus)  # while the run starts
        until(lambda: prometheus.query("ray_orchestrator_upload_seconds > 0"))
        head.workers()[0].send_signal(signal.SIGKILL)
        until(lambda: prometheus.query('ray_orchestrator_restarts_total{cause="worker_lost"} == 1'))

        asked = [query for query in queries("run") if "_mfu{" not in query]  # which a CPU has not
        assert len(asked) > 15
        for query in asked:
            until(lambda query=query: prometheus.query(query), query)
        until(lambda: prometheus.query('ray_orchestrator_workers{state="now", ray_train_run_name="run"} == 2'), "now")
        (iteration,) = until(lambda: prometheus.query('ray_orchestrator_iteration{ray_train_run_name="run"}'))

        (job,) = (each for each in answer(head, "/api/jobs/") if each["metadata"].get("out_dir") == config.out_dir)
        assert job["metadata"]["program"] == "nanogpt-orchestrator"
        (train_run,) = answer(head, "/api/train/v2/runs/v1")["train_runs"]
        assert train_run["name"] == "run" == Path(config.out_dir).name
        assert train_run["id"] == iteration["metric"]["ray_train_run_id"]
        assert train_run["run_settings"]["train_loop_config"]["checkpoint_interval"] == 50
    finally:
        run.send_signal(signal.SIGINT)
        run.wait(timeout=60)
    assert run.returncode == 130, said.read_text()


def check_query_for_mfu(head: Head, prometheus: Prometheus) -> None:
    """Let a driver tell of a GPU's step, which this machine cannot take, and look for its MFU."""
    ray.init(address=head.address, logging_level="ERROR")
    metrics = RayMetrics("on-a-gpu", "id", 1, Ledger())
    step = Step(iter=7, loss=3.0, lr=1e-3, dt_s=0.1, mfu=0.4, tflops=125.0, tokens_per_s=1e5)
    metrics.write(Stamped(step, time.time(), "a"))
    (query,) = (query for query in queries("on-a-gpu") if "_mfu{" in query)
    try:
        until(lambda: metrics.flush() or prometheus.query(query))
        assert prometheus.query(query)[0]["value"][1] == "0.4"
    finally:
        ray.shutdown()


def until(found: Callable[[], Any], what: str = "") -> Any:
    """Return the value of a call once it has one; what: is looked for."""
    deadline_s = time.monotonic() + FOUND_S
    while not (value := found()):
        assert time.monotonic() < deadline_s, what
        time.sleep(0.3)
    return value


def answer(head: Head, path: str) -> Any:
    with urllib.request.urlopen(head.dashboard + path, timeout=FOUND_S) as response:
        return json.load(response)
