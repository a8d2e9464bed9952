"""Which rank writes which tensor: a pure function, the same on every rank."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from orchestrator.checkpoint.snapshot import Snapshot


def owners(tensors: dict[str, Tensor], world_size: int) -> dict[str, int]:
    """Return the owner rank of every tensor, so that ranks own about equally many bytes.

    Largest first, each to the rank with the least so far; ties go to the lowest rank. A tensor is never split: no
    share is smaller than the largest tensor, the token embedding, which is 10% of GPT-2's state and 1.7% of gpt2-xl's.

    Source: Graham's longest-processing-time rule (1969).
    """
    load = [0] * world_size
    owner = {}
    for name in sorted(tensors, key=lambda name: (-tensors[name].nbytes, name)):
        rank = min(range(world_size), key=load.__getitem__)
        owner[name] = rank
        load[rank] += tensors[name].nbytes
    return owner


def split(owner: dict[str, int], rank: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors that a rank owns."""
    return {name: tensor for name, tensor in tensors.items() if owner[name] == rank}


Files = dict[str, dict[str, Tensor]]  # file name -> tensor name -> tensor


def files_of(snapshot: Snapshot, world_size: int) -> Files:
    """Return the files of a state's checkpoint. Each is one rank's; model and optimizer never share one."""
    owner = owners({**snapshot.model, **snapshot.optimizer}, world_size)
    kinds = {"model": snapshot.model, "optimizer": snapshot.optimizer}
    files = {
        f"{kind}-{rank:05d}-of-{world_size:05d}.safetensors": split(owner, rank, tensors)
        for kind, tensors in kinds.items()
        for rank in range(world_size)
    }
    return {file: tensors for file, tensors in files.items() if tensors}


def rank_of(file: str) -> int:
    """Return the rank that writes a file to storage."""
    return int(file.split("-")[1])


def tensor_index(files: Files) -> dict[str, dict[str, Any]]:
    """Return where every tensor lies and what it is, for state.json."""
    return {
        name: {"file": file, "shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
        for file, tensors in files.items()
        for name, tensor in tensors.items()
    }
