"""How an attempt begins and ends: what loop.py opens before the first step, and what it returns."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from orchestrator.config import TrainConfig
from orchestrator.data.order import BatchOrder


@dataclass(frozen=True)
class Outcome:
    """How a call of `train` ended: at max_iters, or stopped before. preempted: because a machine is taken away."""

    iter_num: int
    best_val_loss: float
    stopped: bool = False
    preempted: bool = False


class StopRequest(IntEnum):
    """Whether the loop goes on. The highest of all ranks' requests counts."""

    NONE = 0
    STOP = 1
    PREEMPTED = 2  # the machine of a rank is taken away


def batch_order(config: TrainConfig) -> BatchOrder:
    """Return how batches are drawn under this config."""
    return BatchOrder(
        config.seed, config.batch_size, config.block_size, config.gradient_accumulation_steps, config.sampling
    )
