"""Faults at exact points of the training loop: (rank, iter_num, point), each once, each leaving proof that it fired."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.worker import run_worker


@dataclass(frozen=True)
class Fault:
    """Kill a process at a point.

    point: forward | optimizer | after_optimizer | evaluate | write (between the files of a checkpoint) |
        commit (before it is announced) | committed (right after)
    pid: whom to kill, None for the worker itself.
    marker: a file that is written when the fault fires; while it exists, the fault does not fire again.
    """

    point: str
    iter_num: int
    rank: int
    marker: Path
    pid: int | None = None

    def fire(self) -> None:
        if not self.marker.exists():
            self.marker.write_text(f"{self.point} {self.iter_num} {self.rank}")
            os.kill(self.pid or os.getpid(), signal.SIGKILL)
            time.sleep(60)  # a worker whose driver was killed does no further step: Ray ends it within a second


def worker_with(*faults: Fault) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Return what Ray runs on each rank: our worker, with the faults armed."""

    def worker(job: dict[str, Any]) -> dict[str, Any]:
        import ray.train

        rank = ray.train.get_context().get_world_rank()
        for fault in faults:
            if fault.rank == rank:
                arm(fault)
        return run_worker(job)

    return worker


def arm(fault: Fault) -> None:
    """Put the fault into this process, by wrapping the function that stands at its point."""
    import torch.optim.optimizer as optim

    from orchestrator import loop
    from orchestrator.checkpoint import save
    from orchestrator.checkpoint.store import CheckpointStore

    here = {"iter_num": -1}

    def reached(point: str) -> None:
        if point == fault.point and here["iter_num"] == fault.iter_num:
            fault.fire()

    def wrap(module: Any, name: str, before: str | None = None, after: str | None = None) -> None:
        original = getattr(module, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if before:
                reached(before)
            result = original(*args, **kwargs)
            if after:
                reached(after)
            return result

        setattr(module, name, wrapped)

    original_capture, original_seed, original_evaluate = loop.capture, loop.dropout_seed, loop.evaluate

    def dropout_seed(seed: int, iter_num: int, micro_step: int) -> int:
        here["iter_num"] = iter_num
        reached("forward")
        return original_seed(seed, iter_num, micro_step)

    def capture(state: Any, val_loss: float | None = None) -> Any:
        here["iter_num"] = state.iter_num  # of the checkpoint that is about to be written
        return original_capture(state, val_loss)

    def evaluate(*args: Any) -> Any:
        here["iter_num"] += 1  # it comes before the first micro-step of its iteration
        reached("evaluate")
        return original_evaluate(*args)

    loop.dropout_seed, loop.capture, loop.evaluate = dropout_seed, capture, evaluate
    optim.register_optimizer_step_pre_hook(lambda *_: reached("optimizer"))
    optim.register_optimizer_step_post_hook(lambda *_: reached("after_optimizer"))
    wrap(save, "write_file", after="write")
    wrap(CheckpointStore, "commit", before="commit", after="committed")
