"""LaneTraining: gradients are summed in an order that does not depend on the number of ranks.

Every lane adds up its micro-steps, from zero; the lanes are added in one fixed tree (lanes.py). A rank adds its own
lanes as far as the tree goes. While the last micro-step's backward pass runs, the ranks exchange these sums, piece by
piece: each receives one chunk of every rank's sums, finishes the tree there, and hands the result to all.

Knows neither Ray, checkpoints nor the loop.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from orchestrator.config import TrainConfig
from orchestrator.distributed.exchange import Exchange
from orchestrator.distributed.flat_gradient import FlatGradient
from orchestrator.distributed.gradients import clip_gradients
from orchestrator.distributed.lanes import Lanes, wait_on_device
from orchestrator.distributed.numerics import compiled
from orchestrator.distributed.world import World


class LaneTraining:
    """A whole replica on every rank. W = 1 goes the same way as any other number of ranks."""

    def __init__(self, model: nn.Module, config: TrainConfig, world: World, lanes: Lanes) -> None:
        self._model = model
        self.net = compiled(model, config)
        mine = lanes.of_rank(world.rank, world.size)
        self.micro_steps = lanes.micro_steps_of(mine)
        self.weight = 1.0 / lanes.micro_steps
        self._gradient = FlatGradient(model, multiple_of=world.size)
        self._exchange = Exchange(self._gradient, world, lanes, config.backend)

        joins, _ = lanes.joins([(lane, lane + 1) for lane in mine])
        *self._ends, self._last_joins = [
            (lanes.micro_steps_of(range(lane, lane + 1))[-1], count) for lane, count in zip(mine, joins, strict=True)
        ]
        self._free = _buffers(lanes.held_sums(world.rank, world.size), self._gradient.flat)
        self._waiting: list[Tensor] = []  # sums of lanes that are done, in order

    def __call__(self, idx: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits and the loss of (B, T) token ids and targets."""
        logits, loss = self.net(idx, targets)
        return logits, loss

    @contextmanager
    def accumulate(self, micro_step: int) -> Iterator[None]:
        """Lend the context of a micro-step's forward and backward; behind the last one, gradients are the mean's."""
        last, joins = self._last_joins
        if micro_step == last:
            first_root = len(self._waiting) - joins
            joined, roots = self._waiting[first_root:], self._waiting[:first_root]
            self._exchange.begin(joined, roots)
            yield
            self._exchange.finish()
            self._free += self._waiting
            self._waiting = []
            return
        yield
        for end, joins in self._ends:
            if micro_step == end:
                self._put_aside(joins)

    def _put_aside(self, joins: int) -> None:
        """Add the sums of earlier lanes as far as the tree goes, let the sum wait, and begin the next lane at zero."""
        gradient = self._gradient.flat
        for _ in range(joins):
            self._free.append(self._waiting.pop())
            for piece in self._gradient.pieces:  # a whole sum from host memory may find no room on the device
                gradient[piece].add_(self._free[-1][piece].to(gradient.device, non_blocking=True))
        self._waiting.append(self._free.pop().copy_(gradient, non_blocking=True))
        gradient.zero_()

    def clip(self, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, grad_clip: float) -> Tensor:
        """Scale the gradient down to the norm grad_clip, unless that is 0; return the norm that it had."""
        return clip_gradients(self._model, optimizer, scaler, grad_clip)

    def zero_grad(self, optimizer: torch.optim.Optimizer) -> None:  # noqa: ARG002
        """Flush the gradients, where they lie: every lane begins with zeros, so that all begin alike."""
        self._gradient.flat.zero_()


def _buffers(count: int, like: Tensor) -> list[Tensor]:
    """Return buffers for sums that wait: on the device, or in pinned host memory where it has no room."""
    memory_bytes = torch.cuda.mem_get_info(like.device) if like.device.type == "cuda" else None  # free, and in all
    if memory_bytes and not wait_on_device(count * like.nbytes, like.nbytes, *memory_bytes):
        return [torch.empty(like.shape, dtype=like.dtype, pin_memory=True) for _ in range(count)]
    return [torch.empty_like(like) for _ in range(count)]
