"""A driver whose workers stop for a while: `python -m tests.support.paused_driver SPEC.json`."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from orchestrator.__main__ import main
from orchestrator.driver import launch
from orchestrator.worker.job import Job

BEAT_INTERVAL_S = 0.5


def pausing(pause_at: int | None, folder: Path) -> Callable[[Job], dict[str, Any]]:
    """Return what Ray runs on each rank: our worker, of which rank 1 waits in that iteration."""

    def worker(job: Job) -> dict[str, Any]:
        import ray.train

        from orchestrator import loop
        from orchestrator.worker.run import run_worker

        original, rank = loop.seed_dropout, ray.train.get_context().get_world_rank()

        def seed_dropout(dropout: float, seed: int, iter_num: int, micro_step: int) -> None:
            if (rank, iter_num) == (1, pause_at):
                (folder / "paused").touch()
                while not (folder / "let_go").exists():
                    time.sleep(0.05)
            original(dropout, seed, iter_num, micro_step)

        loop.seed_dropout = seed_dropout
        return run_worker(job)

    return worker


def drive(spec: Path) -> int:
    """Train as the command line does, with beats that a test can wait for."""
    known = json.loads(spec.read_text())
    launch.Lease = partial(launch.Lease, beat_interval_s=BEAT_INTERVAL_S)
    launch.run = partial(launch.run, worker=pausing(known["pause_at"], spec.parent))
    return main(["train", *(f"--{key}={value}" for key, value in known["config"].items())])


if __name__ == "__main__":
    sys.exit(drive(Path(sys.argv[1])))
