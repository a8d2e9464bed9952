"""What all tests share: no GPU, no token files in the home folder, a tiny dataset and tiny settings."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # or a local cluster writes a token into the home folder
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

from orchestrator.checkpoint.snapshot import Snapshot
from orchestrator.checkpoint.store import CheckpointStore
from orchestrator.config import TrainConfig
from orchestrator.data.prepare import PrepareConfig, prepare


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with the dataset `tiny`: some English of the Python manual, by characters."""
    from pydoc_data.topics import topics

    folder = tmp_path_factory.mktemp("data")
    text = folder / "text.txt"
    text.write_text("\n".join(topics[name] for name in sorted(topics))[:100_000], encoding="utf-8")
    prepare(PrepareConfig("tiny", text=(str(text),), tokenizer="char", data_dir=str(folder)))
    return str(folder)


@pytest.fixture
def tiny(data_dir: str, tmp_path: Path) -> TrainConfig:
    """Settings of a run that takes milliseconds per iteration; dropout is on, so that its seeds matter."""
    return TrainConfig(
        out_dir=str(tmp_path / "run"),
        data_dir=data_dir,
        dataset="tiny",
        n_layer=2,
        n_head=2,
        n_embd=32,
        block_size=16,
        batch_size=4,
        gradient_accumulation_steps=4,
        dropout=0.1,
        learning_rate=1e-2,
        min_lr=1e-3,
        warmup_iters=2,
        lr_decay_iters=24,
        max_iters=24,
        eval_interval=8,
        eval_iters=4,
        checkpoint_interval=4,
        device="cpu",
        compile=False,
        cpus_per_worker=0.5,
    )


Undisturbed = Callable[[TrainConfig, int], Snapshot]


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """The final state of a tiny run that nothing happens to, with torchrun instead of Ray, for any world size."""
    known: dict[tuple[int, int], Snapshot] = {}

    def final(config: TrainConfig, world_size: int) -> Snapshot:
        key = (world_size, config.max_iters)
        if key not in known:
            out_dir = str(tmp_path_factory.mktemp("undisturbed") / "run")
            train_with_torchrun(replace(config, out_dir=out_dir), world_size)
            known[key] = final_state(out_dir)
        return known[key]

    return final


def train_with_torchrun(config: TrainConfig, world_size: int) -> None:
    flags = [f"--{key}={value}" for key, value in asdict(config).items()]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world_size}"]
    done = subprocess.run([*command, "-m", "orchestrator.loop", *flags], timeout=120, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()


def final_state(out_dir: str) -> Snapshot:
    store = CheckpointStore(out_dir)
    return store.read(store.select("latest"))
