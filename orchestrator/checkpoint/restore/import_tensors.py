"""Tensors from elsewhere, with the same bits on all ranks: a run's first state, or the base model of adapters.

A source that all nodes see is read by one rank. Sources on nodes' own disks are read by one rank of each node. The
other ranks receive. Knows no state and not what lies where (init_from.py, base.py).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from orchestrator.checkpoint.finite import count_not_finite, not_finite
from orchestrator.checkpoint.snapshot import Snapshot, describe, undescribe
from orchestrator.checkpoint.tensor_file import checksum
from orchestrator.checkpoint.tensor_slice import TensorSlice
from orchestrator.distributed.world import World
from orchestrator.errors import CheckpointError, UserError

logger = logging.getLogger(__name__)


@dataclass
class Import:
    """A source as ranks have read it.

    title: what messages call it. first: the rank whose bits count. reader_of: by rank, the one that reads for it.
    outlines: by rank, the description of its snapshot and the shapes in it, None of a rank that has read nothing.
    tensors: of this rank's snapshot; `fill` takes each away.
    """

    title: str
    first: int
    reader_of: list[int]
    outlines: list[Any]
    tensors: dict[str, Tensor]

    @property
    def shapes(self) -> dict[str, list[int]]:
        """The shapes of all tensors, by name, in the order in which they are filled in."""
        return self.outlines[self.first][1]  # type: ignore[no-any-return]

    def snapshot(self) -> Snapshot:
        """Return the source's snapshot without tensors."""
        return undescribe(self.outlines[self.first][0], {}, {})

    def fill(self, wanted: dict[str, list[TensorSlice]], world: World, *, checksums: bool = False) -> dict[str, str]:
        """Fill the live slices of every tensor; return its checksum, as it is held, if they are asked for.

        Raises:
            CheckpointError: on every rank alike, if some values are not finite.
        """
        names, mine, outlines, first = list(self.shapes), self.tensors, self.outlines, self.first
        alike = [rank for rank, outline in enumerate(outlines) if outline == outlines[first]]
        here: dict[str, Tensor] = {}  # key -> its values on this rank, live ones if it holds them

        def fill_one(name: str) -> tuple[str, int]:
            whole = mine.pop(name)
            for each in wanted[name]:
                values = whole if each.is_whole else whole.reshape(-1)[each.offset : each.end]
                is_mine = world.rank in each.holders
                here[each.key] = each.tensor.copy_(values) if is_mine else values.to(each.tensor.dtype).contiguous()
            found = [here[each.key] for each in wanted[name]]
            is_compared = checksums or len(alike) > 1
            return "".join(map(checksum, found)) if is_compared else "", sum(map(count_not_finite, found))

        # every thread touches memory for the first time, which is slow: so there are as many as cores
        with ThreadPoolExecutor(torch.get_num_threads(), initializer=world.choose_device) as pool:
            sums = world.gather_json(list(pool.map(fill_one, names if world.rank in alike else ())))
        mine.clear()  # of a rank whose file is another one
        for name, (_, count) in zip(names, sums[first], strict=True):
            if count:
                raise CheckpointError(not_finite(self.title, name, count, math.prod(self.shapes[name])))
        sources = [reader if sums[reader] == sums[first] else first for reader in self.reader_of]
        if world.is_main and (others := {rank for rank, outline in enumerate(outlines) if outline} - set(sources)):
            told = self.title, ", ".join(map(str, sorted(others))), first
            logger.warning("%s is another one on the nodes of ranks %s: rank %d's is used by all", *told)
        _send([each for name in names for each in wanted[name]], here, sources, world)
        return {name: found for name, (found, _) in zip(names, sums[first], strict=True)}


def _send(slices: list[TensorSlice], here: dict[str, Tensor], sources: list[int], world: World) -> None:
    """Send the slices to the ranks that have not read them; sources: by rank, the one whose copy it takes."""
    world.broadcast_from_each([each.tensor for each in slices if each.is_replicated(world.size)], sources)
    apart = [each for each in slices if not each.is_replicated(world.size)]
    for rank, source in enumerate(sources):
        theirs = [each for each in apart if rank in each.holders]
        if world.rank == rank:
            world.send([each.tensor for each in theirs], source, rank)
        elif world.rank == source:
            world.send([here[each.key].to(world.device) for each in theirs], source, rank)


def read_on_ranks(
    title: str,
    identity: str | None,
    read: Callable[[], Snapshot],
    world: World,
    *,
    may_be_nowhere: bool = False,
    remedy: str = "give a path or URL that all see",
) -> Import:
    """Read a source on one rank of every node that has its own.

    identity: the source's name, the same on all nodes that see the same one; None where this node does not have it.
    may_be_nowhere: the first rank reads it in any case, and its error tells what is wrong.
    remedy: what the user can do beside copying it to a node, if none has it.

    Raises:
        CheckpointError, ConfigError: on every rank alike, if no node has it, or the first rank cannot read it.
    """
    origins = world.gather_json(identity)
    if not may_be_nowhere and not any(origins):
        raise CheckpointError(f"{title}: no worker's node has it; copy it to one, or {remedy}")
    first = next((rank for rank, origin in enumerate(origins) if origin), 0)
    reader_of = [origins.index(origin) if origin else first for origin in origins]
    is_first, is_reader = world.rank == first, reader_of[world.rank] == world.rank
    snapshot = world.collectively(lambda: _read(read, is_first=is_first) if is_reader else None)
    tensors = {**snapshot.model, **snapshot.optimizer} if snapshot else {}
    shapes = {name: list(tensors[name].shape) for name in sorted(tensors)}
    outlines = world.gather_json([describe(snapshot), shapes] if snapshot else None)
    return Import(title, first, reader_of, outlines, tensors)


def _read(read: Callable[[], Snapshot], *, is_first: bool) -> Snapshot | None:
    """Return the source's snapshot, mapped from its file if that is possible.

    If it cannot be read, the first rank's error counts; another rank returns None, and is sent the first rank's state.

    Raises:
        CheckpointError, ConfigError: the first rank's cannot be read.
    """
    try:
        return read()
    except (UserError, OSError, RuntimeError) as error:  # a damaged copy, a bad disk, PyTorch's own
        if is_first:
            raise
        logger.warning("this node's copy is not used: %s: %s", type(error).__name__, error)
        return None
