"""Mistakes and damage that only a cluster shows, on the real command line."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from orchestrator.checkpoint.snapshot import tensors_equal
from orchestrator.config import TrainConfig
from tests.conftest import Undisturbed, final_state, train_with_torchrun

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


def test_more_workers_than_the_cluster_can_give(tiny: TrainConfig) -> None:
    cpus = os.cpu_count() or 1
    config = replace(tiny, num_workers=cpus + 1, gradient_accumulation_steps=cpus + 1, cpus_per_worker=1.0)
    done = orchestrator_train(config)
    assert done.returncode == 2, done.stderr
    assert f"error: num_workers={cpus + 1} with 1 CPU and 0 GPU each is more than the cluster can give" in done.stderr
    assert f"it has {cpus} CPU and 0 GPU on 1 node(s), room for {cpus}. Lower --num_workers" in done.stderr
    assert "Traceback" not in done.stderr
    assert not Path(config.out_dir).exists()


def test_cluster_that_does_not_answer(tiny: TrainConfig) -> None:
    done = orchestrator_train(tiny, RAY_ADDRESS="127.0.0.1:9")
    assert done.returncode == 2, done.stderr
    assert "error: RAY_ADDRESS=127.0.0.1:9: no Ray cluster answers there" in done.stderr
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
