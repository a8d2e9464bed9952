"""ReadPlan: which ranks read which file of a state, and from where. A pure function, the same on every rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from orchestrator.checkpoint.restore.overlap import Overlap
from orchestrator.checkpoint.store import Checkpoint
from orchestrator.checkpoint.tensor_file import FileRecord
from orchestrator.distributed.world import World


@dataclass(frozen=True)
class Source:
    """Where files of a state lie, and which ranks can read them there; folders: file -> its folder."""

    label: str
    ranks: tuple[int, ...]
    checkpoint: Checkpoint
    folders: dict[str, str]
    is_storage: bool = False


# file -> which ranks read it, and where. Who reads it alone sends each slice to all that want it; one of each node, to
# those of its source
ReadPlan = dict[str, dict[int, Source]]


def plan_reads(
    files: Mapping[str, FileRecord],
    wanted: Mapping[str, Sequence[Overlap]],
    sources: list[Source],
    refused: dict[str, dict[str, str]],
    world: World,
) -> ReadPlan:
    """Return the plan for these files; one that lies nowhere is not in it.

    If all ranks have a file in node memory and want all of it, all read it, or on GPUs one rank of each node. Else one
    rank reads it: from node memory if it lies there, the rank that wants most of it, and has the least to read so far.

    wanted: file -> what is wanted of it. refused: file -> label of a source -> what is wrong with it there.
    """
    load = dict.fromkeys(range(world.size), 0)
    plan: ReadPlan = {}
    for file in sorted(files, key=lambda file: (-files[file].size_bytes, file)):
        options = [each for each in sources if file in each.folders and each.label not in refused.get(file, {})]
        at_hand = {rank: source for source in options if not source.is_storage for rank in source.ranks}
        wanted_bytes = [sum(each.live.nbytes for each in wanted[file] if rank in each.wanted.holders) for rank in load]
        is_for_all = len(at_hand) == world.size and all(each.wanted.is_replicated(world.size) for each in wanted[file])
        if is_for_all and _reads_for_itself(world):
            plan[file] = at_hand
        elif is_for_all:
            near = [source for source in options if not source.is_storage]
            plan[file] = {min(source.ranks, key=lambda rank: (load[rank], rank)): source for source in near}
        elif options:
            pairs = [(rank, source) for source in options for rank in source.ranks]
            rank, source = min(pairs, key=lambda at: (at[1].is_storage, -wanted_bytes[at[0]], load[at[0]], at[0]))
            plan[file] = {rank: source}
        for rank in plan.get(file, {}):
            load[rank] += files[file].size_bytes
    return plan


def _reads_for_itself(world: World) -> bool:
    """Return whether a rank reads node memory faster than it receives from another rank of its node."""
    return world.device.type == "cpu"
