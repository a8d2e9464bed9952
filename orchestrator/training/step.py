"""Small parts of a training step: the learning rate, the seeds of dropout, the loss of the global batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from orchestrator.config import TrainConfig
from orchestrator.distributed.world import World
from orchestrator.training.lr_schedule import learning_rate


def set_learning_rate(optimizer: torch.optim.Optimizer, config: TrainConfig, iter_num: int) -> float:
    """Set the learning rate of an iteration and return it."""
    lr = learning_rate(config, iter_num)
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr


def seed_dropout(dropout: float, seed: int, iter_num: int, micro_step: int) -> None:
    """Begin a micro-step's dropout, where the model has any: nothing else is random in it, and seeding takes time."""
    if dropout > 0:
        torch.manual_seed(dropout_seed(seed, iter_num, micro_step))


def dropout_seed(seed: int, iter_num: int, micro_step: int) -> int:
    """Return the seed of a micro-step's dropout: no random state has to be saved, whoever computes it."""
    return int(np.random.SeedSequence((seed, iter_num, micro_step)).generate_state(1, np.uint64)[0])


def mean_over_ranks(losses: Sequence[float], micro_steps: range, config: TrainConfig, world: World) -> float:
    """Return the mean loss of the global batch; losses: of this rank's micro-steps.

    Each loss has its own place in the sum over ranks, so that the mean has the same bits on any number of ranks.
    """
    of_all = torch.zeros(config.gradient_accumulation_steps, dtype=torch.float64)
    of_all[list(micro_steps)] = torch.tensor(losses, dtype=torch.float64)
    return world.sum(of_all).mean().item()
