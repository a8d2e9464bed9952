"""DDPTraining: DDP averages the gradients, in an order of summation that depends on the number of ranks.

Gradients are averaged where they lie, in DDP's buckets, and exist nowhere else: every micro-step adds to the buckets,
as long as nobody sets a gradient to None. Annotations are read when this is imported: DDP compares those of a hook with
its own types. Knows neither Ray, checkpoints nor the loop.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from orchestrator.config import TrainConfig
from orchestrator.distributed.device import autocast
from orchestrator.distributed.gradients import clip_gradients
from orchestrator.distributed.numerics import compiled
from orchestrator.distributed.world import World


class DDPTraining:
    """A whole replica on every rank; DDP averages the gradients. A single rank needs no DDP."""

    def __init__(self, model: nn.Module, config: TrainConfig, world: World) -> None:
        self._model, self._config, self._device = model, config, world.device
        self.net = compiled(model, config)
        self.micro_steps = range(world.rank, config.gradient_accumulation_steps, world.size)
        self.weight = world.size / config.gradient_accumulation_steps  # DDP divides by world.size
        self._ddp = wrap(self.net, world) if world.size > 1 else None
        if self._ddp:
            self.warm_up(self._ddp)

    def __call__(self, idx: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits and the loss of (B, T) token ids and targets."""
        logits, loss = (self._ddp or self.net)(idx, targets)
        return logits, loss

    def accumulate(self, micro_step: int) -> AbstractContextManager[None]:
        """Return the context of a micro-step's forward and backward; in the last one, DDP averages."""
        is_last = micro_step == self.micro_steps[-1]
        return self._ddp.no_sync() if self._ddp and not is_last else nullcontext()

    def clip(self, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, grad_clip: float) -> Tensor:
        """Scale the gradient down to the norm grad_clip, unless that is 0; return the norm that it had."""
        return clip_gradients(self._model, optimizer, scaler, grad_clip)

    def zero_grad(self, optimizer: torch.optim.Optimizer) -> None:
        """Flush the gradients; those in DDP's buckets stay there as zeros, or they would exist twice."""
        optimizer.zero_grad(set_to_none=self._ddp is None)

    def warm_up(self, ddp: DistributedDataParallel) -> None:
        """Run one throw-away forward and backward, so that every attempt sums gradients in the same order.

        After its first backward DDP rebuilds its buckets in the order in which gradients became ready, and with that
        the order of summation over three or more ranks. Without this, a resumed run's first step would be summed in
        the first order where the undisturbed run's was summed in the second, and the bits would differ. The gradients
        stay, as zeros, for DDP to move into the new buckets.
        """
        rows = self._config.batch_size if self._config.compile else 1  # another shape would be compiled anew
        shape = (rows, self._config.block_size)
        X, Y = (torch.zeros(shape, dtype=torch.int64, device=self._device) for _ in range(2))  # any tokens show it
        with autocast(self._config):
            loss = ddp(X, Y)[1]
        loss.backward()
        ddp.zero_grad(set_to_none=False)


def wrap(net: nn.Module, world: World) -> DistributedDataParallel:
    """Average gradients over ranks; the weights are equal already, so nothing is broadcast."""
    device_ids = [world.device.index] if world.device.type == "cuda" else None
    ddp = DistributedDataParallel(net, device_ids=device_ids, gradient_as_bucket_view=True, init_sync=False)
    ddp.register_comm_hook(world, average)
    return ddp


def average(world: World, bucket: dist.GradBucket) -> Future[Tensor]:  # type: ignore[name-defined]
    """Begin to average a bucket over all ranks, with one and the same arithmetic wherever its gradients come from.

    DDP itself multiplies by 1/size what it copies into a bucket, and divides by size what lies there already: for three
    ranks these differ in the last bit. This multiplies.
    """
    gradients = bucket.buffer().mul_(1.0 / world.size)

    def added_up(reduced: Future[list[Tensor]]) -> Tensor:
        reduced.value()  # raises what has become of it: a step must not go on with what this rank alone has computed
        return gradients  # type: ignore[no-any-return]

    future: Future[list[Tensor]] = dist.all_reduce(gradients, group=world.group, async_op=True).get_future()
    return future.then(added_up)
