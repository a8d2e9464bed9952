"""The parts of a training step that depend on its iteration alone: the learning rate and the seeds of dropout."""

from __future__ import annotations

import numpy as np
import torch

from orchestrator.config import TrainConfig
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
