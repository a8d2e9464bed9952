"""In a nanoGPT checkout, whose modules have the names of ours: our `model` is the one beside our code."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from orchestrator.config import TrainConfig
from tests.conftest import final_state

CLONE = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "RAY_ADDRESS": "local", "PYTHONPATH": str(CLONE)}


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with nanoGPT's names; whoever imports one of its modules ends."""
    folder = tmp_path / "nanoGPT"
    for name in ("data", "config", "out"):
        (folder / name).mkdir(parents=True)
    for name in ("model", "train", "sample", "bench", "configurator"):
        (folder / f"{name}.py").write_text('raise SystemExit("this is nanoGPT\'s")')
    return folder


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *words]
    return subprocess.run(
        command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=240, check=False
    )


def flags_of(config: TrainConfig) -> list[str]:
    return [f"--{key}={value}" for key, value in asdict(config).items()]


def test_a_plain_run_and_a_sample(checkout: Path, tiny: TrainConfig) -> None:
    done = run(checkout, "-m", "orchestrator.loop", *flags_of(replace(tiny, max_iters=2)))
    assert done.returncode == 0, done.stderr
    assert final_state(tiny.out_dir).iter_num == 2
    done = run(checkout, "-m", "orchestrator", "sample", f"--out_dir={tiny.out_dir}", "--max_new_tokens=9")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_torchrun(checkout: Path, tiny: TrainConfig) -> None:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "orchestrator.loop"]
    done = run(checkout, *torchrun, *flags_of(replace(tiny, max_iters=2)))
    assert done.returncode == 0, done.stderr
    assert final_state(tiny.out_dir).iter_num == 2


@pytest.mark.slow
def test_workers_of_ray_which_get_this_folder_on_their_path(checkout: Path, tiny: TrainConfig) -> None:
    done = run(checkout, "-m", "orchestrator", "train", *flags_of(replace(tiny, num_workers=2, max_iters=2)))
    assert done.returncode == 0, done.stderr
    assert final_state(tiny.out_dir).iter_num == 2


def test_another_model_that_was_imported_before_is_named(checkout: Path) -> None:
    (checkout / "model.py").write_text("GPT = None")
    done = run(checkout, "-c", "import model, orchestrator")
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"ImportError: another module named `model` was imported before, from {checkout}/model.py")


def test_ours_may_be_imported_before(checkout: Path) -> None:
    (checkout / "model.py").unlink()
    done = run(
        checkout, "-c", "import model, orchestrator; from orchestrator.checkpoint import state; print(model.GPT)"
    )
    assert done.returncode == 0, done.stderr
    assert "model." in done.stdout
