"""Shared by the checkpoint benchmarks: states of GPT-2's sizes, nanoGPT's `torch.save`, the disk's cache, folders."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash

from model import GPT, GPTConfig
from orchestrator.checkpoint.state import TrainState, allocate_moments, capture
from orchestrator.checkpoint.tensor_file import bytes_of
from orchestrator.config import TrainConfig
from orchestrator.distributed.world import World

Figures = dict[str, float]


@dataclass(frozen=True)
class Size:
    """Sizes of a model; block_size only adds a few rows, the others decide the bytes."""

    n_layer: int
    n_head: int
    n_embd: int
    block_size: int = 1024
    vocab_size: int = 50304


SIZES = {
    "gpt2": Size(12, 12, 768),  # 124M parameters, 1.5 GB with AdamW's moments
    "gpt2-xl": Size(48, 25, 1600),  # 1.56B parameters, 18.7 GB
    "small": Size(6, 6, 384),  # 0.36 GB
    "tiny": Size(2, 4, 128, 128, 8192),  # 17 MB: to develop with
}


@dataclass(frozen=True)
class Plan:
    """The sizes, repeats and folders of one benchmark run."""

    size: Size
    small: Size  # of the state that goes through the proxy
    n_tokens: int
    rounds: int
    pairs: int
    out_dir: Path
    memory_dir: Path


def settings(size: Size, out_dir: str, memory_dir: str) -> TrainConfig:
    """Return the settings of a run; with memory_dir "" it keeps no states in node memory."""
    return TrainConfig(
        out_dir=out_dir,
        memory_dir=memory_dir,
        n_layer=size.n_layer,
        n_head=size.n_head,
        n_embd=size.n_embd,
        block_size=size.block_size,
        device="cpu",
        backend="gloo",
        dtype="float32",
        compile=False,
    )


def model_args(size: Size) -> dict[str, Any]:
    """Return GPTConfig's arguments."""
    return {**asdict(size), "bias": False, "dropout": 0.0}


def new_state(size: Size) -> TrainState:
    """Return a state with values of its own in every tensor, the same in every process; all its memory is in use."""
    config = settings(size, "out", "")
    torch.manual_seed(config.seed)
    model = GPT(GPTConfig(**model_args(size)))
    optimizer = model.configure_optimizers(config.weight_decay, 1e-4, (config.beta1, config.beta2), "cpu")
    state = TrainState(model, optimizer, torch.amp.GradScaler("cpu", enabled=False), asdict(config))
    allocate_moments(state, World())
    for parameter, slots in optimizer.state.items():
        slots["step"].fill_(1.0)
        slots["exp_avg"].copy_(parameter.detach())
        slots["exp_avg_sq"].copy_(parameter.detach()).square_()
    return state


def size_bytes(state: TrainState) -> int:
    """Return the bytes of a state's tensors."""
    snapshot = capture(state)
    return sum(tensor.nbytes for tensor in (*snapshot.model.values(), *snapshot.optimizer.values()))


def digest(state: TrainState) -> str:
    """Return a checksum of the bits of all tensors."""
    snapshot = capture(state)
    found = xxhash.xxh3_128()
    for name, tensor in sorted({**snapshot.model, **snapshot.optimizer}.items()):
        found.update(name.encode())
        found.update(bytes_of(tensor))
    return found.hexdigest()


def nanogpt_checkpoint(state: TrainState) -> dict[str, Any]:
    """Return what nanoGPT's train.py saves. Source: nanoGPT's train.py, `checkpoint`."""
    return {
        "model": state.model.state_dict(),
        "optimizer": state.optimizer.state_dict(),
        "model_args": asdict(state.model.config),
        "iter_num": state.iter_num,
        "best_val_loss": state.best_val_loss,
        "config": state.config,
    }


def torch_save(state: TrainState, path: Path, is_synced: bool = False) -> float:
    """Save as nanoGPT does and return the seconds; is_synced: wait until the disk has it, which nanoGPT does not."""
    began_s = time.perf_counter()
    torch.save(nanogpt_checkpoint(state), path)
    if is_synced:
        _on_file(path, os.fsync)
    return time.perf_counter() - began_s


def torch_load(state: TrainState, path: Path) -> tuple[float, float]:
    """Load as nanoGPT resumes; return the seconds of torch.load alone, and of it with the live state filled."""
    began_s = time.perf_counter()
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    loaded_s = time.perf_counter() - began_s
    state.model.load_state_dict(checkpoint["model"])
    state.optimizer.load_state_dict(checkpoint["optimizer"])
    return loaded_s, time.perf_counter() - began_s


def settle(folder: Path) -> None:
    """Bring everything below a folder to the disk, so that the next measurement does not wait for it."""
    for path in _files(folder):
        _on_file(path, os.fsync)


def forget_cached(folder: Path) -> None:
    """Make the next read of everything below a folder come from the disk; the files keep what is in them."""
    for path in _files(folder):
        _on_file(path, lambda descriptor: os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED))


def used_bytes(folder: Path) -> int:
    """Return the room that the files below a folder take."""
    return sum(path.stat().st_blocks * 512 for path in _files(folder))


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def _on_file(path: Path, call: Callable[[int], None]) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        call(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def new_folder(parent: str | None = None) -> Iterator[Path]:
    """Lend a folder that is deleted afterwards; parent None: where this system has its temporary files."""
    folder = Path(tempfile.mkdtemp(prefix="benchmark-", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
