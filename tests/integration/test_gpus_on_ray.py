"""Nodes with GPUs: what their workers are started with, and GPUs that PyTorch cannot use, as with a CPU build of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from orchestrator.config import TrainConfig
from orchestrator.controller import spares
from orchestrator.driver.launch import launch
from orchestrator.errors import UserError
from orchestrator.worker.environment import DEFAULTS
from orchestrator.worker.job import Job
from orchestrator.worker.run import run_worker
from tests.support.clusters import small_cluster
from tests.support.ports import free_ports, wait_for_port

pytestmark = pytest.mark.filterwarnings("default")  # Ray and its parts warn of themselves
cpus_only = pytest.mark.skipif(torch.cuda.is_available(), reason="PyTorch can use the GPUs here")


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Join a cluster that says it has two GPUs, as one driver after another does."""
    with small_cluster(num_gpus=2):
        yield


def environments(config: TrainConfig, folder: Path) -> list[dict[str, str]]:
    """Train, and return the variables of each rank; `runtime_env` and `gpu_ids` are as Ray tells them."""
    folder.mkdir()

    def worker(job: Job) -> dict[str, Any]:
        rank = ray.train.get_context().get_world_rank()
        told = {"runtime_env": ray.get_runtime_context().get_runtime_env_string(), "gpu_ids": str(ray.get_gpu_ids())}
        environment = {**os.environ, **told}
        (folder / f"{rank}").write_text(json.dumps(environment))
        return run_worker(job)

    launch(config, worker)
    return [json.loads(path.read_text()) for path in sorted(folder.iterdir())]


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize(("visible", "warm_spares"), [("0", True), ("", False)])
def test_workers_get_the_drivers_variables_and_their_own_gpus(
    tiny: TrainConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    visible: str,
    warm_spares: bool,
) -> None:
    caplog.set_level("INFO")
    passed = {"NCCL_DEBUG": "WARN", "TORCH_SHOW_CPP_STACKTRACES": "0", "CUDA_DEVICE_MAX_CONNECTIONS": "16"}
    kept = {"CUDA_VISIBLE_DEVICES": visible, "CUDA_HOME": "/here", "NCCL_SOCKET_IFNAME": "here0", "TORCH_HOME": "/here"}
    for name, value in {**passed, **kept}.items():
        monkeypatch.setenv(name, value)
    config = replace(tiny, num_workers=2, gpus_per_worker=1.0, warm_spares=warm_spares, max_iters=2)
    workers = environments(config, tmp_path / "environments")
    assert [environment["gpu_ids"] for environment in workers] == ["[0]", "[1]"]
    told = [text for text in caplog.messages if text.startswith("workers are started with")]
    assert len(told) == 1
    assert "NCCL_DEBUG=WARN" in told[0]
    for environment in workers:
        assert {name: environment.get(name) for name in {**DEFAULTS, **passed}} == {**DEFAULTS, **passed}
        assert environment["CUDA_VISIBLE_DEVICES"] == "0,1", "as Ray shares them out on a node"
        assert not {"CUDA_HOME", "NCCL_SOCKET_IFNAME", "TORCH_HOME"} & environment.keys()
        assert not warm_spares or environment["runtime_env"] == spares.first_environment(), "or none starts warm"


@cpus_only
@pytest.mark.usefixtures("cluster")
def test_a_gpu_that_pytorch_cannot_use_is_a_mistake(tiny: TrainConfig) -> None:
    config = replace(tiny, device="cuda", num_workers=2)
    with pytest.raises(UserError, match=r"Ray gives workers a GPU there, but PyTorch .* finds none: .*--device=cpu"):
        launch(config)
    assert not list(Path(config.out_dir).glob("checkpoint_*"))


@cpus_only
@pytest.mark.slow
def test_on_the_command_line_it_is_exit_code_2_and_not_resubmitted(tiny: TrainConfig, tmp_path: Path) -> None:
    (port,) = free_ports(1)
    program = str(Path(sys.executable).with_name("ray"))
    start = [program, "start", "--head", f"--port={port}", "--num-cpus=2", "--num-gpus=2", "--include-dashboard=false"]
    with (tmp_path / "head.log").open("wb") as log:
        head = subprocess.Popen([*start, "--block", "--object-store-memory=80000000"], stdout=log, stderr=log)
    try:
        flags = [f"--{key}={value}" for key, value in asdict(replace(tiny, device="cuda", resubmit=True)).items()]
        environment = {**os.environ, "RAY_ADDRESS": f"127.0.0.1:{port}"}
        command = [sys.executable, "-m", "orchestrator", "train", *flags]
        wait_for_port(port, head, tmp_path / "head.log")
        done = subprocess.run(command, env=environment, timeout=240, capture_output=True, check=False, text=True)
    finally:
        head.terminate()
        head.wait(60)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("error: node ") == 1, done.stderr
    assert "finds none: " in done.stderr
    assert "Install a PyTorch with CUDA there" in done.stderr
    assert "Ray has failed" not in done.stderr
    assert "Traceback" not in done.stderr
