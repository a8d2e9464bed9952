"""Which rank writes which tensor: a pure function, the same on every rank."""

from __future__ import annotations

from torch import Tensor


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
