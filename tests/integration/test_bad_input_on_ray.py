"""Mistakes and damage that only a cluster shows, on the real command line."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from dataclasses import asdict, replace
from http.server import HTTPServer, SimpleHTTPRequestHandler
from pathlib import Path

import pytest

from orchestrator.checkpoint.snapshot import tensors_equal
from orchestrator.config import TrainConfig
from orchestrator.host.machine import usable_cpus
from tests.conftest import Undisturbed, final_state, train_with_torchrun
from tests.support.ports import free_ports

pytestmark = pytest.mark.filterwarnings("default")  # Ray and its parts warn of themselves


def orchestrator_train(config: TrainConfig, **environment: str) -> subprocess.CompletedProcess[str]:
    flags = [f"--{key}={value}" for key, value in asdict(config).items()]
    return subprocess.run(
        [sys.executable, "-m", "orchestrator", "train", *flags],
        env={**os.environ, "RAY_ADDRESS": "local", **environment},
        timeout=240,
        capture_output=True,
        check=False,
        text=True,
    )


@pytest.mark.slow
def test_more_workers_than_the_cluster_can_give(tiny: TrainConfig) -> None:
    cpus = usable_cpus()
    config = replace(tiny, num_workers=cpus + 1, gradient_accumulation_steps=cpus + 1, cpus_per_worker=1.0)
    done = orchestrator_train(config)
    assert done.returncode == 2, done.stderr
    assert f"error: num_workers={cpus + 1} with 1 CPU and 0 GPU each is more than the cluster can give" in done.stderr
    assert f"it has {cpus} CPU and 0 GPU on 1 node(s), room for {cpus}. Lower --num_workers" in done.stderr
    assert "Traceback" not in done.stderr
    assert not Path(config.out_dir).exists()


def test_cluster_that_does_not_answer(tiny: TrainConfig) -> None:
    (port,) = free_ports(1)
    done = orchestrator_train(tiny, RAY_ADDRESS=f"127.0.0.1:{port}")
    assert done.returncode == 2, done.stderr
    assert f"error: RAY_ADDRESS=127.0.0.1:{port}: no Ray cluster answers there" in done.stderr
    assert not Path(tiny.out_dir).exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "address", ["http://127.0.0.1:8265", "somehost", "nowhere.invalid:6379", "a..b:6379", "auto", "x"]
)
def test_what_is_no_address(tiny: TrainConfig, address: str) -> None:
    done = orchestrator_train(tiny, RAY_ADDRESS=address)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: RAY_ADDRESS={address}: ")
    assert not Path(tiny.out_dir).exists()


@pytest.mark.slow
def test_another_server_than_rays(tiny: TrainConfig) -> None:
    with HTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        done = orchestrator_train(tiny, RAY_ADDRESS=f"127.0.0.1:{server.server_port}")
        server.shutdown()
    assert done.returncode == 2, done.stderr
    assert "what listens there does not speak as one does" in done.stderr
    assert not Path(tiny.out_dir).exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({"RAY_TRAIN_V2_ENABLED": "0"}, "RAY_TRAIN_V2_ENABLED=0 is set to 1: training needs it"),
        ({"TMPDIR": f"/tmp{'/.' * 50}"}, "is too long for Ray's sockets"),
        ({"TMPDIR": "/nowhere"}, "TMPDIR=/nowhere is no folder: Ray's files go to"),
        ({"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}, ""),
        ({"CUDA_VISIBLE_DEVICES": ""}, ""),
        ({"RAY_ADDRESS": ""}, ""),
    ],
)
def test_what_is_left_in_a_shell_ends_no_run(tiny: TrainConfig, environment: dict[str, str], told: str) -> None:
    done = orchestrator_train(replace(tiny, num_workers=1, max_iters=2), **environment)
    assert done.returncode == 0, done.stderr
    assert told in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("variable", ["RAY_JOB_CONFIG_JSON_ENV_VAR", "RAY_RUNTIME_ENV_HOOK", "RAY_OVERRIDE_RESOURCES"])
def test_what_ray_cannot_read_is_named(tiny: TrainConfig, variable: str) -> None:
    done = orchestrator_train(tiny, **{variable: "no.such"})
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: Ray could not be started on this machine: ")
    assert variable in line
    assert not Path(tiny.out_dir).exists()


@pytest.mark.slow
def test_damaged_newest_checkpoint_costs_one_interval_and_no_bit(tiny: TrainConfig, undisturbed: Undisturbed) -> None:
    train_with_torchrun(replace(tiny, max_iters=16), world_size=2)
    (newest,) = Path(tiny.out_dir).glob("checkpoint_00000016_*")
    file = newest / "optimizer-00001-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-100])

    done = orchestrator_train(replace(tiny, num_workers=2))
    assert done.returncode == 0, done.stderr
    said = done.stdout + done.stderr
    assert f"checkpoint {newest.name} is not whole, falling back to the one before" in said
    assert "checkpoint_00000012_" in said
    assert "iter 12:" in said
    assert "iter 11:" not in said
    assert tensors_equal(final_state(tiny.out_dir), undisturbed(tiny, 2))
