"""One, two and three processes train the same model on the same data, also where micro-steps do not divide evenly.

As each number of workers has its own number of lanes here, they add up in another order each.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from orchestrator.checkpoint.snapshot import Snapshot
from orchestrator.config import TrainConfig
from tests.conftest import final_state
from tests.support import ranks

WORLD_SIZES = (1, 2, 3)  # of 4 micro-steps, 3 processes do 2, 1 and 1


def trained(config: TrainConfig, size: int, folder: Path) -> Snapshot:
    """Train with so many processes, and return the end of it."""
    config = replace(config, out_dir=str(folder / f"run-{size}"))
    ended = ranks.train(config, size, folder / f"{size}.log")
    assert ended.is_done, ended.said
    return final_state(config.out_dir)


def test_the_mean_gradient_does_not_depend_on_the_number_of_workers(tiny: TrainConfig, tmp_path: Path) -> None:
    moments = [trained(replace(tiny, max_iters=1), size, tmp_path).optimizer for size in WORLD_SIZES]
    assert [name for name in moments[0] if name.startswith("exp_avg.")]
    for name, tensor in moments[0].items():  # exp_avg is a tenth of the first gradient
        for other in moments[1:]:
            torch.testing.assert_close(other[name], tensor, rtol=1e-4, atol=1e-7)


@pytest.mark.slow
def test_losses_agree_on_any_number_of_workers(tiny: TrainConfig, tmp_path: Path) -> None:
    """24 iterations at a high learning rate; only the order of summation differs, about 1e-7 of each sum."""
    losses = [trained(tiny, size, tmp_path).val_loss for size in WORLD_SIZES]
    assert losses == pytest.approx([losses[0]] * 3, abs=1e-4)
