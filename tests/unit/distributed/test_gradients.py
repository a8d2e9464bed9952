"""The norm of the gradient, whatever is done with it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from orchestrator.distributed.gradients import clip_gradients


@pytest.mark.parametrize("is_scaled", [True, False])
@pytest.mark.parametrize("grad_clip", [0.0, 1e-3, 1e6])
def test_the_norm_is_that_of_the_loss_as_it_is(is_scaled: bool, grad_clip: float) -> None:
    torch.manual_seed(0)
    model, X = nn.Linear(5, 3), torch.randn(7, 5)
    model(X).square().mean().backward()
    expected = torch.cat([parameter.grad.flatten() for parameter in model.parameters()]).norm()
    model.zero_grad()
    optimizer = torch.optim.AdamW(model.parameters())
    scaler = torch.amp.GradScaler("cpu", enabled=is_scaled)
    scaler.scale(model(X).square().mean()).backward()
    norm = clip_gradients(model, optimizer, scaler, grad_clip)
    torch.testing.assert_close(norm, expected)
