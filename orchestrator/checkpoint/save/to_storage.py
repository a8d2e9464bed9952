"""CheckpointWriter: uploads states to storage and commits them as checkpoints, and tells what has become of them.

An upload reads from node memory in the background. Without node memory a checkpoint is written from the live tensors,
and training waits. Knows no live model and not when a checkpoint is due.
"""

from __future__ import annotations

import logging
import time
from concurrent.futures import Future, TimeoutError
from dataclasses import replace
from functools import partial
from typing import Any

from orchestrator.checkpoint.save.plan import SavePlan, rank_of
from orchestrator.checkpoint.save.snapshot_buffer import SnapshotBuffer
from orchestrator.checkpoint.save.upload import Pieces, commit, upload
from orchestrator.checkpoint.store import CheckpointStore, checkpoint_name
from orchestrator.checkpoint.tensor_file import pieces_of, tensor_pieces
from orchestrator.distributed.world import World
from orchestrator.errors import StorageError
from orchestrator.host.background import BackgroundQueue
from orchestrator.telemetry.records import CheckpointFailed, CheckpointSaved, CheckpointSkipped

logger = logging.getLogger(__name__)

CheckpointEvent = CheckpointSaved | CheckpointSkipped | CheckpointFailed
_TELL_EVERY_S = 10.0  # while the end of the run waits for an upload
_SILENCE_S = 600.0  # an upload that moves no byte for so long is given up at the end of the run


class CheckpointWriter:
    """One rank's. All ranks upload the same checkpoints in the same order.

    keep: the number of newest checkpoints that stay, besides the best. uploader: its thread.
    begun: how many uploads there were so far. ended: those that have ended on this rank, failed ones too; in the same
    order on all ranks.
    durable_iter: the iteration whose state is in storage, or on its way there; -1 for none.
    pause_s: how long training has waited for the newest checkpoint.
    """

    def __init__(self, world: World, store: CheckpointStore, keep: int, durable_iter: int) -> None:
        self._world, self._side = world, world.side_group()
        self._store, self._keep = store, keep
        self.uploader = BackgroundQueue("upload of a checkpoint", world.choose_device)
        self.begun = 0
        self.ended: list[CheckpointSaved | CheckpointFailed] = []  # the uploader's thread adds to them
        self._events: list[CheckpointEvent] = []
        self._told = 0  # how many of the ended ones are among the events
        self._moved_bytes, self._moved_at_s = 0, time.monotonic()
        self.durable_iter = durable_iter
        self.pause_s = 0.0

    def upload(self, plan: SavePlan, buffer: SnapshotBuffer, published: Future[dict[str, Any]]) -> None:
        """Upload a snapshot in the background, once it is published in its buffer. Hold the StateLock."""
        buffer.is_uploading = True
        self.begun += 1
        self.durable_iter, self.pause_s = plan.iter_num, 0.0
        self.uploader.submit(partial(self._upload, plan.without_tensors(), buffer, published))

    def write_now(self, plan: SavePlan) -> float:
        """Write a checkpoint from the live tensors, and wait for it; return how long that took in seconds."""
        began_s = time.perf_counter()
        self.wait_for(self.uploader.last)  # so that uploads end in the same order on all ranks
        mine = plan.files_of(self._world.rank)
        sources: dict[str, Pieces] = {file: partial(tensor_pieces, tensors) for file, tensors in mine.items()}
        part = upload(self._store, plan.name, sources, {}, self._note_moved)
        why_not = commit(self._world, self._store, plan.name, part, plan.description, self._keep)
        self.durable_iter, self.pause_s = plan.iter_num, time.perf_counter() - began_s
        self.begun += 1
        self.ended.append(_record(plan, self.pause_s, why_not))
        self.note_ended(self.begun)
        return self.pause_s

    def wait(self) -> None:
        """Wait until nothing is being uploaded on this rank.

        Raises:
            StorageError: the upload does not move any more.
        """
        if error := self.wait_for(self.uploader.last):
            raise error

    def wait_for(self, future: Future[Any] | None) -> BaseException | None:
        """Wait for a call in the background, and log that we do; return its error.

        Raises:
            StorageError: the upload does not move any more.
        """
        self._moved_at_s = time.monotonic()
        while future:
            try:
                return future.exception(timeout=_TELL_EVERY_S)
            except TimeoutError:
                silence_s, out_dir = time.monotonic() - self._moved_at_s, self._store.folder.out_dir
                logger.info("waiting for the upload to %s: %.2f GB so far", out_dir, self._moved_bytes / 1e9)
                if silence_s > _SILENCE_S:
                    raise StorageError(
                        f"out_dir={out_dir}: the upload has not moved for {silence_s:.0f} s; the state of this "
                        "iteration is in node memory, and the same command goes on from there"
                    ) from None
        return None

    def note_ended(self, count: int) -> None:
        """Turn the first `count` uploads, which have ended on all ranks, into events."""
        for record in self.ended[self._told : count]:
            self._events.append(replace(record, pause_s=self.pause_s))
            if isinstance(record, CheckpointFailed) and record.iter == self.durable_iter:
                self.durable_iter = -1
        self._told = max(self._told, count)

    def skip(self, iter_num: int) -> None:
        """Note that a postponed checkpoint will never be saved."""
        name = checkpoint_name(iter_num, self._world.attempt)
        self._events.append(CheckpointSkipped(iter=iter_num, name=name, why="the one before was still being saved"))

    def take_events(self) -> list[CheckpointEvent]:
        """Return the events since the last call: the same on all ranks."""
        events, self._events = self._events, []
        return events

    def failure(self) -> StorageError:
        """Return the error for a last state that could not be saved."""
        why = next(record.why for record in reversed(self.ended) if isinstance(record, CheckpointFailed))
        return StorageError(f"out_dir={self._store.folder.out_dir}: the last state could not be saved: {why}")

    def close(self) -> None:
        """End the thread after its current upload, without waiting for it."""
        self.uploader.close()

    def _upload(self, plan: SavePlan, buffer: SnapshotBuffer, published: Future[dict[str, Any]]) -> None:
        began_s = time.perf_counter()
        description = plan.description
        if error := published.exception():  # the other ranks wait to hear of it
            part: dict[str, Any] = {"error": f"{type(error).__name__}: {error}"}
        else:
            description = published.result()
            mine = {file: x for file, x in buffer.contents.items() if rank_of(file) == self._world.rank}
            sources: dict[str, Pieces] = {file: partial(pieces_of, content) for file, content in mine.items()}
            part = upload(self._store, plan.name, sources, buffer.records, self._note_moved)
        why_not = commit(self._side, self._store, plan.name, part, description, self._keep)
        buffer.is_uploading = False
        self.ended.append(_record(plan, time.perf_counter() - began_s, why_not))

    def _note_moved(self, size_bytes: int) -> None:
        self._moved_bytes += size_bytes
        self._moved_at_s = time.monotonic()


def _record(plan: SavePlan, seconds: float, why_not: str | None) -> CheckpointSaved | CheckpointFailed:
    """Return the record of an upload that has ended; its pause_s is filled in when all ranks know of it."""
    if why_not:
        return CheckpointFailed(iter=plan.iter_num, name=plan.name, seconds=seconds, why=why_not, pause_s=0.0)
    return CheckpointSaved(
        iter=plan.iter_num,
        name=plan.name,
        seconds=seconds,
        best_val_loss=plan.description["best_val_loss"],
        val_loss=plan.description["val_loss"],
        pause_s=0.0,
        size_bytes=plan.size_bytes,
    )
