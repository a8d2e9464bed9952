"""The device that a process computes on, and the number format that it has. Knows no Ray."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from orchestrator.config import TrainConfig
from orchestrator.distributed.world import World
from orchestrator.errors import ConfigError

logger = logging.getLogger(__name__)


def resolve(config: TrainConfig) -> TrainConfig:
    """Return the config with device, backend and dtype as this machine can give them.

    Raises:
        ConfigError: the device is one GPU of several, and there are fewer.
    """
    device = device_here(config.device, ("cuda",))
    on_gpu = device != "cpu"
    dtype = config.dtype
    if dtype == "auto":
        dtype = (
            ("bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16")
            if on_gpu
            else "float32"
        )
    return replace(config, device=device, backend=config.backend if on_gpu else "gloo", dtype=dtype)


def device_here(wanted: str, kinds: tuple[str, ...]) -> str:
    """Return the device that is wanted, or cpu, with a line about it, where this machine has none of its kind.

    kinds: those that the caller can use besides cpu.

    Raises:
        ConfigError: it is no name of a device, or one of several, and there are fewer.
    """
    try:
        device = torch.device(wanted)
    except RuntimeError:
        raise ConfigError(f"device={wanted!r} is no device: give cpu, cuda or cuda:<index>") from None
    if device.type == "cpu":
        return "cpu"
    if device.type not in kinds or not (count := _count(device.type)):
        is_unfit = device.type not in kinds and _count(device.type)
        logger.info("device=%s is not %s: device=cpu", wanted, "for training" if is_unfit else "on this machine")
        return "cpu"
    if device.index is not None and device.index >= count:
        there = f"{device.type}:0" + (f" to {device.type}:{count - 1}" if count > 1 else "")
        raise ConfigError(f"device={wanted}: this machine has {there}")
    return wanted


def _count(kind: str) -> int:
    """Return how many accelerators of a kind this machine has."""
    if kind == "mps":
        return int(torch.backends.mps.is_available())
    module = getattr(torch, kind, None)  # torch.cuda, torch.xpu
    return module.device_count() if module and hasattr(module, "device_count") and module.is_available() else 0


def agree_on_dtype(config: TrainConfig, world: World) -> TrainConfig:
    """Return the config with a dtype that every rank's device has: dtype=auto finds another on another card."""
    found = world.gather_json(config.dtype)
    if len(set(found)) == 1:
        return config
    if world.is_main:
        logger.warning("dtype=auto finds %s: all workers take float16", " and ".join(sorted(set(found))))
    return replace(config, dtype="float16")


def local_device(config: TrainConfig, local_rank: int) -> torch.device:
    """Return this process's device and make it the current one; an index in config.device is for a process alone."""
    if config.device == "cpu":
        return torch.device("cpu")
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def autocast(config: TrainConfig) -> AbstractContextManager[Any]:
    """Return the context in which the model computes in dtype; its weights stay float32."""
    if config.dtype == "float32":
        return nullcontext()
    return torch.autocast(config.device.split(":")[0], dtype=getattr(torch, config.dtype))


def to_device(batch: tuple[Tensor, Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """Move a batch; to a GPU from pinned memory, so that the copy runs behind the computation."""
    if device.type == "cpu":
        return batch
    X, Y = batch
    return X.pin_memory().to(device, non_blocking=True), Y.pin_memory().to(device, non_blocking=True)
