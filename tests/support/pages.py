"""Runs to draw: real ones of the plain loop, and the events that a driver would have kept of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from orchestrator.config import TrainConfig
from orchestrator.storage.run_folder import RunFolder
from orchestrator.telemetry.metrics import MetricsLog, read_metrics
from orchestrator.telemetry.records import (
    AttemptEnded,
    AttemptPlaced,
    AttemptRunning,
    AttemptStarting,
    Begin,
    DriverEnded,
    DriverStarted,
    Event,
    Failure,
    Stamped,
)
from tests.support import ranks
from tests.support.faults import Fault
from tests.support.poison import Poison

NODES = ["node-a", "node-b"]


def train_calmly(config: TrainConfig, log: Path) -> None:
    assert ranks.train(config, 2, log).is_done


def train_and_kill(config: TrainConfig, log: Path) -> None:
    """Kill rank 1 in iteration 13, start again, and keep events as of a driver on two nodes."""
    fault = Fault("forward", 13, 1, log.with_suffix(".fired"))
    assert not ranks.train(config, 2, log, [fault]).is_done
    train_calmly(config, log.with_name("again"))
    write_events(config.out_dir)


def train_and_roll_back(config: TrainConfig, log: Path) -> None:
    """Let the batches of iterations 10 to 12 make the loss bad, which is one too many."""
    config = replace(config, max_bad_steps=3)
    assert ranks.train(config, 2, log, prepare=Poison(1, frozenset(range(10, 13)))).is_done


def write_events(out_dir: str) -> None:
    """Keep the events of a driver whose second attempt follows the loss of rank 1, at the times of the metrics."""
    folder = RunFolder(out_dir)
    metrics = sorted(read_metrics(folder), key=lambda stamped: stamped.time_s)
    begins = [stamped for stamped in metrics if isinstance(stamped.record, Begin)]
    log = MetricsLog(folder, "driver", stem="events")

    def keep(record: Event, time_s: float) -> None:
        log.write(Stamped(record, time_s, "driver"))

    lost_s = begins[0].time_s - 2.0  # of each attempt, when the one before was lost
    keep(DriverStarted(start_id="driver"), lost_s)
    for number, begin in enumerate(begins, 1):
        gap_s = begin.time_s - lost_s
        keep(AttemptStarting(number=number, num_workers=2), lost_s + 0.4 * gap_s)
        keep(AttemptPlaced(number=number, num_workers=2), lost_s + 0.6 * gap_s)
        keep(AttemptRunning(number=number, num_workers=2, nodes=NODES), lost_s + 0.8 * gap_s)
        if number == len(begins):
            break
        lost_s = max(each.time_s for each in metrics if each.attempt == begin.attempt)
        gap_s = begins[number].time_s - lost_s
        failure = {"cause": "worker_lost", "ranks": [1], "text": "its process was killed or has crashed"}
        reached = {"rescue_s": 0.1 * gap_s, "ranks_rescued": 1, "reached_iter": 13, "reached_at_s": lost_s}
        keep(Failure(number=number, node=NODES[1], **failure, **reached), lost_s + 0.1 * gap_s)
        keep(AttemptEnded(number=number), lost_s + 0.3 * gap_s)
    keep(DriverEnded(outcome="finished"), metrics[-1].time_s + 0.2)
    log.close()
