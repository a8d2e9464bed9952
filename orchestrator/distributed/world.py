"""World: this process among the others of the run, and the few collectives that the program needs.

Works without a process group too, as a world of one. Only JSON and tensors travel: nothing is unpickled. JSON and
votes go through host memory (the gloo half of the process group), so they never wait for a GPU.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from typing import Any, ParamSpec, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from orchestrator import errors
from orchestrator.errors import UserError

P = ParamSpec("P")
T = TypeVar("T")
_BUCKET_BYTES = 32 * 2**20
_LARGE_BYTES = 2**20


@dataclass(frozen=True, eq=False)
class Agreement:
    """An all-reduce on its way: the highest answer of all ranks to each of several questions."""

    answers: Tensor
    work: dist.Work | None

    def result(self) -> list[int]:
        """Wait for all ranks' answers and return the highest of each: the same on all ranks."""
        if self.work:
            self.work.wait()
        return [int(answer) for answer in self.answers.tolist()]


@dataclass(frozen=True)
class World:
    """Rank, size and device of this process; attempt names this start of the process group, the same on all ranks.

    group: the processes that the collectives are among, None for the default group.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    attempt: str = "local"
    group: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def choose_device(self) -> None:
        """Make this process's device the current one of a new thread, which is on the machine's first GPU else."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)

    def broadcast(self, tensors: list[Tensor], source: int) -> None:
        """Overwrite tensors on every rank with those of the source rank; small ones travel together."""
        if self.size == 1:
            return
        _transfer(tensors, partial(dist.broadcast, src=source, group=self.group), is_source=source == self.rank)

    def send(self, tensors: list[Tensor], source: int, target: int) -> None:
        """Overwrite tensors on one rank with those of another; to the other ranks this call is nothing."""
        if self.rank == source != target:
            _transfer(tensors, partial(dist.send, dst=target, group=self.group), is_source=True)
        elif self.rank == target != source:
            _transfer(tensors, partial(dist.recv, src=source, group=self.group), is_source=False)

    def broadcast_from_each(self, tensors: list[Tensor], sources: list[int]) -> None:
        """Overwrite tensors on every rank with those of its source; sources: by rank, a source is its own."""
        parts = {source: [rank for rank, its in enumerate(sources) if its == source] for source in sorted(set(sources))}
        source = sources[self.rank]
        if len(parts) == 1:
            self.broadcast(tensors, source)
            return
        with self.part(list(parts.values())) as mine:
            mine.broadcast(tensors, source)

    @contextmanager
    def part(self, parts: Sequence[Sequence[int]]) -> Iterator[World]:
        """Split the world into parts and yield this rank's: ranks keep their numbers; called on all ranks alike."""
        mine = self
        for ranks in parts:  # every rank makes all groups, in the same order
            group = dist.new_group(list(ranks)) if len(ranks) > 1 else None
            if self.rank in ranks:
                mine = replace(self, size=len(ranks), group=group)
        yield mine
        if mine.group and mine is not self:  # after an error it stays: with a peer that is gone, this would wait
            dist.destroy_process_group(mine.group)

    def gather_json(self, value: Any) -> list[Any]:
        """Return every rank's value, by rank, on every rank."""
        if self.size == 1:
            return [value]
        mine = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = torch.zeros(self.size, dtype=torch.int64)
        lengths[self.rank] = len(mine)
        dist.all_reduce(lengths, group=self.group)
        sizes = lengths.tolist()
        padded = torch.zeros(max(sizes), dtype=torch.uint8)
        padded[: len(mine)] = mine
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded, group=self.group)
        return [json.loads(bytes(part[:size].numpy())) for part, size in zip(parts, sizes, strict=True)]

    def collectively(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run `call` on every rank. If any rank raises a UserError, raise the first one on all ranks.

        Otherwise a rank would wait in the next collective for one that has left.
        """
        value, mine = None, None
        try:
            value = call(*args, **kwargs)
        except UserError as error:
            mine = [type(error).__name__, str(error)]
        for rank, found in enumerate(self.gather_json(mine)):
            if found:
                name, text = found
                raise getattr(errors, name)(text if rank == 0 else f"rank {rank}: {text}")
        return cast(T, value)

    def on_main(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run `call` on rank 0 only, and return its value on every rank: one that JSON knows.

        Raises:
            UserError: rank 0's, on all ranks.
        """
        mine: list[Any] = [None, None, ""]
        if self.is_main:
            try:
                mine[0] = call(*args, **kwargs)
            except UserError as error:
                mine = [None, type(error).__name__, str(error)]
        value, name, text = self.gather_json(mine)[0]
        if name:
            raise getattr(errors, name)(text)
        return cast(T, value)

    def sum(self, tensor: Tensor) -> Tensor:
        """Add up a tensor over all ranks, in place, and return it."""
        if self.size > 1:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def agree(self, answers: Sequence[int]) -> Agreement:
        """Ask all ranks, without waiting for them."""
        mine = torch.tensor(answers, dtype=torch.int64)
        work = dist.all_reduce(mine, dist.ReduceOp.MAX, self.group, async_op=True) if self.size > 1 else None
        return Agreement(mine, work)

    def side_group(self) -> World:
        """Return the same ranks with a process group of their own in host memory, for one other thread.

        It waits as long as it takes: uploads differ in length by more than a training step may.
        """
        if self.size == 1:
            return self
        return replace(self, group=dist.new_group(backend="gloo", timeout=timedelta(days=1)))


def _transfer(tensors: list[Tensor], move: Callable[[Tensor], Any], *, is_source: bool) -> None:
    """Move tensors from this rank, the source, or to it: in as few messages as pays."""
    if not is_source:
        for tensor in tensors:
            tensor.detach().zero_()  # receiving into memory that nobody has touched takes three times as long
    for bucket in _buckets(tensors):
        if len(bucket) == 1:
            move(bucket[0])
            continue
        flat = torch.cat([tensor.detach().reshape(-1) for tensor in bucket])
        move(flat)
        if not is_source:
            for tensor, part in zip(bucket, torch.split(flat, [tensor.numel() for tensor in bucket]), strict=True):
                tensor.detach().copy_(part.view_as(tensor))


def _buckets(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Yield what travels in one message: small tensors together, of one type and device; each large one alone.

    To put large ones together takes longer than to send them.
    """
    bucket: list[Tensor] = []
    for tensor in tensors:
        if tensor.nbytes >= _LARGE_BYTES:
            yield [tensor]
            continue
        is_alike = bucket and (tensor.dtype, tensor.device) == (bucket[0].dtype, bucket[0].device)
        if bucket and not (is_alike and sum(each.nbytes for each in bucket) + tensor.nbytes <= _BUCKET_BYTES):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket
