"""Clusters that can become larger: what can be brought is waited for, and what cannot is refused at once."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray

from orchestrator.checkpoint.snapshot import tensors_equal
from orchestrator.cluster import autoscaler
from orchestrator.cluster.join import StoppedError
from orchestrator.cluster.room import wait_for_room
from orchestrator.config import TrainConfig
from orchestrator.driver.launch import launch
from orchestrator.errors import ConfigError
from tests.conftest import Undisturbed, final_state
from tests.support.autoscaling import autoscaling_cluster
from tests.support.faults import NodeKilled, worker_with
from tests.support.ray_runs import causes
from tests.support.runs import ledger_in

pytestmark = [
    pytest.mark.slow,  # machines come after some ten seconds
    pytest.mark.filterwarnings("default"),  # Ray starts in this process and its parts warn of themselves
]

SMALL = {"CPU": 1, "object_store_memory": 80 * 2**20}


@pytest.fixture
def cluster(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A head without workers, and an autoscaler that may start nodes of the types that a test asks for."""
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:9")  # no dashboard runs: Ray need not wait for one
    with autoscaling_cluster(request.param) as address:
        ray.init(address=address, logging_level="ERROR", log_to_driver=False)
        yield
        ray.shutdown()


def node_type(max_workers: int, **resources: Any) -> dict[str, Any]:
    return {"resources": {**SMALL, **resources}, "node_config": {}, "min_workers": 0, "max_workers": max_workers}


def wait(config: TrainConfig) -> float:
    return wait_for_room(config, may_wait=False, stop=threading.Event(), on_wait=lambda: None)


def alive() -> int:
    return sum(node["Alive"] for node in ray.nodes())


@pytest.mark.parametrize("cluster", [{"cpu": node_type(2)}], indirect=True)
@pytest.mark.usefixtures("cluster")
def test_what_can_never_be_had_is_refused_before_anything_is_started(tiny: TrainConfig) -> None:
    assert autoscaler.version() == 2
    refused = [
        (replace(tiny, num_workers=3, cpus_per_worker=1.0), "num_workers=3 with 1 CPU and 0 GPU each"),
        (replace(tiny, num_workers=1, cpus_per_worker=8.0), "num_workers=1 with 8 CPU and 0 GPU each"),
        (replace(tiny, gpus_per_worker=1.0, device="cuda"), "num_workers=1 with 0.5 CPU and 1 GPU each"),
    ]
    for config, asked in refused:
        with pytest.raises(ConfigError) as error:
            launch(config)
        assert asked in str(error.value)
        assert "its autoscaler cannot start machines for the rest" in str(error.value)
        assert not Path(config.out_dir).exists()
    assert alive() == 1, "nothing was started for them"
    assert wait(replace(tiny, num_workers="2-8", cpus_per_worker=1.0, device="cuda")) == 0.0, "the least is enough"
    assert alive() == 3


@pytest.mark.parametrize("cluster", [{"gpu": node_type(1, GPU=1)}], indirect=True)
@pytest.mark.usefixtures("cluster")
def test_gpus_that_are_not_there_yet_count_as_gpus(tiny: TrainConfig) -> None:
    assert wait(replace(tiny, device="cuda")) == 1.0


@pytest.mark.parametrize("cluster", [{"cpu": node_type(2)}], indirect=True)
@pytest.mark.usefixtures("cluster")
def test_waiting_can_be_stopped(tiny: TrainConfig) -> None:
    stop = threading.Event()
    stop.set()
    with pytest.raises(StoppedError):
        wait_for_room(replace(tiny, cpus_per_worker=1.0), may_wait=False, stop=stop, on_wait=lambda: None)


@pytest.mark.parametrize("cluster", [{"cpu": node_type(2)}], indirect=True)
@pytest.mark.usefixtures("cluster")
def test_a_run_waits_for_machines_and_one_that_is_lost_is_replaced(
    tiny: TrainConfig, tmp_path: Path, undisturbed: Undisturbed, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    config = replace(
        tiny, num_workers=2, cpus_per_worker=1.0, max_iters=400, eval_interval=100, checkpoint_interval=100
    )
    fault = NodeKilled("forward", 133, 1, tmp_path / "fired")
    launch(config, worker_with(fault))
    assert fault.marker.exists(), "the fault did not fire"
    assert "there is room for 0 of at least 2 workers with 1 CPU and 0 GPU each" in caplog.text
    assert causes(config.out_dir) == ["node_lost"]
    lost = [node for node in ray.nodes() if not node["Alive"]]
    assert len(lost) == 1
    assert alive() == 3, "another one was started in its place"
    ledger = ledger_in(config.out_dir)
    assert ledger.seconds["waiting"] > 0
    assert [incident.steps_repeated for incident in ledger.incidents] == [0]
    assert tensors_equal(final_state(config.out_dir), undisturbed(config, 2))
