"""A run of four iterations, and data in which two characters are exchanged."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.config import TrainConfig
from orchestrator.distributed.device import resolve
from orchestrator.distributed.world import World
from orchestrator.loop import train


@pytest.fixture
def small(tiny: TrainConfig) -> TrainConfig:
    """Settings of a run of four iterations in one process, with checkpoints at two and four."""
    return replace(
        tiny, max_iters=4, checkpoint_interval=2, eval_interval=2, num_workers=1, gradient_accumulation_steps=1
    )


@pytest.fixture
def first(small: TrainConfig) -> TrainConfig:
    """That run, ended."""
    for max_iters in (2, 4):  # the last state is always saved, others only if the one before has been
        train(resolve(replace(small, max_iters=max_iters)), World())
    return small


@pytest.fixture
def other_data(data_dir: str, tmp_path: Path) -> str:
    """The same dataset with two characters exchanged: as many, and all tokens fit."""
    folder = tmp_path / "other"
    shutil.copytree(Path(data_dir, "tiny"), folder / "tiny")
    meta = json.loads((folder / "tiny" / "meta.json").read_text())
    chars = list(meta["tokenizer"]["chars"])
    chars[3], chars[5] = chars[5], chars[3]
    meta["tokenizer"]["chars"] = "".join(chars)
    (folder / "tiny" / "meta.json").write_text(json.dumps(meta))
    return str(folder)
