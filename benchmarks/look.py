"""The page of a long run: seconds and bytes, for 100,000 iterations, three kills, one rollback. And what metrics cost.

The run's records are made up here, as its loop and its driver would write them. The page is written by
`orchestrator report --html`. Metrics go into Ray's on a cluster of this machine, as the driver puts them there. Its
process does that, so no worker waits for it: `metrics_overhead` is as if one did, as a share of its step of 100 ms.

    python -m benchmarks look --json FILE       (pip install -e '.[report]')
"""

from __future__ import annotations

import argparse
import json
import math
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ray

from benchmarks.same_bits import ROOT
from orchestrator.driver.ray_metrics import SET_EVERY_S, RayMetrics
from orchestrator.telemetry.goodput import Ledger
from orchestrator.telemetry.metrics import to_line
from orchestrator.telemetry.records import (
    AttemptEnded,
    AttemptPlaced,
    AttemptRunning,
    AttemptStarting,
    Begin,
    CheckpointSaved,
    DriverEnded,
    DriverStarted,
    Evaluation,
    Failure,
    LoopRecord,
    Record,
    RollingBack,
    Stamped,
    Step,
    StepSkipped,
    StepWindow,
)

AT_MOST = {"report_s": 10.0, "report_bytes": 3e6, "metrics_overhead": 0.005}
_METRICS_STEP_S = 0.1
_BEGAN_S, _STEP_S, _EVAL_S = 1.7e9, 0.25, 20.0
_NODES = ("gpu-a", "gpu-a", "gpu-b", "gpu-b")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare this benchmark's options."""
    parser.add_argument("--iterations", type=int, default=100_000, help="of the run (default: %(default)s)")
    parser.add_argument("--keep", type=Path, help="write the run and its page into this folder")


def run(args: argparse.Namespace) -> dict[str, float]:
    """Measure, print the figures beside their goals, and return them."""
    with tempfile.TemporaryDirectory(prefix="look-") as scratch:
        folder = args.keep or Path(scratch)
        write_run(folder / "run", args.iterations)
        figures = measure_page(folder / "run", folder / "report.html")
    figures["metrics_overhead"] = measure_metrics(args.iterations // 10)
    for name, value in figures.items():
        reached = "reached" if value <= AT_MOST[name] else "MISSED"
        print(f"{name:<16} {value:>14,.5g}  at most {AT_MOST[name]:,.5g}: {reached}")
    return figures


def exit_code(figures: dict[str, float]) -> int:
    return int(any(value > AT_MOST[name] for name, value in figures.items()))


def measure_page(out_dir: Path, page: Path) -> dict[str, float]:
    """Write a run's page with the command, and return its seconds, from start to end of the process, and bytes."""
    command = [sys.executable, "-m", "orchestrator", "report", f"--out_dir={out_dir}", f"--html={page}"]
    began_s = time.perf_counter()
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return {"report_s": time.perf_counter() - began_s, "report_bytes": float(page.stat().st_size)}


def measure_metrics(iterations: int) -> float:
    """Put the records of a run into Ray's metrics, and return how long that takes as a share of steps of 100 ms."""
    options: dict[str, Any] = {"include_dashboard": False, "object_store_memory": 80 * 2**20, "logging_level": "ERROR"}
    ray.init(address="local", num_cpus=1, **options)
    ledger = Ledger()
    metrics = RayMetrics("look", "look", 4, ledger)
    spent_s, steps = 0.0, 0
    for stamped in records_of(iterations):
        ledger.add(stamped)
        began_s = time.perf_counter()
        metrics.write(stamped)
        spent_s += time.perf_counter() - began_s
        steps += isinstance(stamped.record, Step)
    gauges_set = steps * _METRICS_STEP_S / SET_EVERY_S
    began_s = time.perf_counter()
    for _ in range(int(gauges_set)):
        metrics.set_gauges()
    spent_s += time.perf_counter() - began_s
    ray.shutdown()
    return spent_s / (steps * _METRICS_STEP_S)


def write_run(out_dir: Path, iterations: int) -> None:
    """Write the records of a run that loses a worker three times, and goes back once."""
    out_dir.mkdir(parents=True)
    with (out_dir / "metrics.jsonl").open("w") as metrics, (out_dir / "events.jsonl").open("w") as events:
        for stamped in records_of(iterations):
            file = metrics if isinstance(stamped.record, LoopRecord) else events
            file.write(to_line({"iter": 0, **stamped.to_json()}))
    config = {"out_dir": str(out_dir), "max_iters": iterations, "num_workers": 4}
    (out_dir / "run.json").write_text(json.dumps({"run_id": "r", "start_id": "s", "config": config}))


def records_of(iterations: int) -> Iterator[Stamped]:
    """Yield the records in the order of their time."""
    now_s, number = _BEGAN_S, 0
    kills = {iterations // 5, iterations // 2, iterations * 4 // 5}
    goes_back_at, back_to = iterations * 13 // 20, iterations * 13 // 20 - iterations // 100

    def told(record: Record, after_s: float) -> Stamped:
        nonlocal now_s
        now_s += after_s
        return Stamped(record, now_s, f"attempt{number}" if isinstance(record, LoopRecord) else "s")

    def begin(it: int) -> Iterator[Stamped]:
        nonlocal number
        number += 1
        yield told(AttemptStarting(number=number, num_workers=4), 1.0)
        yield told(AttemptPlaced(number=number, num_workers=4), 60.0 if number == 3 else 2.0)
        yield told(AttemptRunning(number=number, num_workers=4, nodes=list(_NODES)), 1.0)
        yield told(begin_of(it), 4.0)

    def begin_of(it: int) -> Begin:
        sizes = {"max_iters": iterations, "num_params": 124_000_000, "tokens_per_iter": 491_520, "world_size": 4}
        return Begin(iter=it, from_="c" if it else None, restore_s=1.0, device="cuda:0", dtype="bfloat16", **sizes)

    yield told(DriverStarted(start_id="s"), 0.0)
    yield from begin(0)
    it, is_back = 0, False
    while it < iterations:
        if it in kills:
            kills.remove(it)
            yield told(killed(number, it, now_s), 1.0)
            yield told(AttemptEnded(number=number), 1.0)
            yield from begin(it)
        if it == goes_back_at and not is_back:
            is_back, number = True, number + 10
            why = "10 bad steps in a row"
            yield told(RollingBack(iter=it, to_iter=back_to, skipped_iters=it - back_to, why=why), 0.0)
            it = back_to
            yield told(begin_of(it), 5.0)
        yield from told_steps(told, it, is_bad=not is_back and goes_back_at - 10 <= it < goes_back_at)
        it += 1
        if it % (iterations // 50) == 0:
            losses = {"train_loss": _loss(it), "val_loss": _loss(it) + 0.02}
            yield told(Evaluation(iter=it, lr=6e-4, mfu=0.4, tflops=125.0, **losses), _EVAL_S)
            yield told(saved(it, losses["val_loss"]), 0.0)
    yield told(DriverEnded(outcome="finished"), 5.0)


def killed(number: int, it: int, reached_at_s: float) -> Failure:
    """Return the record of a worker that is lost; the others have kept the state."""
    return Failure(
        number=number,
        cause="worker_lost",
        ranks=[3],
        text="its process was killed or has crashed",
        node="gpu-b",
        rescue_s=0.3,
        reached_iter=it,
        reached_at_s=reached_at_s,
    )


def told_steps(told: Callable[[Record, float], Stamped], it: int, *, is_bad: bool) -> Iterator[Stamped]:
    """Yield the records of an iteration."""
    dt_s = _STEP_S * random.Random(it).lognormvariate(0.0, 0.05)
    loss = _loss(it) + random.Random(-it).gauss(0.0, 0.03) + (3.0 if is_bad else 0.0)
    speed = {"mfu": 0.4 * _STEP_S / dt_s, "tflops": 125.0, "tokens_per_s": 491_520 / dt_s}
    if is_bad:
        yield told(StepSkipped(iter=it, why="the loss is 9.1 deviations off the last 100", skipped=1, in_a_row=1), 0.0)
    yield told(Step(iter=it, loss=loss, lr=_lr(it), dt_s=dt_s, grad_norm=abs(loss) / 8, **speed), dt_s)
    if it % 40 == 0:
        eval_s = _EVAL_S if it % 2000 == 0 and it else 0.0
        yield told(window(it, dt_s, eval_s), 0.0)


def saved(it: int, val_loss: float) -> CheckpointSaved:
    """Return the record of a checkpoint in storage."""
    return CheckpointSaved(
        iter=it,
        name=f"checkpoint_{it:08d}_a",
        seconds=8.0,
        best_val_loss=val_loss,
        val_loss=val_loss,
        pause_s=0.01,
        size_bytes=1_490_000_000,
    )


def window(it: int, longest_s: float, eval_s: float) -> StepWindow:
    """Return the record of the 40 iterations up to this one."""
    return StepWindow(
        iter=it + 1,
        count=40,
        step_s=40 * _STEP_S,
        median_s=_STEP_S,
        longest_s=longest_s,
        eval_s=eval_s,
        pause_s=0.01,
        snapshots=10,
        snapshot_s=3.0,
        snapshot_bytes=3_700_000_000,
    )


def _loss(it: int) -> float:
    return 2.8 + 8.0 / math.pow(1.0 + it / 400.0, 0.6)


def _lr(it: int) -> float:
    return 6e-4 * min(it / 2000, 0.55 + 0.45 * math.cos(math.pi * it / 100_000))
