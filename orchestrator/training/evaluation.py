"""The loss on both splits, shared out to all ranks. Knows no state, and nobody who is told of it."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from orchestrator.config import TrainConfig
from orchestrator.data.dataset import Dataset
from orchestrator.distributed.device import autocast, to_device
from orchestrator.distributed.world import World


@torch.no_grad()
def evaluate(
    net: nn.Module,
    data: Dataset,
    config: TrainConfig,
    world: World,
    stop_request: Callable[[], int] = lambda: 0,
    stop: int = 0,
) -> tuple[dict[str, float], int]:
    """Return the mean loss per split over eval_iters batches, shared out to all ranks, and the request to stop, if any.

    The batches are the same at every evaluation, so two losses compare states, not batches; and each loss has its
    own place in the sum, so that the mean has the same bits on any number of ranks. As soon as a rank is asked to stop,
    all of them break off, and there are no losses. stop: the request on which they have agreed before, 0 for none.
    """
    net.eval()
    means = {}
    agreement = world.agree([stop])
    for split in ("train", "val"):
        mine: list[Tensor] = []  # they stay on the device until all are there: no batch waits for the one before
        for first in range(0, config.eval_iters, world.size):
            (stop,) = agreement.result()
            if stop:
                net.train()
                return {}, stop
            agreement = world.agree([stop_request()])  # answered while the batches are computed
            if (k := first + world.rank) < config.eval_iters:
                X, Y = to_device(data.batch(split, 0, k, evaluation=True), world.device)
                with autocast(config):
                    loss = net(X, Y)[1]
                mine.append(loss)
        losses = torch.zeros(config.eval_iters, dtype=torch.float64)
        if mine:
            losses[world.rank :: world.size] = torch.stack(mine).cpu().double()
        means[split] = world.sum(losses).mean().item()
    net.train()
    return means, agreement.result()[0]


def perplexity(val_loss: float, data: Dataset) -> dict[str, float]:
    """Return the perplexity of a validation loss (nats per token) and, where tokens are known, its bits per byte.

    Bits per byte compare models with different tokenizers: tokens are as long as they are in the whole split.
    """
    length_bytes = data.bytes_per_token("val")
    bits = {"bits_per_byte": val_loss / math.log(2) / length_bytes} if length_bytes else {}
    return {"perplexity": math.exp(val_loss), **bits}
