"""The last bits: we fix what decides them, note what we cannot fix, and tell what has changed. Knows no Ray."""

from __future__ import annotations

import gc
import importlib.metadata
import logging
import os
import platform
from dataclasses import asdict, dataclass, fields, replace
from importlib.util import find_spec
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist

from orchestrator.config import TrainConfig
from orchestrator.distributed.world import World
from orchestrator.host.compile_cache import keep_compiled

logger = logging.getLogger(__name__)

_CUBLAS, _CUBLAS_DETERMINISTIC = "CUBLAS_WORKSPACE_CONFIG", (":4096:8", ":16:8")
_OF_THE_DATA = {"data", "train_tokens", "val_tokens"}
_OF_REDUCTION = {"world_size", "nccl", "nodes"}  # in lanes, none of them decides about bits


def agree_to_compile(config: TrainConfig, world: World) -> TrainConfig:
    """Return the config with compile=False where the compiler does not work on every rank: all run alike."""
    if not config.compile:
        return config
    faults = world.gather_json(compiler_fault(world.device))
    found = next(((rank, fault) for rank, fault in enumerate(faults) if fault), None)
    if found and world.is_main:
        rank, fault = found
        where = f" on rank {rank}'s node" if world.size > 1 else ""
        logger.warning("compile=True, but the compiler does not work%s (%s): the model runs uncompiled", where, fault)
    return replace(config, compile=found is None)


def compiled(model: torch.nn.Module, config: TrainConfig) -> torch.nn.Module:
    """Return the model as it is called: through the compiler, if config.compile."""
    return torch.compile(model) if config.compile else model  # type: ignore[return-value]


def compiler_fault(device: torch.device) -> str | None:
    """Compile a small function for a device; return why that fails, None where it works.

    PyTorch looks for a C++ compiler, headers and, on GPUs, Triton's parts only when it compiles. What it has compiled
    for this function on this machine before is taken from its cache.
    """
    keep_compiled()
    try:
        torch.compile(_compiled_for_trial)(torch.ones(2**14, device=device))
    except Exception as error:  # whatever a broken tool makes of it
        text = str(error).strip().partition("\n")[0] or type(error).__name__
        return text.removeprefix("InvalidCxxCompiler: ")[:300]
    return None


def _compiled_for_trial(x: torch.Tensor) -> torch.Tensor:
    return (x.sin() + 1).sum()


def make_deterministic(config: TrainConfig) -> None:
    """Fix what decides the bits of a sum: kernels and number of threads."""
    if config.deterministic and os.environ.get(_CUBLAS) not in _CUBLAS_DETERMINISTIC:
        if _CUBLAS in os.environ:
            logger.warning("%s=%s allows other bits: it is %s", _CUBLAS, os.environ[_CUBLAS], _CUBLAS_DETERMINISTIC[0])
        os.environ[_CUBLAS] = _CUBLAS_DETERMINISTIC[0]  # PyTorch refuses to multiply without it
    # With warn_only, attention on a GPU only warns and goes on with sums in any order; on a CPU nothing needs it.
    torch.use_deterministic_algorithms(config.deterministic, warn_only=config.device == "cpu")
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # for debugging only, and slow
    torch.set_num_threads(max(1, int(config.cpus_per_worker)))
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    if config.compile:
        make_compiler_deterministic(config.deterministic)


def make_compiler_deterministic(deterministic: bool) -> None:
    """Have the compiler choose kernels without measuring them: what is quicker here need not be on the next node."""
    from torch._inductor import config as compiler  # slow to import

    if hasattr(compiler, "deterministic"):  # newer than the oldest PyTorch that runs this
        compiler.deterministic = deterministic


def free_memory(config: TrainConfig, device: torch.device) -> None:
    """Free what a model that is given up has left: beside the next one there may be no room for it."""
    if config.compile:
        torch._dynamo.reset()
    gc.collect()  # DDP and the compiler leave cycles, which nothing else frees in time
    if device.type == "cuda":
        torch.cuda.empty_cache()


@dataclass(frozen=True, kw_only=True)
class NumericsFingerprint:
    """Everything besides the state that decides the bits of the next one; stored with every checkpoint.

    data: the dataset's fingerprint; train_tokens, val_tokens: the lengths of its splits. nodes: which ranks share one.
    lanes: in which gradients are summed, 0 for DDP's order; another number is an event of its own.
    None: not of this machine, or of a version of this program that did not note it.
    """

    world_size: int | None = None
    data: str | None = None
    train_tokens: int | None = None
    val_tokens: int | None = None
    torch: str | None = None
    device_name: str | None = None
    dtype: str | None = None
    compile: bool | None = None
    threads: int | None = None
    cuda: str | None = None
    cudnn: int | None = None
    nccl: str | None = None
    triton: str | None = None
    nodes: str | None = None
    lanes: int | None = None

    @classmethod
    def of_this_rank(
        cls,
        config: TrainConfig,
        world: World,
        data: str,
        train_tokens: int | None = None,
        val_tokens: int | None = None,
        lanes: int = 0,
    ) -> NumericsFingerprint:
        """Return this rank's. Call it on all ranks."""
        on_gpu = world.device.type == "cuda"
        return cls(
            world_size=world.size,
            data=data,
            train_tokens=train_tokens,
            val_tokens=val_tokens,
            torch=torch.__version__,
            device_name=torch.cuda.get_device_name(world.device) if on_gpu else platform.machine(),
            dtype=config.dtype,
            compile=config.compile,
            threads=torch.get_num_threads(),
            lanes=lanes,
            nodes=_nodes(world) if on_gpu and config.backend == "nccl" and world.size > 2 else None,
            **(_gpu_libraries() if on_gpu else {}),
        )

    def to_json(self) -> dict[str, Any]:
        """Return what is known, as JSON values."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> NumericsFingerprint:
        """Return the fingerprint of JSON values; keys of newer versions are left out."""
        return cls(**{each.name: value[each.name] for each in fields(cls) if each.name in value})

    def changes(self, before: NumericsFingerprint) -> list[str]:
        """Return what is other than before, the dataset apart; what either does not know is no change."""
        was = before.to_json()
        told_elsewhere = _OF_THE_DATA | {"lanes"} | (_OF_REDUCTION if self.lanes else set())
        now = {name: value for name, value in self.to_json().items() if name not in told_elsewhere}
        return [f"{name} {was[name]} -> {value}" for name, value in now.items() if was.get(name, value) != value]

    def change_of_data(self, before: NumericsFingerprint) -> str:
        """Return in which way the dataset has become another one, "" if it has not."""
        if before.data in (None, self.data):
            return ""
        counts = []
        for split in ("train", "val"):
            had, has = getattr(before, f"{split}_tokens"), getattr(self, f"{split}_tokens")
            if had not in (None, has):
                counts.append(f"{split}.bin had {had:,} tokens, now {has:,}")
        return ", ".join(counts) or "as many tokens, but others"


def _gpu_libraries() -> dict[str, Any]:
    """Return the versions of what computes on a GPU."""
    nccl: tuple[Any, ...] = torch.cuda.nccl.version() if dist.is_nccl_available() else ()  # type: ignore[no-untyped-call]
    found = {
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        "nccl": ".".join(map(str, nccl)),
        "triton": importlib.metadata.version("triton") if find_spec("triton") else "",
    }
    return {name: version for name, version in found.items() if version}


def _nodes(world: World) -> str:
    """Return which ranks are on which nodes: NCCL chooses by that, and by their wiring, in which order it adds up."""
    found = groupby(world.gather_json(platform.node()))
    return ", ".join(f"{name} x{len(list(ranks))}" for name, ranks in found)
