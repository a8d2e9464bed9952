"""How an attempt begins and ends: what loop.py opens before the first step, and what it returns."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.config import TrainConfig
from orchestrator.data.order import Sampling


@dataclass(frozen=True)
class Outcome:
    """How a call of `train` ended: at max_iters, or stopped before. preempted: because a machine is taken away."""

    iter_num: int
    best_val_loss: float
    stopped: bool = False
    preempted: bool = False


GO_ON, STOP, LEAVE = range(3)  # answers to whether the loop goes on; the highest of all ranks' counts


def sampling_of(config: TrainConfig) -> Sampling:
    """Return how batches are drawn under this config."""
    return Sampling(
        config.seed, config.batch_size, config.block_size, config.gradient_accumulation_steps, config.sampling
    )
