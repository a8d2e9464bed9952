"""Destinations: where the slices that this rank reads go, and what it sends of them. Knows no files and no messages.

A saved slice that this rank wants as it is goes straight into its place in the live state. Any other is read into host
memory: one that was cut elsewhere when it was saved is copied to its places; one that other ranks want too, or alone,
stays in host memory until the pass has ended, so that it can be sent again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from orchestrator.checkpoint.restore.overlap import Overlap
from orchestrator.distributed.world import World
from orchestrator.errors import CheckpointError


class Destinations:
    """One rank's, for one pass over some files; wanted: file -> what all ranks want of it.

    file_of: the file of every saved slice, by key, in the order of the files.
    """

    def __init__(self, wanted: Mapping[str, Sequence[Overlap]], world: World) -> None:
        self._rank, self._device = world.rank, world.device
        self.file_of = {each.saved.key: file for file, found in wanted.items() for each in found}
        self._overlaps: dict[str, list[Overlap]] = {key: [] for key in self.file_of}
        for found in wanted.values():
            for each in found:
                self._overlaps[each.saved.key].append(each)
        self._for_others: dict[str, Tensor] = {}  # what was read, by key

    def wanted(self, keys: Sequence[str]) -> list[Overlap]:
        """Return what all ranks want of saved slices."""
        return [each for key in keys for each in self._overlaps[key]]

    def keys_in(self, file: str) -> list[str]:
        """Return the keys of the slices in a file, in their order there."""
        return [key for key in self.file_of if self.file_of[key] == file]

    def place(self, file: str, key: str, dtype: torch.dtype, shape: list[int]) -> Tensor:
        """Return the memory to which a slice in a file is read: a contiguous tensor of its type and size.

        Raises:
            CheckpointError: the file holds another slice than it was said to.
        """
        if self.file_of.get(key) != file:  # damaged: it must not overwrite a tensor of another file
            raise CheckpointError(f"{file} holds {key}, which is none of its tensors")
        found = self._overlaps[key]
        saved, is_mine = found[0].saved, [self._rank in each.wanted.holders for each in found]
        is_alike = all((each.live.dtype, each.wanted.global_shape) == (dtype, saved.global_shape) for each in found)
        if not is_alike or list(saved.tensor.shape) != shape:
            raise CheckpointError(f"{key} is not of the model's shape and type")
        if is_mine == [True] and found[0].live.is_contiguous():
            return found[0].live
        content = torch.empty(shape, dtype=dtype)
        if not all(is_mine):
            self._for_others[key] = content
        return content

    def fill(self, key: str, content: Tensor) -> None:
        """Copy a slice that was read to where this rank wants it, unless it is there already."""
        for each in self._overlaps[key]:
            if self._rank in each.wanted.holders and content is not each.live:
                each.live.copy_(each.within(content).view_as(each.live))

    def here(self, overlap: Overlap) -> Tensor:
        """Return these elements on this rank, to be sent or received; if they could not be read, some of that size."""
        if self._rank in overlap.wanted.holders:
            return overlap.live
        content = self._for_others.get(overlap.saved.key)
        if content is None:
            return torch.empty_like(overlap.live, device=self._device)
        return overlap.within(content).to(self._device)
