"""One, two and three processes train the same model on the same data, also where micro-steps do not divide evenly."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from orchestrator.config import TrainConfig
from tests.conftest import Undisturbed

WORLD_SIZES = (1, 2, 3)  # of 4 micro-steps, 3 processes do 2, 1 and 1


def test_the_mean_gradient_does_not_depend_on_the_number_of_workers(
    tiny: TrainConfig, undisturbed: Undisturbed
) -> None:
    one_step = replace(tiny, max_iters=1)
    moments = [undisturbed(one_step, size).optimizer for size in WORLD_SIZES]
    for name, tensor in moments[0].items():  # exp_avg is a tenth of the first gradient
        for other in moments[1:]:
            torch.testing.assert_close(other[name], tensor, rtol=1e-4, atol=1e-7)


@pytest.mark.slow
def test_losses_agree_on_any_number_of_workers(tiny: TrainConfig, undisturbed: Undisturbed) -> None:
    """24 iterations at a high learning rate; only the order of summation differs, about 1e-7 of each sum."""
    losses = [undisturbed(tiny, size).val_loss for size in WORLD_SIZES]
    assert losses == pytest.approx([losses[0]] * 3, abs=1e-4)
