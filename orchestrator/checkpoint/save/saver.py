"""Saver: keeps the training state safe, in the memory of every node and in storage, while training goes on.

    loop:      offer(state) | forward, backward     join() | optimizer.step, the next iteration ...
    copier:                 | live tensors -> node memory  | checksums, rename                   (to_memory.py)
    uploader:                                                | node memory -> storage, commit    (to_storage.py)
    rescue:    any thread, once, at the end of an attempt: live tensors -> node memory           (rescue.py)

The loop waits for the copy alone, which runs behind its forward and backward: tensors do not change until
`optimizer.step`. All ranks decide alike, from statuses that travel with the loop's own agreement. If node memory cannot
be used, checkpoints are written straight from the live tensors, and training pauses for them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from orchestrator.checkpoint.save.node_topology import NodeTopology
from orchestrator.checkpoint.save.plan import files_of, plan_save
from orchestrator.checkpoint.save.policy import SaveIntervals, SaveScheduler, SaveStatus
from orchestrator.checkpoint.save.rescue import STAND_IN_S, Rescuer
from orchestrator.checkpoint.save.state_lock import StateLock
from orchestrator.checkpoint.save.to_memory import SnapshotWriter
from orchestrator.checkpoint.save.to_storage import CheckpointEvent, CheckpointWriter
from orchestrator.checkpoint.state import TrainState, forecast
from orchestrator.checkpoint.store import CheckpointStore
from orchestrator.distributed.world import World


class Saver:
    """One rank's face for the loop. Call every method but `rescue` and `close` on all ranks at the same iteration.

    environment: what decides the bits besides the state, to be stored with it.
    rescuer: saves the last completed iteration when an attempt ends.
    is_finishing: the last state is on its way to storage, and training waits for it.
    paused_s: how long training has waited for states to be saved, in all.
    changed_at_s: when the last iteration was completed, in seconds since 1970. snapshot_cost: of this rank's.
    """

    def __init__(
        self,
        state: TrainState,
        world: World,
        store: CheckpointStore,
        nodes: NodeTopology,
        environment: dict[str, Any],
        intervals: SaveIntervals,
    ) -> None:
        self.environment = environment
        self.is_finishing, self.paused_s, self.changed_at_s = False, 0.0, time.time()
        self._world, self._intervals, self._scheduler = world, intervals, SaveScheduler(intervals)
        self._agreed = SaveStatus(is_copying=True, is_uploading=True)  # until all ranks have spoken
        self._is_copy_for_storage = False
        self._storage = CheckpointWriter(world, store, intervals.keep, state.iter_num if state.is_durable else -1)
        files = files_of(forecast(state), world.size, state.placement)
        kept = state.resumed_from.checkpoint.name if state.resumed_from else ""
        self._memory = SnapshotWriter(state.scaler, world, nodes, files, kept)
        self.snapshot_cost = self._memory.cost
        self._plan = partial(plan_save, world=world, environment=environment)
        self._lock = StateLock()
        self.rescuer = Rescuer(state, world, nodes, self._plan, self._memory, self._lock)

    def request(self) -> SaveStatus:
        """Return this rank's SaveStatus, for an agreement that runs while a step does."""
        self._memory.cost.step_begins()
        memory, storage = self._memory, self._storage
        interval = self._intervals.snapshot_interval or memory.cost.interval()
        is_copying, is_uploading = memory.copier.is_busy, storage.uploader.is_busy
        uploads_left = storage.begun - len(storage.ended)
        return SaveStatus(is_copying, is_uploading, uploads_left, interval, memory.pool.is_missing)

    def apply(self, highest: Sequence[int]) -> None:
        """Take what all ranks have agreed on: the highest of each integer of their SaveStatus."""
        self._memory.cost.step_ended()
        self._agreed = SaveStatus(*highest)
        self._storage.note_ended(self._storage.begun - self._agreed.uploads_left)

    def take_events(self) -> list[CheckpointEvent]:
        """Return what has become of checkpoints since the last call: the same on all ranks."""
        return self._storage.take_events()

    def offer(self, state: TrainState, val_loss: float | None, is_last: bool = False) -> None:
        """Save the state of this iteration to node memory and storage as it is due; if it is the last, wait for that.

        val_loss: the validation loss of exactly this state, None if it was not evaluated.

        Raises:
            StorageError: the last state could not be saved.
        """
        if is_last:
            began_s, paused_s = time.perf_counter(), self.paused_s
            self._finish(state, val_loss)
            self.paused_s = paused_s + time.perf_counter() - began_s
            return
        if not state.optimizer.state:  # no step was taken: the run began with this state
            return
        is_interval = state.iter_num % self._intervals.checkpoint_interval == 0
        is_due = is_interval and state.iter_num != self._storage.durable_iter
        if not self._agreed.without_memory:
            decision = self._scheduler.decide(state.iter_num, is_due, self._agreed)
            if decision.skipped is not None:
                self._storage.skip(decision.skipped)
            if decision.to_memory:
                self._begin(state, val_loss, decision.to_storage)
        elif is_due:
            self.paused_s += self._storage.write_now(self._plan(state, val_loss=val_loss))

    def join(self) -> None:
        """Wait until the state that was offered is copied: call it before anything of it changes."""
        if waited_s := self._memory.join():
            self._paused(waited_s)

    @contextmanager
    def state_changing(self) -> Iterator[None]:
        """Change the state inside, from one iteration to the next: meanwhile nothing can be rescued.

        Waits until the state that was offered is copied; on a GPU, also until the gradients are there. If we started
        the step before they arrived and a peer then died, we could not tell whether the step was applied.
        """
        if gpu := self._memory.gpu:
            gpu.wait_for_step()
        self.join()
        with self._lock.changing():
            yield
            self.changed_at_s = time.time()
            if gpu:
                gpu.note_change()

    def rescue(self, stand_in_s: float = STAND_IN_S) -> int | None:
        """End the attempt with the last completed iteration in this node's memory; see `Rescuer.rescue`."""
        return self.rescuer.rescue(stand_in_s)

    def close(self, is_finished: bool) -> None:
        """Let go of the state and of node memory; if the run is finished, delete its states there."""
        self.rescuer.close()
        self._storage.close()
        self._memory.close(is_finished)

    def _begin(self, state: TrainState, val_loss: float | None, to_storage: bool) -> None:
        """Begin the copy of a state into node memory and, behind it, its upload."""
        with self._lock.choosing_buffer():
            began_s = time.perf_counter()
            self._storage.wait_for(self._memory.copier.last)
            self._memory.cost.pause_s = 0.0
            self._is_copy_for_storage = to_storage
            plan = self._plan(state, val_loss=val_loss, scaler={})  # which is copied with the tensors
            buffer, published = self._memory.begin(plan)
            if to_storage:
                self._storage.upload(plan, buffer, published)
            self._paused(time.perf_counter() - began_s)

    def _paused(self, seconds: float) -> None:
        self.paused_s += seconds
        self._memory.cost.pause_s += seconds
        if self._is_copy_for_storage:
            self._storage.pause_s += seconds

    def _finish(self, state: TrainState, val_loss: float | None) -> None:
        """Save the last state, and wait until it is in storage."""
        self.is_finishing, pool = True, self._memory.pool
        self._settle()
        if state.iter_num in (0, self._storage.durable_iter):
            return
        if self._scheduler.owed is not None and self._scheduler.owed != state.iter_num:
            self._storage.skip(self._scheduler.owed)
        if not self._agreed.without_memory and pool.buffers and state.optimizer.state:
            self._begin(state, val_loss, to_storage=True)
            self.join()
            self._settle()
        if state.iter_num != self._storage.durable_iter and (self._agreed.without_memory or not pool.buffers):
            self._storage.write_now(self._plan(state, val_loss=val_loss))
        if state.iter_num != self._storage.durable_iter:
            raise self._storage.failure()

    def _settle(self) -> None:
        """Wait for copies and uploads on all ranks, and tell of them."""
        self._storage.wait_for(self._memory.copier.last)  # an error there is the upload's too
        self._storage.wait()
        self.apply(self._world.agree(self.request()).result())
