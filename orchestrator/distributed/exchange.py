"""Exchange: the ranks' sums of gradients become one, in the order of the lanes' tree.

All ranks issue the same collectives in the same order, from one thread, on a process group that nothing else uses: a
collective that is begun in another's callback blocks gloo's threads, and the ranks wait for each other for ever.
Collectives only move bytes here, and add nothing; so neither gloo nor NCCL decides about bits.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from orchestrator.distributed.flat_gradient import FlatGradient
from orchestrator.distributed.lanes import Lanes
from orchestrator.distributed.world import World
from orchestrator.host.background import BackgroundQueue


class Exchange:
    """One rank's side. begin before the last backward pass of an iteration, finish after it."""

    def __init__(self, gradient: FlatGradient, world: World, lanes: Lanes, backend: str) -> None:
        self._gradient, self._world = gradient, world
        roots = [lanes.roots(rank, world.size) for rank in range(world.size)]
        self._roots_of = [len(each) for each in roots]
        self._tree, _ = lanes.joins([span for each in roots for span in each])  # how received roots are added up
        self._device = gradient.flat.device
        on_gpu = self._device.type == "cuda"
        self._stream = torch.cuda.Stream(self._device) if on_gpu else None  # type: ignore[no-untyped-call]
        self._group = world.group
        self._received = torch.empty(0)
        if world.size > 1:
            if backend == "gloo":  # votes are gloo's as well; NCCL's half of a process group is ours alone by now
                self._group = dist.new_group(backend="gloo")
            chunk = max(piece.stop - piece.start for piece in gradient.pieces) // world.size
            self._received = torch.empty(chunk * sum(self._roots_of), device=self._device)
        self._queue = BackgroundQueue("gradient exchange", world.choose_device)
        weakref.finalize(self, self._queue.close)
        self._exchanged: list[Future[None]] = []

    def begin(self, joined: Sequence[Tensor], roots: Sequence[Tensor]) -> None:
        """Send pieces from now on, as the backward pass is through with them.

        joined: sums of earlier lanes that the gradient is added to, as far as the tree goes, in order of the lanes;
        roots: those before them, which go to the other ranks as they are.
        """
        self._exchanged = []

        def is_ready(number: int) -> None:
            there = torch.cuda.current_stream(self._device).record_event() if self._stream else None
            piece = self._gradient.pieces[number]
            self._exchanged.append(self._queue.submit(partial(self._exchange, piece, joined, roots, there)))

        self._gradient.watch(is_ready)

    def finish(self) -> None:
        """Wait until the gradient is the sum of all lanes, on every rank.

        Raises:
            RuntimeError: a peer is gone.
        """
        self._gradient.end_watch()
        for exchanged in self._exchanged:
            exchanged.result()
        if self._stream:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)

    @torch.no_grad()
    def _exchange(
        self, piece: slice, joined: Sequence[Tensor], roots: Sequence[Tensor], there: torch.cuda.Event | None
    ) -> None:
        with self._behind(there):
            gradient = self._gradient.flat[piece]
            for earlier in reversed(joined):
                gradient.add_(self._here(earlier[piece]))
            if self._world.size == 1:
                return
            parts = self._received_parts([*(self._here(root[piece]) for root in roots), gradient])
            chunk = gradient.numel() // self._world.size
            mine = gradient[self._world.rank * chunk :][:chunk]
            mine.copy_(added_up(parts, self._tree))
            gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its older name
            gather(gradient, mine, group=self._group)

    def _received_parts(self, roots: Sequence[Tensor]) -> list[Tensor]:
        """Send every rank its chunk of this rank's roots; return this rank's chunk of all, in the lanes' order."""
        size, rank = self._world.size, self._world.rank
        chunk, room = roots[0].numel() // size, self._received
        parts: dict[tuple[int, int], Tensor] = {}
        for number in range(max(self._roots_of)):
            senders = [sender for sender, count in enumerate(self._roots_of) if number < count]
            received, room = room[: len(senders) * chunk], room[len(senders) * chunk :]
            has_more = number < self._roots_of[rank]
            dist.all_to_all_single(
                received,
                roots[number] if has_more else roots[0][:0],
                [chunk if sender in senders else 0 for sender in range(size)],
                [chunk if has_more else 0] * size,
                group=self._group,
            )
            for sender, part in zip(senders, torch.split(received, chunk), strict=True):
                parts[sender, number] = part
        return [parts[key] for key in sorted(parts)]

    def _here(self, part: Tensor) -> Tensor:
        """Return a part on the device, where it waited in host memory."""
        return part.to(self._device, non_blocking=True)

    @contextmanager
    def _behind(self, there: torch.cuda.Event | None) -> Iterator[None]:
        """Work behind the backward pass, on a GPU on a stream of its own."""
        if self._stream is None or there is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(there)
            yield


def added_up(parts: Sequence[Tensor], tree: Sequence[int]) -> Tensor:
    """Add parts, overwriting them, in the tree's order; tree: to how many earlier sums each one is added."""
    waiting: list[Tensor] = []
    for part, joins in zip(parts, tree, strict=True):
        total = part
        for _ in range(joins):
            total = waiting.pop().add_(total)
        waiting.append(total)
    (total,) = waiting
    return total
