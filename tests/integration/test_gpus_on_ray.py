"""GPUs that a cluster says it has, and that PyTorch cannot use: a CPU build of it on nodes with GPUs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from orchestrator.config import TrainConfig
from orchestrator.errors import UserError
from orchestrator.launch import launch
from tests.chaos.clusters import small_cluster
from tests.ports import free_ports, wait_for_port

pytestmark = [
    pytest.mark.filterwarnings("default"),  # Ray and its parts warn of themselves
    pytest.mark.skipif(torch.cuda.is_available(), reason="PyTorch can use the GPUs here"),
]


@pytest.fixture
def cluster() -> Iterator[None]:
    with small_cluster(num_gpus=2):
        yield


@pytest.mark.usefixtures("cluster")
def test_a_gpu_that_pytorch_cannot_use_is_a_mistake(tiny: TrainConfig) -> None:
    config = replace(tiny, device="cuda", num_workers=2)
    with pytest.raises(UserError, match=r"Ray gives workers a GPU there, but PyTorch .* finds none: .*--device=cpu"):
        launch(config)
    assert not list(Path(config.out_dir).glob("checkpoint_*"))


@pytest.mark.slow
def test_on_the_command_line_it_is_exit_code_2_and_not_resubmitted(tiny: TrainConfig, tmp_path: Path) -> None:
    (port,) = free_ports(1)
    ray = str(Path(sys.executable).with_name("ray"))
    start = [ray, "start", "--head", f"--port={port}", "--num-cpus=2", "--num-gpus=2", "--include-dashboard=false"]
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
