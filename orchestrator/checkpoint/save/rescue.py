"""Rescuer: at the end of an attempt, puts the state of the last completed iteration into this node's memory.

Needs no other rank. The survivors of a node write the shares of the ranks that are gone, as far as they hold the same
slices. Each knows only what lies in node memory, where every rank that lives holds a file lock. Knows no storage.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from orchestrator.checkpoint.save.node_memory import NodeMemory, share_path, spare_memory_bytes
from orchestrator.checkpoint.save.node_topology import NodeTopology
from orchestrator.checkpoint.save.plan import SavePlan
from orchestrator.checkpoint.save.snapshot_buffer import SnapshotBuffer
from orchestrator.checkpoint.save.state_lock import StateLock
from orchestrator.checkpoint.save.to_memory import SnapshotWriter
from orchestrator.checkpoint.state import TrainState
from orchestrator.distributed.world import World
from orchestrator.errors import CheckpointError, RolledBackError, UserError

logger = logging.getLogger(__name__)

STAND_IN_S = 2.0  # after which the share of a process that lives and does nothing is written by another
_STEP_S = 10.0  # in which a step that has begun ends


class Rescuer:
    """One rank's. It holds the state until `close`. plan: `plan_save` for this run."""

    def __init__(
        self,
        state: TrainState,
        world: World,
        nodes: NodeTopology,
        plan: Callable[..., SavePlan],
        writer: SnapshotWriter,
        lock: StateLock,
    ) -> None:
        self._state: TrainState | None = state
        self._world, self._nodes, self._plan = world, nodes, plan
        self._writer, self._state_lock = writer, lock
        self._one_at_a_time = threading.Lock()  # taken before the StateLock
        self._rescued: tuple[int | None] | None = None  # the answer, once there is one

    @contextmanager
    def rescue_on_failure(self) -> Iterator[None]:
        """If the body fails, such as in a collective whose peer is gone, rescue the state before the error goes on."""
        with ExitStack() as on_failure:
            on_failure.callback(self.rescue)
            try:
                yield
            except (UserError, RolledBackError, KeyboardInterrupt, SystemExit):
                on_failure.pop_all()  # nobody wants this state: all ranks raise alike, or the user ends it all
                raise
            on_failure.pop_all()

    def rescue(self, stand_in_s: float = STAND_IN_S) -> int | None:
        """Put the state of the last completed iteration into this node's memory; return its number, or None.

        For the end of an attempt, from any thread: the state changes no more after this. Every later call returns the
        same.

        stand_in_s: after which the share of a process of this node that lives and does nothing is written here.
        """
        self._writer.pool.is_ending = True
        with self._one_at_a_time:
            if self._rescued is None:
                began_s = time.perf_counter()
                try:
                    self._world.choose_device()
                    self._rescued = (self._save(stand_in_s),)
                except Exception as error:  # a broken GPU, full memory, ...: the attempt ends, earlier states are there
                    self._rescued = (None,)
                    logger.warning("the last iteration could not be rescued: %s: %s", type(error).__name__, error)
                if self._rescued[0] is not None:
                    seconds = time.perf_counter() - began_s
                    logger.info("iteration %d is safe in node memory (%.2f s)", self._rescued[0], seconds)
            return self._rescued[0]

    def close(self) -> None:
        """Wait for a rescue that is under way, let go of the state, and answer None from now on if there was none."""
        with self._one_at_a_time:
            self._rescued, self._state = self._rescued or (None,), None

    def _save(self, stand_in_s: float) -> int | None:
        """Write this rank's share and those of ranks that are gone; return the iteration, None if that cannot be.

        Raises:
            CheckpointError, TimeoutError: node memory has no room, the GPU or the copier does not answer.
        """
        memory, state, pool = self._nodes.memory, self._state, self._writer.pool
        assert state
        if not self._state_lock.hold_for_good(_STEP_S) or memory is None:
            return None
        self._writer.settle()
        if not pool.is_usable or not state.optimizer.state:
            return None
        scaler = self._writer.gpu.scaler_for_rescue() if self._writer.gpu else None
        val_loss = state.val_loss if state.is_evaluated else None
        plan = self._plan(state, val_loss=val_loss, scaler=scaler)
        if all(buffer.iter_num != plan.iter_num for buffer in pool.buffers):
            self._writer.write_now(plan, pool.free_buffer(), self._nodes.share)
        memory.release_liveness_lock()
        self._write_missing_shares(plan, memory, stand_in_s)
        return plan.iter_num

    def _write_missing_shares(self, plan: SavePlan, memory: NodeMemory, stand_in_s: float) -> None:
        """Wait for the other shares of this node; write those of ranks that are gone, or stand still for too long."""
        others = [share for share in range(self._nodes.shares) if share != self._nodes.share]
        missing = [share for share in others if self._nodes.can_write(plan.files, share)]
        began_s = time.monotonic()
        while missing := [
            share for share in missing if not share_path(memory.path, plan.name, share, self._nodes.shares).exists()
        ]:
            if memory.has_newer(plan.iter_num, self._world.attempt):  # of a rank that came further
                return
            is_late = time.monotonic() - began_s > stand_in_s
            for share in missing:
                if memory.try_stand_in(self._world.attempt, share) or is_late:
                    self._write_share(plan, memory, share)
                    break
            else:
                time.sleep(0.01)

    def _write_share(self, plan: SavePlan, memory: NodeMemory, share: int) -> None:
        layouts = self._writer.layouts(plan.files, share)
        if sum(layout.size_bytes for layout in layouts.values()) > spare_memory_bytes():
            raise CheckpointError("memory has no room for the share of a rank that is gone")
        self._writer.write_now(plan, SnapshotBuffer(memory, layouts), share)
