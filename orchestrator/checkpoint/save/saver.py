"""Saver: keeps the training state safe, in the memory of every node and in storage, while training goes on.

    loop:      offer(state) | forward, backward     join() | optimizer.step, the next iteration ...
    copier:                 | live tensors -> node memory  | checksums, rename
    uploader:                                                | node memory -> storage, announce      (where it is due)

The loop waits for the copy alone, and that runs behind its forward and backward: tensors do not change until
`optimizer.step`. What happens is decided on all ranks alike, by answers that travel with the loop's own vote. Where
node memory has no room, checkpoints are written straight from the live tensors, and training pauses for them.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, TimeoutError
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

from orchestrator.checkpoint.save.async_copy import AsyncCopy, copy_tensors
from orchestrator.checkpoint.save.background import BackgroundQueue
from orchestrator.checkpoint.save.buffers import BufferPool
from orchestrator.checkpoint.save.gpu import Gpu
from orchestrator.checkpoint.save.node_memory import SnapshotBuffer, spare_memory_bytes
from orchestrator.checkpoint.save.node_topology import NodeTopology
from orchestrator.checkpoint.save.ownership import Files, files_of, rank_of, tensor_index
from orchestrator.checkpoint.save.pace import SnapshotCost
from orchestrator.checkpoint.save.policy import SaveIntervals, SaveScheduler
from orchestrator.checkpoint.save.upload import Pieces, commit, upload
from orchestrator.checkpoint.snapshot import Snapshot, describe
from orchestrator.checkpoint.state import ScalerValues, TrainState, capture, forecast
from orchestrator.checkpoint.store import FORMAT_VERSION, CheckpointStore, checkpoint_name
from orchestrator.checkpoint.tensor_file import Layout, layout_of, pieces_of, tensor_pieces
from orchestrator.distributed.world import World
from orchestrator.errors import CheckpointError, RolledBackError, StorageError, UserError

logger = logging.getLogger(__name__)

Record = dict[str, Any]
_TELL_EVERY_S = 10.0  # while the end of the run waits for an upload
_SILENCE_S = 600.0  # an upload that moves no byte for so long is given up at the end of the run
_OTHERS_S = 10.0  # in which the ranks of a node finish their shares of a state
_ROOM_S = 30.0  # in which what the copier is at ends: to make room for a large state takes seconds
_STAND_IN_S = 2.0  # after which the share of a process that lives and does nothing is written by another


class Saver:
    """One rank's part. All methods but `close` are called on all ranks at the same iteration.

    environment: what decides the bits besides the state, to be stored with it.
    is_finishing: the last state is on its way to storage, and training waits for it.
    paused_s: how long training has waited for states to be saved, in all.
    changed_at_s: when the last iteration was completed, in seconds since 1970.
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
        self._world, self._side = world, world.side_group()
        self._store, self._nodes, self.environment = store, nodes, environment
        self._intervals, self._scheduler = intervals, SaveScheduler(intervals)
        resumed = state.resumed_from
        is_durable = resumed and resumed.is_durable and state.is_evaluated  # once it is, it is saved again
        self._durable_iter = state.iter_num if is_durable else -1
        self._copier = BackgroundQueue("copy of the state", world.choose_device)
        self._uploader = BackgroundQueue("upload of a checkpoint", world.choose_device)
        self._cost = SnapshotCost(world.device, nodes.shares)
        self._pool = BufferPool(nodes, world)
        self._uploading: SnapshotBuffer | None = None
        self._copy: AsyncCopy | None = None
        self._is_copy_for_storage = False
        self._storage_pause_s = 0.0  # for the newest checkpoint: one is on its way at a time
        self._ended: list[Record] = []  # uploads, in the same order on all ranks; the uploader adds to them
        self._told = 0
        self._news: list[Record] = []
        self._moved_bytes, self._moved_at_s = 0, time.monotonic()
        self._agreed = [1, 1, 0, 1, 0]  # until the first vote
        self._state: TrainState | None = state  # until this is closed
        self._change = threading.Lock()  # held while the state changes, and for good once it is rescued
        self._is_torn = False
        self.is_finishing = False
        self.paused_s, self.changed_at_s = 0.0, time.time()
        self._gpu = Gpu(world.device, state.scaler) if world.device.type == "cuda" else None
        self._rescue = threading.Lock()
        self._rescued: tuple[int | None] | None = None
        if nodes.memory:
            nodes.memory.hold_liveness_lock(world.attempt, nodes.share)
            nodes.memory.forget_other_than(world.attempt, keep=resumed.checkpoint.name if resumed else "")
            self._copier.submit(partial(self._pool.reserve, self._layouts(files_of(forecast(state), world.size))))

    def request(self) -> list[int]:
        """Return this rank's answers to what all ranks must know; they go into the vote of an iteration."""
        self._cost.step_begins()
        interval = self._intervals.snapshot_interval or self._cost.interval()
        # Only what every rank has sealed is whole: until then the state before it must not be overwritten anywhere.
        busy = [int(self._copier.is_busy), int(self._uploader.is_busy)]
        return [*busy, -len(self._ended), interval, int(self._pool.is_missing)]

    def apply(self, answers: list[int]) -> None:
        """Take the highest answers of all ranks."""
        self._cost.step_ended()
        self._agreed = answers
        self._tell(-answers[2])

    def take_events(self) -> list[Record]:
        """Return what has become of checkpoints since the last call: the same on all ranks."""
        news, self._news = self._news, []
        return news

    def offer(self, state: TrainState, val_loss: float | None, is_last: bool = False) -> None:
        """Consider the state of this iteration for memory and storage; with is_last, wait until it is in storage.

        val_loss: the validation loss of exactly this state, None where it was not evaluated.

        Raises:
            StorageError: the last state could not be saved.
        """
        if is_last:
            self.is_finishing = True
            began_s, paused_s = time.perf_counter(), self.paused_s
            self._finish(state, val_loss)
            self.paused_s = paused_s + time.perf_counter() - began_s
            return
        if not state.optimizer.state:  # nothing was stepped: this is what the run began with
            return
        is_due = state.iter_num % self._intervals.checkpoint_interval == 0 and state.iter_num != self._durable_iter
        is_copying, is_uploading, _, interval, has_no_memory = self._agreed
        if has_no_memory:
            if is_due:
                self._save_directly(capture(state, val_loss))
            return
        decision = self._scheduler.decide(state.iter_num, is_due, not is_copying, not is_uploading, interval)
        if decision.skipped is not None:
            self._skip(decision.skipped)
        if decision.to_memory:
            self._begin(capture(state, val_loss, scaler={}), decision.to_storage)

    def join(self) -> None:
        """Wait until the state that was offered is copied: call it before anything of it changes."""
        if self._copy:
            began_s = time.perf_counter()
            self._copy.join()
            self._copy = None
            self._paused(time.perf_counter() - began_s)

    @contextmanager
    def state_changing(self) -> Iterator[None]:
        """The time in which the state changes, from one iteration to the next: in it, nothing can be rescued.

        It begins when what was offered is copied; on a GPU, also when the gradients are there: of a step that waits
        behind a peer's gradients which never come, nobody could say later whether it was done. A caller who has read
        their norm has waited for them, and does not wait again.
        """
        if self._gpu:
            self._gpu.wait_for_step()
        self.join()
        with self._change:
            self._is_torn = True
            yield
            self._is_torn = False
            self.changed_at_s = time.time()
            if self._gpu and self._state:
                self._gpu.note_change(self._state.scaler)

    @contextmanager
    def rescue_on_failure(self) -> Iterator[None]:
        """When what is done here fails, such as a collective whose peer is gone, rescue the state before telling."""
        try:
            yield
        except (UserError, RolledBackError):
            raise
        except Exception:
            self.rescue()
            raise

    def rescue(self, stand_in_s: float = _STAND_IN_S) -> int | None:
        """Put the state of the last completed iteration into this node's memory; return its number, or None.

        stand_in_s: after which the share of a process of this node that lives and does nothing is written here.

        For the end of an attempt, from whatever thread: the state changes no more after this. Needs no other rank:
        the shares of those on this node that are gone, or are at another iteration, are written here as well.
        """
        self._pool.is_ending = True
        with self._rescue:
            if self._rescued is None:
                began_s = time.perf_counter()
                try:
                    self._world.choose_device()
                    self._rescued = (self._put_aside(stand_in_s),)
                except Exception as error:  # whatever it is, the attempt ends, and earlier states are there
                    self._rescued = (None,)
                    logger.warning("the last iteration could not be rescued: %s: %s", type(error).__name__, error)
                if self._rescued[0] is not None:
                    seconds = time.perf_counter() - began_s
                    logger.info("iteration %d is safe in node memory (%.2f s)", self._rescued[0], seconds)
            return self._rescued[0]

    def close(self, is_finished: bool) -> None:
        """Let go of the state and of node memory; where the run is finished, its states there are deleted."""
        with self._rescue:
            self._rescued, self._state, self._gpu = self._rescued or (None,), None, None
        letting_go = self._copier.submit(partial(self._pool.let_go, is_finished))
        self._copier.close()
        self._uploader.close()
        with suppress(TimeoutError):  # it ends what it is at first
            letting_go.exception(timeout=_ROOM_S)
        if self._nodes.memory:
            self._nodes.memory.close(is_finished)

    def _put_aside(self, stand_in_s: float) -> int | None:
        memory, state = self._nodes.memory, self._state
        assert state
        if not self._change.acquire(timeout=_OTHERS_S) or self._is_torn or memory is None:
            return None
        if self._copier.last:
            self._copier.last.exception(timeout=_ROOM_S)
        if self._pool.is_missing or not self._pool.buffers or not state.optimizer.state:
            return None
        scaler = self._gpu.scaler_for_rescue() if self._gpu else None
        snapshot = capture(state, state.val_loss if state.is_evaluated else None, scaler)
        name = checkpoint_name(snapshot.iter_num, self._world.attempt)
        files = files_of(snapshot, self._world.size)
        described = self._description(snapshot, files)
        if all(buffer.iter_num != snapshot.iter_num for buffer in self._pool.buffers):
            self._copy_now(snapshot, self._pool.free_buffer(self._uploading), name, self._nodes.share, described)
        memory.release_liveness_lock()
        missing = [share for share in range(self._nodes.shares) if share != self._nodes.share]
        began_s = time.monotonic()
        while missing := [share for share in missing if not self._is_there(name, share)]:
            waited_s = time.monotonic() - began_s
            if memory.has_newer(snapshot.iter_num, self._world.attempt):  # of a rank that came further
                break
            for share in missing:
                if memory.try_stand_in(self._world.attempt, share) or waited_s > stand_in_s:
                    layouts = self._layouts(files, share)
                    if sum(layout.size_bytes for layout in layouts.values()) > spare_memory_bytes():
                        raise CheckpointError("memory has no room for the share of a rank that is gone")
                    buffer = SnapshotBuffer(memory, layouts)
                    self._copy_now(snapshot, buffer, name, share, described)
                    break
            else:
                time.sleep(0.01)
        return snapshot.iter_num

    def _is_there(self, name: str, share: int) -> bool:
        assert self._nodes.memory
        return self._nodes.memory.share_path(name, share, self._nodes.shares).exists()

    def _copy_now(
        self, snapshot: Snapshot, buffer: SnapshotBuffer, name: str, share: int, described: dict[str, Any]
    ) -> None:
        copy = self._gpu.copy_for_rescue if self._gpu else copy_tensors
        copy({**snapshot.model, **snapshot.optimizer}, buffer.open())
        buffer.publish(name, share, self._nodes.shares, described)

    def _begin(self, snapshot: Snapshot, to_storage: bool) -> None:
        """Start the copy of a state, the scaler's included, into node memory and, behind it, the upload."""
        with self._change:  # or a rescue from another thread would use the same buffer
            self._begin_alone(snapshot, to_storage)

    def _begin_alone(self, snapshot: Snapshot, to_storage: bool) -> None:
        began_s = time.perf_counter()
        self._wait_for(self._copier.last)
        self._cost.begins()
        self._is_copy_for_storage, self._storage_pause_s = to_storage, 0.0 if to_storage else self._storage_pause_s
        name = checkpoint_name(snapshot.iter_num, self._world.attempt)
        state = self._description(snapshot, files_of(snapshot, self._world.size))
        buffer = self._pool.free_buffer(self._uploading)
        assert self._state
        self._copy = AsyncCopy({**snapshot.model, **snapshot.optimizer}, ScalerValues(self._state.scaler), self._gpu)
        sealed = self._copier.submit(partial(self._to_memory, self._copy, buffer, name, state))
        if to_storage:
            self._uploading = buffer
            self._durable_iter = snapshot.iter_num  # unless it fails
            self._uploader.submit(partial(self._to_storage, name, state, buffer, sealed))
        self._paused(time.perf_counter() - began_s)

    def _paused(self, seconds: float) -> None:
        self.paused_s += seconds
        self._cost.paused(seconds)
        if self._is_copy_for_storage:
            self._storage_pause_s += seconds

    def _description(self, snapshot: Snapshot, files: Files) -> dict[str, Any]:
        assert self._state
        return {
            "format_version": FORMAT_VERSION,
            **describe(snapshot),
            "is_evaluated": self._state.is_evaluated,
            "environment": self.environment,
            "tensors": tensor_index(files),
            "saved_at_s": time.time(),  # for people to read: clocks of two nodes may differ, and decide nothing
        }

    def _layouts(self, files: Files, share: int | None = None) -> dict[str, Layout]:
        return {file: layout_of(tensors) for file, tensors in self._nodes.share_of(files, share).items()}

    def _to_memory(self, copy: AsyncCopy, buffer: SnapshotBuffer, name: str, state: dict[str, Any]) -> None:
        """Put a state into a buffer. On the copier's thread."""
        began_s, cpu_began_s = time.perf_counter(), time.thread_time()
        try:
            copy.run(buffer.open())
            state["scaler"] = copy.scaler.state_dict()  # for the upload, too
            buffer.publish(name, self._nodes.share, self._nodes.shares, state)
        except Exception as error:
            self._pool.give_up(error)
            raise
        finally:
            copy.release()
        self._cost.copied(time.perf_counter() - began_s, time.thread_time() - cpu_began_s)
        self._pool.take_all(name)

    def _to_storage(self, name: str, state: dict[str, Any], buffer: SnapshotBuffer, sealed: Future[Any]) -> None:
        """Upload this rank's own files of a state and announce it. On the uploader's thread."""
        began_s = time.perf_counter()
        try:
            sealed.result()
            mine = {file: c for file, c in buffer.contents().items() if rank_of(file) == self._world.rank}
            sources: dict[str, Pieces] = {file: partial(pieces_of, content) for file, content in mine.items()}
            part = upload(self._store, name, sources, buffer.records, self._moved)
        except Exception as error:  # of the copy; the other ranks wait to hear of it
            part = {"error": f"{type(error).__name__}: {error}"}
        why_not = commit(self._side, self._store, name, part, state, self._intervals.keep)
        self._uploading = None
        self._ended.append(_record(name, state, time.perf_counter() - began_s, why_not))

    def _moved(self, count_bytes: int) -> None:
        self._moved_bytes += count_bytes
        self._moved_at_s = time.monotonic()

    def _save_directly(self, snapshot: Snapshot) -> None:
        """Write a checkpoint from the live tensors, and wait for it."""
        began_s = time.perf_counter()
        self._wait_for(self._uploader.last)  # so that uploads end in the same order on all ranks
        name = checkpoint_name(snapshot.iter_num, self._world.attempt)
        files = files_of(snapshot, self._world.size)
        state = self._description(snapshot, files)
        mine = {file: tensors for file, tensors in files.items() if rank_of(file) == self._world.rank}
        sources: dict[str, Pieces] = {file: partial(tensor_pieces, tensors) for file, tensors in mine.items()}
        part = upload(self._store, name, sources, {}, self._moved)
        why_not = commit(self._world, self._store, name, part, state, self._intervals.keep)
        self._durable_iter = snapshot.iter_num
        self._storage_pause_s = time.perf_counter() - began_s
        self.paused_s += self._storage_pause_s
        self._ended.append(_record(name, state, self._storage_pause_s, why_not))
        self._tell(len(self._ended))

    def _finish(self, state: TrainState, val_loss: float | None) -> None:
        self._wait()
        if state.iter_num == 0 or state.iter_num == self._durable_iter:
            return
        if self._scheduler.owed not in (None, state.iter_num):
            self._skip(self._scheduler.owed)
        if self._agreed[4] == 0 and self._pool.buffers and state.optimizer.state:
            self._begin(capture(state, val_loss, scaler={}), to_storage=True)
            self.join()
            self._wait()
        if state.iter_num != self._durable_iter and (self._agreed[4] or not self._pool.buffers):
            self._save_directly(capture(state, val_loss))
        if state.iter_num != self._durable_iter:
            why = next(record["why"] for record in reversed(self._ended) if "why" in record)
            raise StorageError(f"out_dir={self._store.folder.out_dir}: the last state could not be saved: {why}")

    def _wait(self) -> None:
        """Wait for copies and uploads on all ranks, and tell of them."""
        self._wait_for(self._copier.last)  # an error there has been told, and is the upload's too
        if error := self._wait_for(self._uploader.last):
            raise error
        self._agreed = self._world.agree(self.request()).result()
        self._tell(len(self._ended))

    def _wait_for(self, future: Future[Any] | None) -> BaseException | None:
        self._moved_at_s = time.monotonic()
        while future:
            try:
                return future.exception(timeout=_TELL_EVERY_S)
            except TimeoutError:
                self._tell_of_waiting()
        return None

    def _tell_of_waiting(self) -> None:
        silence_s = time.monotonic() - self._moved_at_s
        logger.info("waiting for the upload to %s: %.2f GB so far", self._store.folder.out_dir, self._moved_bytes / 1e9)
        if silence_s > _SILENCE_S:
            raise StorageError(
                f"out_dir={self._store.folder.out_dir}: the upload has not moved for {silence_s:.0f} s; the state of "
                "this iteration is in node memory, and the same command goes on from there"
            )

    def _skip(self, iter_num: int | None) -> None:
        assert iter_num is not None
        name = checkpoint_name(iter_num, self._world.attempt)
        why = "the one before was still being saved"
        self._news.append({"kind": "checkpoint_skipped", "iter": iter_num, "name": name, "why": why})

    def _tell(self, count: int) -> None:
        """Turn the first `count` uploads that ended into news; training has paused for them as it turned out."""
        for record in self._ended[self._told : count]:
            self._news.append({**record, "pause_s": self._storage_pause_s})
            if record["kind"] == "checkpoint_failed" and record["iter"] == self._durable_iter:
                self._durable_iter = -1
        self._told = max(self._told, count)


def _record(name: str, state: dict[str, Any], seconds: float, why_not: str | None) -> Record:
    told = {"iter": state["iter_num"], "name": name, "seconds": seconds}
    if why_not:
        return {"kind": "checkpoint_failed", **told, "why": why_not}
    return {"kind": "checkpoint", **told, **{key: state[key] for key in ("best_val_loss", "val_loss")}}
