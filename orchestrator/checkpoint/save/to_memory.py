"""SnapshotWriter: copies states into node memory in the background, while training goes on. Knows no storage.

The loop's thread begins a snapshot and joins its copy before the next change of the state. The copier's thread fills
the buffer, checksums it and publishes it. If node memory fails, the run goes on without it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, TimeoutError
from contextlib import suppress
from functools import partial
from typing import Any

import torch

from orchestrator.checkpoint.save.async_copy import AsyncCopy, copy_tensors
from orchestrator.checkpoint.save.buffers import BufferPool
from orchestrator.checkpoint.save.gpu import Gpu
from orchestrator.checkpoint.save.node_topology import NodeTopology
from orchestrator.checkpoint.save.plan import Files, SavePlan, tensors_in
from orchestrator.checkpoint.save.policy import SnapshotCost
from orchestrator.checkpoint.save.snapshot_buffer import SnapshotBuffer
from orchestrator.checkpoint.state import ScalerValues
from orchestrator.checkpoint.tensor_file import Layout, layout_of
from orchestrator.distributed.world import World
from orchestrator.host.background import BackgroundQueue

_ROOM_S = 30.0  # in which the copier ends its current call; to reserve a large buffer takes seconds


class SnapshotWriter:
    """One rank's. pool: its buffers; cost: of its snapshots; copier: its thread; gpu: its streams, None on a CPU."""

    def __init__(self, scaler: torch.amp.GradScaler, world: World, nodes: NodeTopology) -> None:
        self._scaler, self._world, self._nodes = scaler, world, nodes
        self.gpu = Gpu(world.device, scaler) if world.device.type == "cuda" else None
        self.copier = BackgroundQueue("copy of the state", world.choose_device)
        self._copy: AsyncCopy | None = None
        self.pool = BufferPool(nodes, world)
        self.cost = SnapshotCost(world.device, nodes.shares)

    def open(self, files: Files, keep: str) -> None:
        """Show that this process lives, forget the states of earlier attempts, reserve buffers in the background.

        files: those of any state of this run. keep: the name of the state that stays until there is a newer one.
        """
        if memory := self._nodes.memory:
            memory.hold_liveness_lock(self._world.attempt, self._nodes.share)
            memory.forget_other_than(self._world.attempt, keep)
            layouts = self.layouts(files, self._nodes.share)
            self.copier.submit(partial(self._run, self.pool.reserve, layouts))

    def begin(self, plan: SavePlan) -> tuple[SnapshotBuffer, Future[dict[str, Any]]]:
        """Begin a snapshot; return its buffer, and its state.json (but for the records) once it is published.

        Hold the StateLock. Call `join` before anything of the state changes.
        """
        buffer = self.pool.free_buffer()
        self._copy = AsyncCopy(plan.tensors_on(self._world.rank), ScalerValues(self._scaler), self.gpu)
        published = self.copier.submit(partial(self._run, self._write, self._copy, buffer, plan.without_tensors()))
        if len(self.pool.buffers) < 2:
            self.copier.submit(partial(self._run, self.pool.replace_older_attempts, plan.name))
        return buffer, published

    def join(self) -> float:
        """Wait until the state has been copied; return how long that took in seconds, 0.0 if no copy was under way."""
        if not self._copy:
            return 0.0
        began_s = time.perf_counter()
        self._copy.join()
        self._copy = None
        return time.perf_counter() - began_s

    def write_now(self, plan: SavePlan, buffer: SnapshotBuffer, share: int) -> None:
        """Write a share of a state in the calling thread, though the loop's stream may be stuck.

        Raises:
            CheckpointError: the GPU does not answer.
            OSError: node memory has failed.
        """
        copy = self.gpu.copy_for_rescue if self.gpu else copy_tensors
        copy(plan.tensors_on(self._world.rank), buffer.open())
        buffer.publish(plan.name, share, self._nodes.shares, plan.description)

    def layouts(self, files: Files, share: int) -> dict[str, Layout]:
        """Return the layouts of the files in a share of this node."""
        mine = self._nodes.share_of(files, share)
        return {file: layout_of(tensors_in(slices)) for file, slices in mine.items()}

    def settle(self) -> None:
        """Wait until nothing is done in the background.

        Raises:
            TimeoutError: it takes too long.
        """
        if self.copier.last:
            self.copier.last.exception(timeout=_ROOM_S)

    def close(self, is_finished: bool) -> None:
        """Release the buffers and leave node memory; if the run is finished, delete its states there."""
        self.copier.submit(partial(self.pool.release, is_finished))
        self.copier.close()
        with suppress(TimeoutError):  # it ends its current call first
            self.settle()
        if self._nodes.memory:
            self._nodes.memory.close(is_finished)

    def _run(self, call: Callable[..., Any], *args: Any) -> Any:
        try:
            return call(*args)
        except Exception as error:  # whatever a memory file system or CUDA fails with, training goes on without it
            self.pool.give_up(error)
            raise

    def _write(self, copy: AsyncCopy, buffer: SnapshotBuffer, plan: SavePlan) -> dict[str, Any]:
        began_s, cpu_began_s = time.perf_counter(), time.thread_time()
        try:
            copy.run(buffer.open())
            description = {**plan.description, "scaler": copy.scaler.state_dict()}
            buffer.publish(plan.name, self._nodes.share, self._nodes.shares, description)
        finally:
            copy.release()
        self.cost.copied(time.perf_counter() - began_s, time.thread_time() - cpu_began_s)
        return description
