"""ReadOnce: reads the files of a state into live tensors, each by one rank or one of each node, and sends them on.

Knows no model and not which state it is. A ReadPlan says which rank reads which file, and where.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import zip_longest
from threading import Event

import torch
from fsspec.implementations.local import LocalFileSystem
from torch import Tensor

from orchestrator.checkpoint.restore.read_plan import ReadPlan, Source
from orchestrator.checkpoint.restore.staging import Staging
from orchestrator.checkpoint.store import Checkpoint
from orchestrator.checkpoint.tensor_file import FileRecord, own_pieces, stream_tensors
from orchestrator.distributed.world import World
from orchestrator.errors import CheckpointError
from orchestrator.storage.run_folder import RunFolder

_RUN_BYTES = 32 * 2**20  # tensors that are sent together


class ReadOnce:
    """One pass over files: a thread reads this rank's, and the thread that calls `run` sends them to the other ranks.

    All ranks send and receive in the same order, even if reading fails: then a tensor is sent as it is.
    from_storage_bytes: the bytes that this rank has read from storage.
    """

    def __init__(
        self,
        plan: ReadPlan,
        records: dict[str, FileRecord],
        tensors: dict[str, Tensor],
        checkpoint: Checkpoint,
        world: World,
        folder: RunFolder,
    ) -> None:
        self._plan, self._records, self._tensors, self._world, self._folder = plan, records, tensors, world, folder
        entries = checkpoint.state["tensors"].items()  # in the order of their files
        self._file_of = {name: entry["file"] for name, entry in entries if entry["file"] in plan}
        self._is_there = {name: Event() for name in self._file_of}
        is_on_gpu = world.device.type == "cuda"
        self._ready = torch.cuda.current_stream(world.device).record_event() if is_on_gpu else None
        self._begun: set[str] = set()
        self._read_again: list[str] = []  # files of which another reading may have been sent
        self._staging: Staging | None = None
        self.from_storage_bytes = 0

    def run(self) -> dict[str, dict[str, str]]:
        """Fill the tensors on all ranks; return the errors of all ranks: file -> label of its source -> why."""
        with self._world.part(self._nodes()) as node:
            return self._run(node)

    def _run(self, node: World) -> dict[str, dict[str, str]]:
        thread = ThreadPoolExecutor(1, "restore", initializer=self._world.choose_device)
        by_node = [file for file in self._plan if 1 < len(self._plan[file]) < self._world.size]
        by_one = [file for file in self._plan if len(self._plan[file]) == 1 < self._world.size]
        try:
            reading = thread.submit(self._read_mine)
            for world, files in ((node, by_node), (self._world, by_one)):  # each in an order that all in it know
                for rank, names in self._in_turns(files):
                    self._send(rank, names, world)
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
                self._send(self._sender(file), self._names(file), node if file in by_node else self._world)
        return errors

    def _nodes(self) -> list[tuple[int, ...]]:
        """Return the ranks of every node, if files are read by one rank of each."""
        readers = next((its for its in self._plan.values() if 1 < len(its) < self._world.size), {})
        return sorted(source.ranks for source in readers.values())

    def _names(self, file: str) -> list[str]:
        return [name for name in self._file_of if self._file_of[name] == file]

    def _sender(self, file: str) -> int:
        """Return the rank from which this one has a file."""
        readers = self._plan[file]
        return next((rank for rank, source in readers.items() if self._world.rank in source.ranks), next(iter(readers)))

    def _in_turns(self, files: list[str]) -> Iterator[tuple[int, list[str]]]:
        """Yield which tensors of files are sent by whom, in order: the first of every sender, then the next ones."""
        runs: dict[int, list[list[str]]] = {}
        for file in files:
            runs.setdefault(self._sender(file), []).extend(self._cut(self._names(file)))
        for turn in zip_longest(*runs.values()):
            yield from ((rank, names) for rank, names in zip(runs, turn, strict=True) if names)

    def _cut(self, names: list[str]) -> Iterator[list[str]]:
        """Yield tensors of a file in runs that are large enough to be sent at full speed."""
        run: list[str] = []
        for name in names:
            run.append(name)
            if sum(self._tensors[each].nbytes for each in run) >= _RUN_BYTES:
                yield run
                run = []
        if run:
            yield run

    def _send(self, rank: int, names: list[str], world: World) -> None:
        if rank == self._world.rank:
            for name in names:
                self._is_there[name].wait()
        world.broadcast([self._tensors[name] for name in names], rank)

    def _read_mine(self) -> dict[str, list[str]]:
        """Read this rank's files into the live tensors; return its errors: file -> label of the source, why."""
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
                self._let_go(self._names(file))
        finally:
            self._let_go(self._is_there)  # even if reading failed: the others wait for this rank
        return errors

    def _let_go(self, names: Iterable[str]) -> None:
        for name in names:
            self._is_there[name].set()

    def _read(self, file: str, source: Source) -> None:
        if file in self._begun:
            self._read_again.append(file)
        self._begun.add(file)
        fs = self._folder.fs if source.is_storage else LocalFileSystem()
        counter = self._count if source.is_storage else lambda _bytes: None
        path, record = f"{source.folders[file]}/{file}", self._records[file]
        pieces = self._staging.pieces if self._staging else own_pieces
        for name, tensor in stream_tensors(fs, path, record, partial(self._place_of, file), counter, pieces):
            if self._staging:
                self._staging.finish()
            if tensor is not self._tensors[name]:
                self._tensors[name].copy_(tensor)
            self._is_there[name].set()

    def _place_of(self, file: str, name: str, dtype: torch.dtype, shape: list[int]) -> Tensor:
        if self._file_of.get(name) != file:  # damaged: it must not overwrite a tensor of another file
            raise CheckpointError(f"{file} holds {name}, which is none of its tensors")
        live = self._tensors[name]
        if live.dtype != dtype or list(live.shape) != shape:
            raise CheckpointError(f"{name} is not of the model's shape and type")
        return live if live.is_contiguous() else torch.empty(shape, dtype=dtype)

    def _count(self, size_bytes: int) -> None:
        self.from_storage_bytes += size_bytes
