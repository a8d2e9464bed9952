"""Gradients are averaged over ranks where they lie: in DDP's buckets, and nowhere else. Knows neither Ray nor the loop.

Every micro-step adds to the buckets, as long as nobody sets a gradient to None: then DDP's memory is all that there is.
Annotations are read when this is imported: DDP compares those of a hook with its own types.
"""

import torch.distributed as dist
from torch import Tensor, nn
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from orchestrator.distributed.world import World


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
