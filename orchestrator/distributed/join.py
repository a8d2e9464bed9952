"""How a process that torchrun or a shell has started finds its place among the others. Knows no Ray."""

from __future__ import annotations

import os
from dataclasses import replace

import torch
import torch.distributed as dist

from orchestrator.config import TrainConfig
from orchestrator.distributed.device import local_device
from orchestrator.distributed.world import World


def process_group_backend(config: TrainConfig) -> str:
    """Return the backend of a resolved config: gradients by its own, JSON and votes always by gloo, off the GPU."""
    return "cpu:gloo,cuda:nccl" if config.backend == "nccl" else "gloo"


def plain_world(config: TrainConfig) -> World:
    """Join the other processes if `torchrun` started this one, else be a world of one; config is resolved."""
    if "RANK" not in os.environ:
        return World(device=local_device(config, torch.device(config.device).index or 0), attempt=new_attempt())
    dist.init_process_group(process_group_backend(config))
    local = int(os.environ["LOCAL_RANK"])
    world = World(dist.get_rank(), dist.get_world_size(), local_device(config, local))
    return replace(world, attempt=world.on_main(new_attempt))


def new_attempt() -> str:
    """Return a name that no other start of the process group has."""
    return os.urandom(4).hex()
