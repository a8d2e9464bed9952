"""ReadOnce: reads the files of a state into live slices, each by one rank or one of each node, and sends them on.

A saved slice that a rank wants as it is goes straight into its place. Others it keeps in host memory until the pass has
ended: those that only other ranks want, and those that were cut elsewhere when they were saved. No rank receives what
it does not want. Knows no model and not which state it is. A ReadPlan says which rank reads which file, and where.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import zip_longest
from threading import Event

import torch
from fsspec.implementations.local import LocalFileSystem
from torch import Tensor

from orchestrator.checkpoint.restore.overlap import Overlap
from orchestrator.checkpoint.restore.read_plan import ReadPlan, Source
from orchestrator.checkpoint.restore.staging import Staging
from orchestrator.checkpoint.tensor_file import FileRecord, own_pieces, stream_tensors
from orchestrator.distributed.world import World
from orchestrator.errors import CheckpointError
from orchestrator.storage.run_folder import RunFolder

_RUN_BYTES = 32 * 2**20  # tensors that are sent together


class ReadOnce:
    """One pass over files: a thread reads this rank's, and the thread that calls `run` sends them to the other ranks.

    All ranks send and receive in the same order, even if reading fails: then a slice is sent as it is.
    wanted: file -> what is wanted of it. from_storage_bytes: the bytes that this rank has read from storage.
    """

    def __init__(
        self,
        plan: ReadPlan,
        records: Mapping[str, FileRecord],
        wanted: Mapping[str, Sequence[Overlap]],
        world: World,
        folder: RunFolder,
    ) -> None:
        self._plan, self._records, self._world, self._folder = plan, records, world, folder
        self._file_of: dict[str, str] = {}  # by key of a saved slice, in the order of their files
        self._overlaps: dict[str, list[Overlap]] = {}
        for file in plan:
            for each in wanted[file]:
                self._file_of[each.saved.key] = file
                self._overlaps.setdefault(each.saved.key, []).append(each)
        self._read_for_others: dict[str, Tensor] = {}  # by key
        self._is_there = {key: Event() for key in self._file_of}
        is_on_gpu = world.device.type == "cuda"
        self._ready = torch.cuda.current_stream(world.device).record_event() if is_on_gpu else None
        self._begun: set[str] = set()
        self._read_again: list[str] = []  # files of which another reading may have been sent
        self._staging: Staging | None = None
        self.from_storage_bytes = 0

    def run(self) -> dict[str, dict[str, str]]:
        """Fill the slices on all ranks; return the errors of all ranks: file -> label of its source -> why."""
        with self._world.part(self._nodes()) as node:
            return self._run(node)

    def _run(self, node: World) -> dict[str, dict[str, str]]:
        thread = ThreadPoolExecutor(1, "restore", initializer=self._world.choose_device)
        by_node = [file for file in self._plan if 1 < len(self._plan[file]) < self._world.size]
        by_one = [file for file in self._plan if len(self._plan[file]) == 1 < self._world.size]
        try:
            reading = thread.submit(self._read_mine)
            for world, files in ((node, by_node), (self._world, by_one)):  # each in an order that all in it know
                for rank, keys in self._in_turns(files):
                    self._send(rank, keys, world)
            mine = reading.result()
        finally:
            thread.shutdown(wait=False)  # where a peer is gone, the rest of a file is not waited for
        errors: dict[str, dict[str, str]] = {}
        again = set()
        for found, read_again in self._world.gather_json([mine, self._read_again]):
            again.update(read_again)
            for file, (label, why) in found.items():
                errors.setdefault(file, {}).setdefault(label, why)
        for file in sorted(again - errors.keys()):
            if len(self._plan[file]) < self._world.size:
                self._send(self._sender(file), self._keys(file), node if file in by_node else self._world)
        return errors

    def _nodes(self) -> list[tuple[int, ...]]:
        """Return the ranks of every node, if files are read by one rank of each."""
        readers = next((its for its in self._plan.values() if 1 < len(its) < self._world.size), {})
        return sorted(source.ranks for source in readers.values())

    def _keys(self, file: str) -> list[str]:
        return [key for key in self._file_of if self._file_of[key] == file]

    def _sender(self, file: str) -> int:
        """Return the rank from which this one has a file."""
        readers = self._plan[file]
        return next((rank for rank, source in readers.items() if self._world.rank in source.ranks), next(iter(readers)))

    def _in_turns(self, files: list[str]) -> Iterator[tuple[int, list[str]]]:
        """Yield which slices in files are sent by whom, in order: the first of every sender, then the next ones."""
        runs: dict[int, list[list[str]]] = {}
        for file in files:
            runs.setdefault(self._sender(file), []).extend(self._cut(self._keys(file)))
        for turn in zip_longest(*runs.values()):
            yield from ((rank, keys) for rank, keys in zip(runs, turn, strict=True) if keys)

    def _cut(self, keys: list[str]) -> Iterator[list[str]]:
        """Yield slices in a file in runs that are large enough to be sent at full speed."""
        run: list[str] = []
        for key in keys:
            run.append(key)
            if sum(each.live.nbytes for key in run for each in self._overlaps[key]) >= _RUN_BYTES:
                yield run
                run = []
        if run:
            yield run

    def _send(self, rank: int, keys: list[str], world: World) -> None:
        """Send slices from a rank to those that want them: to all at once, or to one after the other."""
        if rank == self._world.rank:
            for key in keys:
                self._is_there[key].wait()
        sent = [each for key in keys for each in self._overlaps[key]]
        world.broadcast([each.live for each in sent if each.wanted.is_replicated(self._world.size)], rank)
        apart = [each for each in sent if not each.wanted.is_replicated(self._world.size)]
        for other in range(self._world.size):
            if self._world.rank in (rank, other):
                world.send([self._here(each) for each in apart if other in each.wanted.holders], rank, other)

    def _here(self, overlap: Overlap) -> Tensor:
        """Return the memory of this rank with these elements."""
        if self._world.rank in overlap.wanted.holders:
            return overlap.live
        content = self._read_for_others.get(overlap.saved.key)
        if content is None:  # it could not be read
            return torch.empty_like(overlap.live, device=self._world.device)
        return overlap.within(content).to(self._world.device)

    def _read_mine(self) -> dict[str, list[str]]:
        """Read this rank's files into the live slices; return its errors: file -> label of the source, why."""
        errors = {}
        try:
            reads_any = any(self._world.rank in readers for readers in self._plan.values())
            self._staging = Staging(self._world.device, self._ready) if self._ready and reads_any else None
            for file, readers in self._plan.items():
                if source := readers.get(self._world.rank):
                    try:
                        self._folder.read_with_retries(self._read, file, source)
                    except CheckpointError as error:
                        errors[file] = [source.label, str(error)]
                self._let_go(self._keys(file))
        finally:
            self._let_go(self._is_there)  # even if reading failed: the others wait for this rank
        return errors

    def _let_go(self, keys: Iterable[str]) -> None:
        for key in keys:
            self._is_there[key].set()

    def _read(self, file: str, source: Source) -> None:
        if file in self._begun:
            self._read_again.append(file)
        self._begun.add(file)
        fs = self._folder.fs if source.is_storage else LocalFileSystem()
        counter = self._count if source.is_storage else lambda _bytes: None
        path, record = f"{source.folders[file]}/{file}", self._records[file]
        pieces = self._staging.pieces if self._staging else own_pieces
        for key, content in stream_tensors(fs, path, record, partial(self._place_of, file), counter, pieces):
            if self._staging:
                self._staging.finish()
            for each in self._overlaps[key]:
                if content is not each.live and self._world.rank in each.wanted.holders:
                    each.live.copy_(each.within(content).view_as(each.live))
            self._is_there[key].set()

    def _place_of(self, file: str, key: str, dtype: torch.dtype, shape: list[int]) -> Tensor:
        if self._file_of.get(key) != file:  # damaged: it must not overwrite a tensor of another file
            raise CheckpointError(f"{file} holds {key}, which is none of its tensors")
        found = self._overlaps[key]
        saved, is_mine = found[0].saved, [self._world.rank in each.wanted.holders for each in found]
        is_alike = all((each.live.dtype, each.wanted.global_shape) == (dtype, saved.global_shape) for each in found)
        if not is_alike or list(saved.tensor.shape) != shape:
            raise CheckpointError(f"{key} is not of the model's shape and type")
        if is_mine == [True] and found[0].live.is_contiguous():
            return found[0].live
        content = torch.empty(shape, dtype=dtype)
        if not all(is_mine):
            self._read_for_others[key] = content
        return content

    def _count(self, size_bytes: int) -> None:
        self.from_storage_bytes += size_bytes
