"""A run in lanes ends with the same bits on any number of ranks. Real gloo ranks, three and more of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from orchestrator.checkpoint.snapshot import Snapshot, tensors_equal
from orchestrator.config import TrainConfig
from tests.conftest import final_state
from tests.support import ranks


def trained(config: TrainConfig, size: int, folder: Path) -> Snapshot:
    config = replace(config, out_dir=str(folder / f"run-{size}"))
    ended = ranks.train(config, size, folder / f"{size}.log")
    assert ended.is_done, ended.said
    return final_state(config.out_dir)


@pytest.mark.parametrize("micro_steps", [8, 12])
def test_any_number_of_ranks_ends_with_the_same_bits(tiny: TrainConfig, tmp_path: Path, micro_steps: int) -> None:
    config = replace(tiny, gradient_accumulation_steps=micro_steps, lanes=8)
    alone, *others = [trained(config, size, tmp_path) for size in (1, 2, 3, 4)]
    for other in others:
        assert tensors_equal(other, alone)
        assert other.best_val_loss == alone.best_val_loss
