"""Faults at exact points of the training loop: (rank, iter_num, point), each once, each leaving proof that it fired."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import psutil

from orchestrator.worker.job import Job
from orchestrator.worker.run import run_worker
from tests.support import stuck


@dataclass(frozen=True)
class Fault:
    """Kill a process at a point.

    point: of a training step: forward | all_reduce (right after one of all ranks' votes has begun) | optimizer |
        after_optimizer | evaluate | reduce (right after this rank has exchanged the first gradients) | exchanged (right
        after it has exchanged the last);
        of an attempt: warm_up (before DDP's throw-away step; iter_num is not looked at);
        of a restore: restore (before a file is read; iter_num is not looked at);
        of a state on its way to node memory: copy (half of its tensors are there) | seal (before it is renamed) |
        sealed (right after);
        of a checkpoint on its way to storage: upload (before a file) | during (after the first bytes of a file) |
        write (after a file) | commit (before it is announced) | committed (right after).
    iter_num: of the step; of the state or checkpoint, the first one of this iteration or a later one.
    pid: whom to kill, None for the process itself.
    marker: a file that is written when the fault fires; while it exists, the fault does not fire again.
    nth: fire when the point is reached for the n-th time, such as after the second file.
    kind: the signal; None for an exception instead: `error`, as of a bug in the user's code.
    times: how often it fires in all.
    after: another fault's marker: before that one has fired, this one does not.
    """

    point: str
    iter_num: int
    rank: int
    marker: Path
    pid: int | None = None
    nth: int = 1
    kind: signal.Signals | None = signal.SIGKILL
    times: int = 1
    error: type[Exception] = ZeroDivisionError
    after: Path | None = None

    def fire(self) -> None:
        if self.after and not self.after.exists():
            return
        fired = self.marker.read_text() if self.marker.exists() else ""
        if len(fired.splitlines()) < self.times:
            self.marker.write_text(f"{fired}{self.point} {self.iter_num} {self.rank}\n")
            if self.kind is None:
                raise self.error("the bug")
            os.kill(self.pid or os.getpid(), self.kind)
            time.sleep(60)  # a worker whose driver was killed does no further step: Ray ends it within a second


class NodeKilled(Fault):
    """The node's raylet and this worker are killed, the last of all that runs on the node."""

    def fire(self) -> None:
        if not self.marker.exists():
            raylet = next(parent for parent in psutil.Process().parents() if parent.name() == "raylet")
            raylet.kill()
            super().fire()


def worker_with(*faults: Fault, gets_stuck: bool = False) -> Callable[[Job], dict[str, Any]]:
    """Return what Ray runs on each rank: our worker, with the faults armed.

    gets_stuck: its collectives wait for ever for a peer that is gone, as NCCL's do.
    """

    def worker(job: Job) -> dict[str, Any]:
        import ray.train

        rank = ray.train.get_context().get_world_rank()
        for fault in faults:
            if fault.rank == rank:
                arm(fault)
        if gets_stuck:
            stuck.arm()
        return run_worker(job)

    return worker


def arm(fault: Fault) -> None:
    """Put the fault into this process, by wrapping the functions that stand at the points."""
    import torch.optim.optimizer as optim

    from orchestrator import loop
    from orchestrator.checkpoint.restore import read_once as reading
    from orchestrator.checkpoint.save import to_memory as copying
    from orchestrator.checkpoint.save import upload as durable
    from orchestrator.checkpoint.save.snapshot_buffer import SnapshotBuffer
    from orchestrator.checkpoint.save.to_memory import SnapshotWriter
    from orchestrator.checkpoint.store import CheckpointStore
    from orchestrator.distributed import ddp
    from orchestrator.distributed.exchange import Exchange
    from orchestrator.distributed.world import World
    from orchestrator.training import attempt

    step = {"iter_num": -1}
    times = {"reached": 0}

    def reached(point: str, iter_num: int, is_exact: bool = False) -> None:
        if point == fault.point and (iter_num == fault.iter_num if is_exact else iter_num >= fault.iter_num):
            times["reached"] += 1
            if times["reached"] >= fault.nth:
                fault.fire()

    def wrap(owner: Any, name: str, iter_of: Callable[..., int], before: str | None = None, after: str = "") -> None:
        original = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if before:
                reached(before, iter_of(*args))
            result = original(*args, **kwargs)
            if after:
                reached(after, iter_of(*args))
            return result

        setattr(owner, name, wraps(original)(wrapped))

    original_seed, original_evaluate, original_file = loop.seed_dropout, attempt.evaluate, durable.write_file

    def seed_dropout(dropout: float, seed: int, iter_num: int, micro_step: int) -> None:
        step["iter_num"] = iter_num
        reached("forward", iter_num, is_exact=True)
        original_seed(dropout, seed, iter_num, micro_step)

    def evaluate(*args: Any) -> Any:
        step["iter_num"] += 1  # it comes before the first micro-step of its iteration
        reached("evaluate", step["iter_num"], is_exact=True)
        return original_evaluate(*args)

    def write_file(fs: Any, path: str, pieces: Any, written: Callable[[int], None]) -> Any:
        def told(size_bytes: int) -> None:
            reached("during", _iter_of(path))
            written(size_bytes)

        return original_file(fs, path, pieces, told)

    loop.seed_dropout, attempt.evaluate, durable.write_file = seed_dropout, evaluate, write_file
    optim.register_optimizer_step_pre_hook(lambda *_: reached("optimizer", step["iter_num"], is_exact=True))
    optim.register_optimizer_step_post_hook(lambda *_: reached("after_optimizer", step["iter_num"], is_exact=True))
    wrap(durable, "_write", lambda _store, name, *_: _iter_of(name), before="upload", after="write")
    wrap(CheckpointStore, "commit", lambda _store, name, *_: _iter_of(name), before="commit", after="committed")
    wrap(ddp, "average", lambda *_: step["iter_num"], after="reduce")
    wrap(Exchange, "_exchange", lambda *_: step["iter_num"], after="reduce")
    wrap(Exchange, "finish", lambda *_: step["iter_num"], after="exchanged")
    wrap(ddp.DDPTraining, "warm_up", lambda *_: fault.iter_num, before="warm_up")
    wrap(World, "agree", lambda *_: step["iter_num"] + 1, after="all_reduce")
    wrap(reading, "stream_tensors", lambda *_: fault.iter_num, before="restore")
    wrap(SnapshotBuffer, "publish", lambda _slot, name, *_: _iter_of(name), before="seal", after="sealed")

    copied = {"tensors": 0, "of": 0, "iter_num": -1}
    original_bytes_of, original_write = copying.bytes_of, SnapshotWriter._write

    def write(self: Any, tensors: Any, scaler: Any, is_copied: Any, buffer: Any, plan: Any) -> Any:
        copied.update(tensors=0, of=len(plan.description["tensors"]), iter_num=plan.iter_num)
        return original_write(self, tensors, scaler, is_copied, buffer, plan)

    def bytes_of(tensor: Any) -> memoryview:
        if copied["tensors"] == copied["of"] // 6:  # of three ranks, each copies about a third
            reached("copy", copied["iter_num"])
        copied["tensors"] += 1
        return original_bytes_of(tensor)

    SnapshotWriter._write, copying.bytes_of = write, bytes_of  # type: ignore[method-assign]


def _iter_of(path: str) -> int:
    """Return the iteration in the name of a checkpoint, or in a path with such a name."""
    return int(re.findall(r"checkpoint_(\d+)", path)[-1])
