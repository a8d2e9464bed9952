"""SendOrder: which rank sends which saved slices, and in which order: the same on every rank that takes part."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest

from orchestrator.checkpoint.restore.overlap import Overlap
from orchestrator.checkpoint.restore.read_plan import ReadPlan
from orchestrator.distributed.world import World

_RUN_BYTES = 32 * 2**20  # tensors that are sent together


class SendOrder:
    """Of one pass over files.

    wanted: file -> what is wanted of it. by_node: the files that one rank of each node reads; by_one: those that one
    rank reads for all. file_of: key of a saved slice -> its file, in the order of the files. overlaps: by the same key.
    """

    def __init__(self, plan: ReadPlan, wanted: Mapping[str, Sequence[Overlap]], world: World) -> None:
        self._plan, self._world = plan, world
        self.file_of: dict[str, str] = {}
        self.overlaps: dict[str, list[Overlap]] = {}
        for file in plan:
            for each in wanted[file]:
                self.file_of[each.saved.key] = file
                self.overlaps.setdefault(each.saved.key, []).append(each)
        self.by_node = [file for file in plan if 1 < len(plan[file]) < world.size]
        self.by_one = [file for file in plan if len(plan[file]) == 1 < world.size]

    def nodes(self) -> list[tuple[int, ...]]:
        """Return the ranks of every node, if files are read by one rank of each."""
        readers = self._plan[self.by_node[0]] if self.by_node else {}
        return sorted(source.ranks for source in readers.values())

    def keys(self, file: str) -> list[str]:
        """Return the saved slices in a file."""
        return [key for key in self.file_of if self.file_of[key] == file]

    def sender(self, file: str) -> int:
        """Return the rank from which this one has a file."""
        readers = self._plan[file]
        return next((rank for rank, source in readers.items() if self._world.rank in source.ranks), next(iter(readers)))

    def in_turns(self, files: list[str]) -> Iterator[tuple[int, list[str]]]:
        """Yield which slices in files are sent by whom, in order: the first of every sender, then the next ones."""
        runs: dict[int, list[list[str]]] = {}
        for file in files:
            runs.setdefault(self.sender(file), []).extend(self._cut(self.keys(file)))
        for turn in zip_longest(*runs.values()):
            yield from ((rank, keys) for rank, keys in zip(runs, turn, strict=True) if keys)

    def _cut(self, keys: list[str]) -> Iterator[list[str]]:
        """Yield slices in a file in runs that are large enough to be sent at full speed."""
        run: list[str] = []
        for key in keys:
            run.append(key)
            if sum(each.live.nbytes for key in run for each in self.overlaps[key]) >= _RUN_BYTES:
                yield run
                run = []
        if run:
            yield run
