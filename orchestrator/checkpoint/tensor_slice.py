"""TensorSlice: a piece of one tensor of the state, and the ranks that hold it. Knows no files and no live model.

Whoever saves or restores a state asks its slices who holds what, so nothing here assumes that every rank holds all of
it. DDP replicates every tensor (`replicate`). An optimizer that gives each rank a flat range of each moment is another
`Placement`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from orchestrator.errors import CheckpointError


@dataclass(frozen=True)
class TensorSlice:
    """The elements [offset, offset + tensor.numel()) of a tensor that is flattened.

    name, global_shape: of the tensor that this is a piece of.
    tensor: the elements; on a rank that is no holder, only their number and dtype count (device meta will do).
    holders: the ranks that have these elements, in ascending order; the bits are the same on each.
    """

    name: str
    global_shape: tuple[int, ...]
    offset: int
    tensor: Tensor
    holders: Sequence[int]

    @property
    def end(self) -> int:
        """The index behind its last element."""
        return self.offset + self.tensor.numel()

    @cached_property
    def is_whole(self) -> bool:
        """Whether it is all of its tensor, and has its shape."""
        return tuple(self.tensor.shape) == self.global_shape

    @cached_property
    def key(self) -> str:
        """The name under which a file stores it: the tensor's, if it is all of it."""
        return self.name if self.is_whole else f"{self.name}[{self.offset}:{self.end}]"

    def is_replicated(self, world_size: int) -> bool:
        """Return whether every rank holds it."""
        return len(self.holders) == world_size

    def to_json(self) -> dict[str, Any]:
        """Return its description for state.json."""
        entry = {"shape": list(self.tensor.shape), "dtype": str(self.tensor.dtype).removeprefix("torch.")}
        if self.is_whole:
            return entry
        return {**entry, "slice_of": self.name, "global_shape": list(self.global_shape), "offset": self.offset}

    @classmethod
    def from_json(cls, key: str, entry: dict[str, Any], tensor: Tensor) -> TensorSlice:
        """Return the slice that a file stores under this key; nobody holds it yet."""
        if "slice_of" not in entry:
            return cls(key, tuple(tensor.shape), 0, tensor, ())
        return cls(entry["slice_of"], tuple(entry["global_shape"]), entry["offset"], tensor, ())


# From the tensors of a rank and the number of ranks: the slices of the whole state, in the same order on all ranks. A
# tensor may be whole, or as much of it as the rank holds, which is one slice at most.
Placement = Callable[[Mapping[str, Tensor], int], list[TensorSlice]]


def replicate(tensors: Mapping[str, Tensor], world_size: int) -> list[TensorSlice]:
    """Return the slices of a state that every rank holds whole."""
    everybody = range(world_size)
    return [TensorSlice(name, tuple(tensor.shape), 0, tensor, everybody) for name, tensor in tensors.items()]


def assemble(slices: Iterable[TensorSlice]) -> dict[str, Tensor]:
    """Return the whole tensors of which these are the pieces; a tensor that is one slice is not copied.

    Raises:
        CheckpointError: some elements of a tensor are in no slice, or in two.
    """
    return {name: _joined(pieces) for name, pieces in by_tensor(slices).items()}


def by_tensor(slices: Iterable[TensorSlice]) -> dict[str, list[TensorSlice]]:
    """Return the slices of every tensor, in ascending order: name -> slices.

    Raises:
        CheckpointError: some elements of a tensor are in no slice, or in two.
    """
    pieces: dict[str, list[TensorSlice]] = {}
    for each in slices:
        pieces.setdefault(each.name, []).append(each)
    for name, found in pieces.items():
        found.sort(key=lambda each: (each.offset, each.end))
        shape, end = found[0].global_shape, 0
        for piece in found:
            if piece.offset != end or piece.global_shape != shape:
                raise CheckpointError(f"{name} lacks elements, or has some twice: its slices meet at {end}")
            end = piece.end
        if end != math.prod(shape):
            raise CheckpointError(f"{name} lacks elements: its slices end at {end} of {shape}")
    return pieces


def _joined(pieces: list[TensorSlice]) -> Tensor:
    first = pieces[0]
    if first.is_whole:
        return first.tensor
    return torch.cat([piece.tensor.reshape(-1) for piece in pieces]).view(first.global_shape)
