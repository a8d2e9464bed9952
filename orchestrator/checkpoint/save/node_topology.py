"""NodeTopology: which ranks have a memory in common, and which share of a state each of them keeps there.

Ranks that see the same folder are on one node, whatever their host names and addresses say.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from orchestrator.checkpoint.save.node_memory import NodeMemory
from orchestrator.checkpoint.save.plan import Files, holds_all, rank_of
from orchestrator.distributed.world import World
from orchestrator.errors import CheckpointError

logger = logging.getLogger(__name__)


@dataclass
class NodeTopology:
    """The nodes of all ranks, and this rank's memory: None on all ranks if it is missing on one.

    ids: of every rank's node, by rank; ranks: those on this rank's node.
    share: the number of the share that this rank keeps; shares: of how many on its node.
    """

    memory: NodeMemory | None
    ids: tuple[str, ...]
    rank: int
    ranks: tuple[int, ...] = field(init=False)
    share: int = field(init=False)
    shares: int = field(init=False)

    def __post_init__(self) -> None:
        self.ranks = tuple(rank for rank, node in enumerate(self.ids) if node == self.ids[self.rank])
        self.share, self.shares = self.ranks.index(self.rank), len(self.ranks)

    def share_of(self, files: Files, share: int | None = None) -> Files:
        """Return the files of a share of this node's memory; default: those that this rank keeps there.

        Each rank keeps its own files, and uploads them from there. Files of ranks elsewhere are dealt out among the
        ranks of this node, as far as these hold all of their slices.
        """
        rank = self.ranks[self.share if share is None else share]
        elsewhere = sorted({rank_of(file) for file in files} - set(self.ranks))
        kept: Files = {}
        for file, slices in files.items():
            keeper: int | None = rank_of(file)
            if keeper in elsewhere:
                holders = [each for each in self.ranks if holds_all(slices, each)]
                keeper = holders[elsewhere.index(keeper) % len(holders)] if holders else None
            if keeper == rank:
                kept[file] = slices
        return kept

    def can_write(self, files: Files, share: int) -> bool:
        """Return whether this rank holds all slices of a share of this node's memory."""
        return all(holds_all(slices, self.rank) for slices in self.share_of(files, share).values())


def open_node_memory(world: World, memory_dir: str, run_id: str) -> NodeTopology:
    """Open every node's memory; without a memory_dir, or where one node has none, go on without."""
    memory, problem = None, ""
    try:
        memory = NodeMemory(memory_dir, run_id) if memory_dir else None
    except (OSError, CheckpointError, AttributeError) as error:  # systems other than Linux lack some of it
        problem = f"{type(error).__name__}: {error}"
    ids = tuple(world.gather_json(memory.node_id if memory else None))
    problems = [found for found in world.gather_json(problem) if found]
    if problems and world.is_main:
        logger.warning("no states are kept in node memory, training pauses for every checkpoint: %s", problems[0])
    if None in ids:
        if memory:
            memory.close(is_finished=False)
        return NodeTopology(None, tuple(str(rank) for rank in range(world.size)), world.rank)
    return NodeTopology(memory, ids, world.rank)
