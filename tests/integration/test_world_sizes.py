"""One, two and three processes train the same model on the same data, also where micro-steps do not divide evenly."""

from __future__ import annotations

import torch

from orchestrator.checkpoint.snapshot import Snapshot
from orchestrator.config import TrainConfig
from tests.conftest import Undisturbed

LOSS_TOLERANCE = 1e-4  # of a loss near 3 after 24 iterations at a high learning rate; sums are made in another order


def test_losses_agree_on_any_number_of_workers(tiny: TrainConfig, undisturbed: Undisturbed) -> None:
    states = {size: undisturbed(tiny, size) for size in (1, 2, 3)}  # 4 micro-steps: 3 workers do 2, 1 and 1
    for size in (2, 3):
        assert states[size].val_loss is not None
        assert abs(states[size].val_loss - states[1].val_loss) < LOSS_TOLERANCE  # type: ignore[operator]
        assert largest_difference(states[size], states[1]) < 1e-3


def largest_difference(a: Snapshot, b: Snapshot) -> float:
    return max(torch.max(torch.abs(a.model[name] - b.model[name])).item() for name in a.model)
