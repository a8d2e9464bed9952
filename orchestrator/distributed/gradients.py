"""What is done with a model's gradients once they are there. Knows no ranks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

NORM_BLOCK = 2**20  # elements


def clip_gradients(
    model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, grad_clip: float
) -> Tensor:
    """Scale the gradient down to the norm grad_clip, unless that is 0; return the norm that it had."""
    parameters = list(model.parameters())
    if grad_clip == 0.0:
        norm = norm_of(parameters)
        return norm / scaler.scale(torch.ones_like(norm))  # which the optimizer's step will divide by
    scaler.unscale_(optimizer)
    norm = norm_of(parameters)
    torch.nn.utils.clip_grads_with_norm_(parameters, grad_clip, norm)
    return norm


def norm_of(parameters: list[nn.Parameter]) -> Tensor:
    """Return the norm of the gradient: of blocks of 2**20 elements each, and then of the blocks' norms.

    A block's norm has the same bits wherever its elements lie and whoever computes it. So ranks that each hold a part
    of the gradient, cut between blocks, can come to the same number as one that holds all of it.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    blocks = [block for gradient in gradients for block in torch.split(gradient.view(-1), NORM_BLOCK)]
    return torch.nn.utils.get_total_norm(blocks)
