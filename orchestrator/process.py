"""This process before training starts: its device, number format, threads, and its place among the others.

Knows no Ray. A plain process and `torchrun` get their World here; a Ray worker brings its own (`worker.py`).
"""

from __future__ import annotations

import logging
import os
import platform
import shutil
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from orchestrator.config import TrainConfig
from orchestrator.world import World

logger = logging.getLogger(__name__)


def resolve(config: TrainConfig) -> TrainConfig:
    """Return the config with device, backend, dtype and compile as this machine can give them."""
    device = config.device if torch.cuda.is_available() else "cpu"
    on_gpu = device != "cpu"
    if config.device != device:
        logger.info("no GPU here: device=cpu, backend=gloo")
    dtype = config.dtype
    if dtype == "auto":
        dtype = ("bfloat16" if torch.cuda.is_bf16_supported() else "float16") if on_gpu else "float32"
    can_compile = on_gpu or any(shutil.which(name) for name in ("g++", "clang++"))
    if config.compile and not can_compile:
        logger.warning("compile=True, but no C++ compiler is here: the model runs uncompiled")
    return replace(
        config,
        device=device,
        backend=config.backend if on_gpu else "gloo",
        dtype=dtype,
        compile=config.compile and can_compile,
    )


def pin(config: TrainConfig) -> None:
    """Fix what decides the bits of a sum: kernels and number of threads."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS needs to be deterministic
    torch.use_deterministic_algorithms(config.deterministic, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # for debugging only, and slow
    torch.set_num_threads(max(1, int(config.cpus_per_worker)))
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True


def environment(config: TrainConfig, world: World, data: dict[str, Any]) -> dict[str, Any]:
    """Return what else decides the bits, to be stored with every checkpoint; data: as of `change_of_data`."""
    name = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else platform.machine()
    return {
        "world_size": world.size,
        **data,
        "torch": torch.__version__,
        "device_name": name,
        "dtype": config.dtype,
        "compile": config.compile,
        "threads": torch.get_num_threads(),
    }


def change_of_data(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Return in which way a dataset has become another one, "" if it has not.

    before, now: {data: its fingerprint, train_tokens, val_tokens: how many}; older runs know the fingerprint alone.
    """
    if before.get("data", now["data"]) == now["data"]:
        return ""
    counts = []
    for split in ("train", "val"):
        had, has = before.get(f"{split}_tokens"), now[f"{split}_tokens"]
        if had not in (None, has):
            counts.append(f"{split}.bin had {had:,} tokens, now {has:,}")
    return ", ".join(counts) or "as many tokens, but others"


def process_group_backend(config: TrainConfig) -> str:
    """Return the backend of a resolved config: gradients by its own, JSON and votes always by gloo, off the GPU."""
    return "cpu:gloo,cuda:nccl" if config.backend == "nccl" else "gloo"


def plain_world(config: TrainConfig) -> World:
    """Join the other processes if `torchrun` started this one, else be a world of one; config is resolved."""
    if "RANK" not in os.environ:
        return World(device=torch.device(config.device), attempt=new_attempt())
    dist.init_process_group(process_group_backend(config))
    local = int(os.environ["LOCAL_RANK"])
    world = World(dist.get_rank(), dist.get_world_size(), local_device(config, local))
    return replace(world, attempt=world.broadcast_json(new_attempt()))


def local_device(config: TrainConfig, local_rank: int) -> torch.device:
    """Return this process's device and make it the current one."""
    if config.device == "cpu":
        return torch.device("cpu")
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def new_attempt() -> str:
    """Return a name that no other start of the process group has."""
    return os.urandom(4).hex()
