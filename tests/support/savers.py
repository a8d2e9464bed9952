"""Shared by the tests of a Saver: an optimizer step on random gradients, and a wait for the copy in the background."""

from __future__ import annotations

import torch

from orchestrator.checkpoint.save.saver import Saver
from orchestrator.checkpoint.state import TrainState


def step(state: TrainState) -> None:
    torch.manual_seed(1)
    for parameter in state.model.parameters():
        parameter.grad = torch.randn_like(parameter)
    state.optimizer.step()


def settle(saver: Saver) -> None:
    """Wait for what the copier has been given."""
    assert saver._memory.copier.last
    saver._memory.copier.last.result(10)
