"""One run with one loss, in a process and a cluster of its own: `python -m benchmarks.recovery.one_run JSON`.

Prints, as its last line, when the fault struck and when the next optimizer step was completed.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.processes import workers_of
from orchestrator.storage.run_folder import RunFolder
from orchestrator.telemetry.records import Stamped, Step

# Not the cluster that this process may be in; and no dashboard is waited for, by either side.
os.environ.update(RAY_AUTH_MODE="disabled", RAY_USAGE_STATS_ENABLED="0", OMP_NUM_THREADS="1")
os.environ.setdefault("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:9")

from orchestrator.config import TrainConfig
from orchestrator.worker.job import Job

_SMALL = {"object_store_memory": 80 * 2**20}


@dataclass(frozen=True)
class Strike:
    """What happens to a rank when it begins an iteration, once in a run.

    kind: worker (SIGKILL) | node (its raylet too) | hang (SIGSTOP) | cut (somebody outside is told to cut its link).
    """

    kind: str
    rank: int
    iter_num: int
    marker: str

    def at(self, rank: int, iter_num: int) -> None:
        """Strike, if this is the place."""
        marker = Path(self.marker)
        if (rank, iter_num) != (self.rank, self.iter_num) or marker.exists():
            return
        if self.kind == "node":
            next(parent for parent in psutil.Process().parents() if parent.name() == "raylet").kill()
        marker.with_suffix(".host").write_text(socket.gethostname())
        new = marker.with_suffix(".new")
        new.write_text(str(time.time()))
        new.rename(marker)
        if self.kind == "cut":
            time.sleep(3600)
        os.kill(os.getpid(), signal.SIGSTOP if self.kind == "hang" else signal.SIGKILL)


def worker_with(strike: Strike | None, timed: str | None = None) -> Callable[[Job], dict[str, Any]]:
    """Return what Ray runs on each rank of ours: the worker, with the strike armed.

    timed: a file for the seconds that rank 0 spends in our calls besides training.
    """

    def worker(job: Job) -> dict[str, Any]:
        import ray.train

        from benchmarks.recovery.goodput import time_our_calls
        from orchestrator.training import step
        from orchestrator.worker.run import run_worker

        rank, original = ray.train.get_context().get_world_rank(), vars(step)["learning_rate"]

        def learning_rate(config: TrainConfig, it: int) -> float:
            if strike:
                strike.at(rank, it)
            return float(original(config, it))

        vars(step)["learning_rate"] = learning_rate
        if not timed or rank:
            return run_worker(job)
        watch = time_our_calls(timed)
        try:
            return run_worker(job)
        finally:
            watch.write()

    return worker


@contextmanager
def cluster(nodes: int) -> Iterator[None]:
    """Start one node of two CPUs, or a head without and some nodes with one CPU each; 0: join the one that is named."""
    import ray
    from ray.cluster_utils import Cluster

    if not nodes:
        ray.init(address=os.environ["RAY_ADDRESS"], logging_level="ERROR")
        yield
        return
    if nodes == 1:
        ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level="ERROR", **_SMALL)
        yield
        ray.shutdown()
        return
    several = Cluster(initialize_head=True, head_node_args={**_SMALL, "include_dashboard": False, "num_cpus": 0})
    for _ in range(nodes):
        several.add_node(num_cpus=1, **_SMALL)
    several.wait_for_nodes()
    ray.init(address=several.address, logging_level="ERROR")
    yield
    ray.shutdown()
    several.shutdown()


def steps_of(out_dir: str, is_ours: bool) -> list[tuple[int, float]]:
    """Return the completed iterations, in the order in which they were completed: number and time."""
    if not is_ours:
        lines = (line.split() for line in Path(out_dir, "steps").read_text().splitlines())
        return [(int(it), float(at_s)) for it, at_s in lines]
    records = Path(out_dir, "metrics.jsonl").read_text().splitlines()
    found = (Stamped.from_json(json.loads(record)) for record in records)
    return [(each.record.iter, each.time_s) for each in found if each and isinstance(each.record, Step)]


def figures(steps: list[tuple[int, float]], struck_s: float) -> dict[str, float]:
    """Return the seconds from a strike to the next completed step, and how many steps were computed again."""
    before = [it for it, at_s in steps if at_s <= struck_s]
    after = [(it, at_s) for it, at_s in steps if at_s > struck_s]
    # what others had in their pipes when it struck belongs to the attempt that was lost
    first, at_s = next((it, at_s) for it, at_s in after if at_s > struck_s + 0.1 or it <= max(before))
    # the last one's record may be gone with the process that was to write it: that one is not repeated
    return {"seconds": at_s - struck_s, "steps_repeated": max(0, max(before) + 1 - first)}


def kill_again_and_again(every_s: float, for_s: float) -> None:
    """Kill one of this machine's Ray Train workers every so often, then interrupt this process. In a thread."""
    began_s = time.monotonic()
    for n in range(1, int(for_s / every_s) + 1):
        time.sleep(max(0.0, began_s + n * every_s - time.monotonic()))
        workers = workers_of(os.getpid())
        if n * every_s < for_s and workers:
            random.choice(workers).kill()
    os.kill(os.getpid(), signal.SIGINT)


def main(case: dict[str, Any]) -> None:
    config = TrainConfig(**case["config"])
    strike = Strike(**case["strike"]) if case["strike"] else None
    with cluster(case["nodes"]):
        if case["every_s"]:
            args = (case["every_s"], case["for_s"])
            threading.Thread(target=kill_again_and_again, args=args, daemon=True).start()
        if case["side"] == "ours":
            from orchestrator.driver.launch import InterruptedRunError, launch

            with suppress(InterruptedRunError):
                launch(config, worker_with(strike, case["timed"]))
        else:
            from benchmarks.recovery.plain import fit, fit_until_interrupted

            if case["every_s"]:
                fit_until_interrupted(config)
            else:
                fit(config, strike)
    steps = steps_of(config.out_dir, case["side"] == "ours")
    result: dict[str, Any] = figures(steps, float(Path(strike.marker).read_text())) if strike else {"steps": steps}
    if case["side"] == "ours":
        from orchestrator.telemetry.goodput import account
        from orchestrator.telemetry.metrics import read_events, read_metrics

        ledger = account([*read_events(RunFolder(config.out_dir)), *read_metrics(RunFolder(config.out_dir))])
        result |= {"incidents": [{"cause": each.cause, **each.phases} for each in ledger.incidents]}
        result |= {"ledger": ledger.seconds}
    print(json.dumps(result))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
