"""What the workers of a cluster are started with: the driver's environment, less what belongs to one machine."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray

from orchestrator.config import TrainConfig
from orchestrator.launch import launch
from orchestrator.recovery import spares
from orchestrator.worker import run_worker
from orchestrator.worker_environment import DEFAULTS
from tests.chaos.clusters import small_cluster

pytestmark = pytest.mark.filterwarnings("default")  # Ray and its parts warn of themselves


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Join a cluster that says it has two GPUs, as one driver after another does."""
    with small_cluster(num_gpus=2):
        yield


def environments(config: TrainConfig, folder: Path) -> list[dict[str, str]]:
    """Train, and return the variables of each rank; `runtime_env` is what Ray says that it was started with."""
    folder.mkdir()

    def worker(job: dict[str, Any]) -> dict[str, Any]:
        rank = ray.train.get_context().get_world_rank()
        environment = {**os.environ, "runtime_env": ray.get_runtime_context().get_runtime_env_string()}
        (folder / f"{rank}").write_text(json.dumps(environment))
        return run_worker(job)

    launch(config, worker)
    return [json.loads(path.read_text()) for path in sorted(folder.iterdir())]


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize(("visible", "warm_spares"), [("0", True), pytest.param("", False, marks=pytest.mark.slow)])
def test_workers_get_the_drivers_variables_and_their_own_gpus(
    tiny: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: str, warm_spares: bool
) -> None:
    passed = {"NCCL_DEBUG": "WARN", "TORCH_SHOW_CPP_STACKTRACES": "0", "CUDA_DEVICE_MAX_CONNECTIONS": "16"}
    kept = {"CUDA_VISIBLE_DEVICES": visible, "CUDA_HOME": "/here", "NCCL_SOCKET_IFNAME": "here0", "TORCH_HOME": "/here"}
    for name, value in {**passed, **kept}.items():
        monkeypatch.setenv(name, value)
    config = replace(tiny, num_workers=2, gpus_per_worker=1.0, warm_spares=warm_spares, max_iters=2)
    workers = environments(config, tmp_path / "environments")
    assert len(workers) == 2
    for environment in workers:
        assert {name: environment.get(name) for name in {**DEFAULTS, **passed}} == {**DEFAULTS, **passed}
        assert environment["CUDA_VISIBLE_DEVICES"] == "0,1", "as Ray shares them out on a node"
        assert not {"CUDA_HOME", "NCCL_SOCKET_IFNAME", "TORCH_HOME"} & environment.keys()
        assert not warm_spares or environment["runtime_env"] == spares.first_environment(), "or none starts warm"
