"""How ranks share the work of one model, as the loop sees it. Knows neither Ray, checkpoints nor the loop."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor, nn

from orchestrator.config import TrainConfig
from orchestrator.distributed.ddp import DDPTraining
from orchestrator.distributed.lane_training import LaneTraining
from orchestrator.distributed.lanes import Lanes
from orchestrator.distributed.world import World


class Parallelism(Protocol):
    """A model as the loop trains it on all ranks.

    net: the model for forward passes without gradients, compiled if config.compile.
    micro_steps: those of an iteration that this rank computes, numbered over all ranks.
    weight: the factor of a micro-step's loss with which the gradients come to the mean over all micro-steps.
    """

    net: nn.Module
    micro_steps: range
    weight: float

    def __call__(self, idx: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits and the loss of (B, T) token ids and targets."""

    def accumulate(self, micro_step: int) -> AbstractContextManager[None]:
        """Return the context of a micro-step's forward and backward; behind the last one, gradients are the mean's."""

    def clip(self, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, grad_clip: float) -> Tensor:
        """Scale the gradient down to the norm grad_clip, unless that is 0; return the norm that it had."""

    def zero_grad(self, optimizer: torch.optim.Optimizer) -> None:
        """Flush the gradients."""


def parallelize(model: nn.Module, config: TrainConfig, world: World, lanes: int) -> Parallelism:
    """Return the model as all ranks train it together: in so many lanes, or with DDP's order of summation for 0."""
    if not lanes:
        return DDPTraining(model, config, world)
    return LaneTraining(model, config, world, Lanes(lanes, config.gradient_accumulation_steps))
