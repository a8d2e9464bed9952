"""SnapshotWriter: copies states into node memory in the background, while training goes on. Knows no storage.

The loop's thread begins a snapshot and joins its copy before the next change of the state. The copier's thread fills
the buffer, checksums it and publishes it. On a GPU there is no second copy on the device: the bytes go straight into
the mapped files, which are pinned for that. If node memory fails, the run goes on without it.
"""

from __future__ import annotations

import time
from concurrent.futures import Future, TimeoutError
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from orchestrator.checkpoint.save.buffers import BufferPool
from orchestrator.checkpoint.save.gpu import Gpu
from orchestrator.checkpoint.save.node_topology import NodeTopology
from orchestrator.checkpoint.save.plan import Files, SavePlan, tensors_in
from orchestrator.checkpoint.save.policy import SnapshotCost
from orchestrator.checkpoint.save.snapshot_buffer import SnapshotBuffer
from orchestrator.checkpoint.state import ScalerValues
from orchestrator.checkpoint.tensor_file import Layout, bytes_of, layout_of
from orchestrator.distributed.world import World
from orchestrator.host.background import BackgroundQueue

_ROOM_S = 30.0  # in which the copier ends its current call; to reserve a large buffer takes seconds
_PIECE_BYTES = 64 * 2**20


class SnapshotWriter:
    """One rank's. Made, it shows that this process lives, forgets earlier attempts' states and reserves its buffers.

    files: those of any state of this run. keep: the name of the state that stays until there is a newer one.
    pool: its buffers; cost: of its snapshots; copier: its thread; gpu: its streams, None on a CPU.
    """

    def __init__(
        self, scaler: torch.amp.GradScaler, world: World, nodes: NodeTopology, files: Files, keep: str
    ) -> None:
        self._scaler, self._world, self._nodes = scaler, world, nodes
        self.gpu = Gpu(world.device, scaler) if world.device.type == "cuda" else None
        self.copier = BackgroundQueue("copy of the state", world.choose_device)
        # the copy of the state that was offered: on a CPU done; on a GPU the event at its end, once it is in a stream
        self._copied: Future[torch.cuda.Event | None] | None = None
        self.pool = BufferPool(nodes, world)
        self.cost = SnapshotCost(world.device, nodes.shares)
        if nodes.memory:
            nodes.memory.hold_liveness_lock(world.attempt, nodes.share)
            nodes.memory.forget_other_than(world.attempt, keep)
            layouts = self.layouts(files, nodes.share)
            self.copier.submit(partial(self.pool.reserve, layouts), self.pool.give_up)

    def begin(self, plan: SavePlan) -> tuple[SnapshotBuffer, Future[dict[str, Any]]]:
        """Begin a snapshot; return its buffer, and its state.json (but for the records) once it is published.

        Hold the StateLock. Call `join` before anything of the state changes.
        """
        buffer = self.pool.free_buffer()
        scaler, self._copied = ScalerValues(self._scaler), Future()
        tensors = {**plan.tensors_on(self._world.rank), **scaler.tensors}
        write = partial(self._write, tensors, scaler, self._copied, buffer, plan.without_tensors())
        published = self.copier.submit(write, self.pool.give_up)
        if len(self.pool.buffers) < 2:
            self.copier.submit(partial(self.pool.replace_older_attempts, plan.name), self.pool.give_up)
        return buffer, published

    def join(self) -> float:
        """Wait until the state has been copied; return how long that took in seconds, 0.0 if no copy was under way."""
        if not self._copied:
            return 0.0
        began_s = time.perf_counter()
        if event := self._copied.result():
            event.synchronize()  # on the host, which can tell how long it takes
        self._copied = None
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

    def _write(
        self,
        tensors: dict[str, Tensor],
        scaler: ScalerValues,
        copied: Future[torch.cuda.Event | None],
        buffer: SnapshotBuffer,
        plan: SavePlan,
    ) -> dict[str, Any]:
        """Copy live tensors into a buffer, publish it, and return its state.json."""
        began_s, cpu_began_s = time.perf_counter(), time.thread_time()
        event = None
        try:
            places = {**buffer.open(), **scaler.places}
            if self.gpu:
                event = self.gpu.begin_copy(tensors, places)
            else:
                copy_tensors(tensors, places)
        finally:
            tensors.clear()  # what comes now takes long: it must not keep live tensors
            copied.set_result(event)  # even if the copy has failed, the loop goes on
        if event:
            event.synchronize()
        description = {**plan.description, "scaler": scaler.state_dict()}
        buffer.publish(plan.name, self._nodes.share, self._nodes.shares, description)
        size_bytes = sum(map(len, buffer.contents.values()))
        self.cost.copied(time.perf_counter() - began_s, time.thread_time() - cpu_began_s, size_bytes)
        return description


def copy_tensors(tensors: dict[str, Tensor], places: dict[str, memoryview]) -> None:
    """Copy tensors that lie in host memory to their places, by key.

    On this thread alone, and without Python's lock: torch's copy would take the cores of the step.
    """
    for name, place in places.items():
        source = bytes_of(tensors[name])
        for start in range(0, len(source), _PIECE_BYTES):
            end = start + _PIECE_BYTES
            np.copyto(np.frombuffer(place[start:end], np.uint8), np.frombuffer(source[start:end], np.uint8))
