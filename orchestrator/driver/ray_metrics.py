"""RayMetrics: the run in Ray's own metrics, so that the cluster's Prometheus has it without set-up.

The driver sets them. It hears all records of all attempts, so no step takes longer, and a series goes on while workers
are lost and replaced. Ray puts `ray_` before a name, and `_total` behind a counter's: docs/monitoring.md lists them.

Ray exports a gauge once after it was set, and forgets it after two exports. So we set all of them every second.
"""

from __future__ import annotations

import math
import time
from typing import Any

from ray.util.metrics import Counter, Gauge

from orchestrator.driver.driver import Driver
from orchestrator.driver.trainer import Trainer
from orchestrator.telemetry.goodput import Ledger
from orchestrator.telemetry.records import (
    AttemptEnded,
    AttemptRunning,
    Begin,
    CheckpointFailed,
    CheckpointSaved,
    CheckpointSkipped,
    Evaluation,
    Record,
    Stamped,
    Step,
    StepSkipped,
    StepWindow,
)

SET_EVERY_S = 1.0  # Ray exports every ten by default, and every one at most
PREFIX = "orchestrator_"
RUN_LABELS = ("ray_train_run_name", "ray_train_run_id")  # Ray Train's own metrics have them

# name -> (description, label besides those of the run)
GAUGES = {
    "iteration": ("the last iteration that was logged", ""),
    "max_iters": ("iterations in all", ""),
    "loss": ("training loss of the last iteration that was logged", ""),
    "eval_loss": ("loss of the last evaluation", "split"),
    "grad_norm": ("norm of the gradient before it is clipped", ""),
    "learning_rate": ("learning rate", ""),
    "step_seconds": ("seconds of the last iteration that was logged", ""),
    "tokens_per_second": ("tokens per second, of all workers", ""),
    "mfu": ("model FLOPs utilization, 1.0 is the card's peak", ""),
    "goodput": ("share of the driver's time, by what it went into; entry=productive is the goodput", "entry"),
    "snapshot_seconds": ("mean seconds of a copy into node memory, in the background", ""),
    "snapshot_bytes": ("bytes of a copy into node memory, of rank 0's share", ""),
    "upload_seconds": ("seconds of the last checkpoint's upload, in the background", ""),
    "upload_bytes": ("bytes of the last checkpoint in storage", ""),
    "workers": ("workers that run now, and as many as the run wants", "state"),
}
COUNTERS = {
    "pause_seconds": ("seconds for which training waited for states to be saved", ""),
    "snapshots": ("copies into node memory", ""),
    "checkpoints": ("checkpoints by what became of them: saved, skipped, failed", "state"),
    "skipped_steps": ("bad steps, which no rank has taken", ""),
    "restarts": ("restarts and rollbacks by cause", "cause"),
}

_OF_STEPS = ("step_seconds", "tokens_per_second", "mfu")


def metrics_of(driver: Driver, trainer: Trainer) -> RayMetrics:
    """Return the metrics of a run that a trainer is about to begin."""
    run = trainer.train_run_context  # not public, as its `run_id`: a test pins them
    return RayMetrics(run.run_config.name, run.run_id, driver.config.max_workers, driver.journal.ledger)


class RayMetrics:
    """A sink for one of Ray Train's runs.

    run_name, run_id: Ray Train's. max_workers: as many as the run wants.
    ledger: where the time went, of the records that this sink takes and of those before.
    """

    def __init__(self, run_name: str, run_id: str, max_workers: int, ledger: Ledger) -> None:
        self._ledger = ledger
        # so many are counted; when Ray Train begins again, all but the reason: its controller was lost
        self._incidents = max(0, len(ledger.incidents) - 1)
        self._values: dict[tuple[str, str], float] = {}  # of gauges, by name and label
        self._set_at_s = -math.inf
        labels = dict(zip(RUN_LABELS, (run_name, run_id), strict=True))
        self._gauges = {name: _make(Gauge, name, *about, labels) for name, about in GAUGES.items()}
        self._counters = {name: _make(Counter, name, *about, labels) for name, about in COUNTERS.items()}
        self._set("workers", max_workers, "wanted")
        self._set("workers", 0, "now")

    def write(self, stamped: Stamped) -> None:
        """Take the values of a record."""
        record = stamped.record
        self._set_training(record)
        self._set_saving(record)
        match record:
            case AttemptRunning():
                self._set("workers", record.num_workers, "now")
            case AttemptEnded():
                self._set("workers", 0, "now")
                for name in _OF_STEPS:  # nobody trains
                    self._values.pop((name, ""), None)
        if not isinstance(record, Step):  # of which there are many; a window tells the ledger of them
            self._account()

    def flush(self) -> None:
        """Set the gauges, once a second however often this is called."""
        now_s = time.monotonic()
        if now_s < self._set_at_s + SET_EVERY_S:
            return
        self._set_at_s = now_s
        self.set_gauges()

    def set_gauges(self) -> None:
        """Set all gauges to the values of the records so far."""
        for (name, label), value in self._values.items():
            self._gauges[name].set(value, {GAUGES[name][1]: label} if label else None)

    def close(self) -> None:
        """Do nothing: what is not set any more ends by itself."""

    def _set_training(self, record: Record) -> None:
        match record:
            case Begin():
                self._set("max_iters", record.max_iters)
            case Step():
                self._set("iteration", record.iter)
                self._set("loss", record.loss)
                self._set("grad_norm", record.grad_norm)
                self._set("learning_rate", record.lr)
                self._set("step_seconds", record.dt_s)
                self._set("tokens_per_second", record.tokens_per_s)
                self._set("mfu", record.mfu)
            case StepSkipped():
                self._count("skipped_steps", 1)
            case Evaluation():
                self._set("eval_loss", record.train_loss, "train")
                self._set("eval_loss", record.val_loss, "val")

    def _set_saving(self, record: Record) -> None:
        match record:
            case StepWindow():
                self._count("pause_seconds", record.pause_s)
                self._count("snapshots", record.snapshots)
                if record.snapshots:
                    self._set("snapshot_seconds", record.snapshot_s / record.snapshots)
                    self._set("snapshot_bytes", record.snapshot_bytes / record.snapshots)
            case CheckpointSaved():
                self._set("upload_seconds", record.seconds)
                self._set("upload_bytes", record.size_bytes)
                self._count("checkpoints", 1, "saved")
            case CheckpointSkipped():
                self._count("checkpoints", 1, "skipped")
            case CheckpointFailed():
                self._count("checkpoints", 1, "failed")

    def _account(self) -> None:
        wall_s = self._ledger.wall_s
        for entry, seconds in self._ledger.seconds.items():
            self._set("goodput", seconds / wall_s if wall_s else 0.0, entry)
        for incident in self._ledger.incidents[self._incidents :]:
            self._count("restarts", 1, incident.cause)
        self._incidents = len(self._ledger.incidents)

    def _set(self, name: str, value: float | None, label: str = "") -> None:
        if value is not None:
            self._values[name, label] = value

    def _count(self, name: str, value: float, label: str = "") -> None:
        if value > 0:  # Ray takes no other
            self._counters[name].inc(value, {COUNTERS[name][1]: label} if label else None)


def _make(kind: type, name: str, description: str, label: str, labels: dict[str, str]) -> Any:
    return kind(PREFIX + name, description, (*labels, label) if label else tuple(labels)).set_default_tags(labels)
