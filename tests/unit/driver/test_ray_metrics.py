"""What the driver puts into Ray's metrics. Nothing of Ray runs: its metrics are looked at before they are exported."""

from __future__ import annotations

import math
from typing import Any

import pytest

from orchestrator.driver import ray_metrics
from orchestrator.driver.ray_metrics import RayMetrics
from orchestrator.telemetry.goodput import Ledger
from orchestrator.telemetry.records import (
    AttemptEnded,
    AttemptRunning,
    CheckpointFailed,
    CheckpointSaved,
    CheckpointSkipped,
    DriverStarted,
    Failure,
    Record,
    Stamped,
    Step,
    StepSkipped,
    StepWindow,
)
from orchestrator.telemetry.sinks import sinks_of

STEP = Step(iter=7, loss=3.0, lr=1e-3, dt_s=0.1, mfu=None, tflops=None, tokens_per_s=1e5, grad_norm=0.5)
WINDOW = StepWindow(iter=8, count=8, step_s=0.8, median_s=0.1, longest_s=0.2, eval_s=0.0, pause_s=0.02)


class Exported:
    """Stands in for Ray's metrics: what they were set to, in order."""

    def __init__(self) -> None:
        self.values: dict[tuple[str, str], float] = {}
        self.sets = 0

    def metric(self, name: str, description: str, tag_keys: tuple[str, ...]) -> Any:
        exported = self

        class Metric:
            def set_default_tags(self, tags: dict[str, str]) -> Metric:
                assert tags == {"ray_train_run_name": "run", "ray_train_run_id": "id"}
                assert set(tags) <= set(tag_keys)
                assert description
                return self

            def set(self, value: float, tags: dict[str, str] | None = None) -> None:
                exported.values[name, *(tags or {}).values()] = value
                exported.sets += 1

            def inc(self, value: float, tags: dict[str, str] | None = None) -> None:
                assert value > 0, "Ray takes no other"
                key = (name, *(tags or {}).values())
                exported.values[key] = exported.values.get(key, 0.0) + value

        return Metric()


@pytest.fixture
def exported(monkeypatch: pytest.MonkeyPatch) -> Exported:
    exported = Exported()
    monkeypatch.setattr(ray_metrics, "Gauge", exported.metric)
    monkeypatch.setattr(ray_metrics, "Counter", exported.metric)
    monkeypatch.setattr(ray_metrics, "SET_EVERY_S", -math.inf)
    return exported


def of(exported: Exported, *records: Record, ledger: Ledger | None = None) -> dict[tuple[str, ...], float]:
    """Return what is exported of records, a second apart."""
    ledger = ledger or Ledger()
    metrics = RayMetrics("run", "id", 4, ledger)
    for second, record in enumerate(records):
        stamped = Stamped(record, 1000.0 + second, "a")
        ledger.add(stamped)
        metrics.write(stamped)
    metrics.flush()
    return {(key[0].removeprefix("orchestrator_"), *key[1:]): value for key, value in exported.values.items()}


def test_a_step_and_who_runs(exported: Exported) -> None:
    found = of(exported, AttemptRunning(number=1, num_workers=3), STEP)
    assert found["iteration",] == 7
    assert found["loss",] == 3.0
    assert found["grad_norm",] == 0.5
    assert found["tokens_per_second",] == 1e5
    assert found["workers", "now"] == 3
    assert found["workers", "wanted"] == 4
    assert ("mfu",) not in found, "it is not known"


def test_speed_is_told_only_while_somebody_trains(exported: Exported) -> None:
    found = of(exported, AttemptRunning(number=1, num_workers=3), STEP, AttemptEnded(number=1))
    assert found["iteration",] == 7
    assert found["workers", "now"] == 0
    assert not {("step_seconds",), ("tokens_per_second",)} & found.keys()


def test_saves_are_counted_by_what_became_of_them(exported: Exported) -> None:
    saved = CheckpointSaved(iter=8, name="c", seconds=2.0, best_val_loss=1, val_loss=None, pause_s=0, size_bytes=100)
    failed = CheckpointFailed(iter=9, name="c", seconds=2.0, why="full", pause_s=0)
    skipped = CheckpointSkipped(iter=10, name="c", why="busy")
    window = StepWindow(**vars(WINDOW) | {"snapshots": 4, "snapshot_s": 2.0, "snapshot_bytes": 400})
    found = of(exported, saved, saved, failed, skipped, window, WINDOW)
    assert found["checkpoints", "saved"] == 2
    assert found["checkpoints", "failed"] == found["checkpoints", "skipped"] == 1
    assert (found["upload_seconds",], found["upload_bytes",]) == (2.0, 100)
    assert (found["snapshot_seconds",], found["snapshot_bytes",], found["snapshots",]) == (0.5, 100, 4)
    assert found["pause_seconds",] == pytest.approx(0.04)


def test_time_and_restarts_come_from_the_ledger(exported: Exported) -> None:
    lost = Failure(number=1, cause="worker_lost", text="killed")
    bad = StepSkipped(iter=7, why="nan", skipped=1, in_a_row=1)
    ledger = Ledger()
    found = of(exported, DriverStarted(start_id="s"), WINDOW, lost, lost, bad, ledger=ledger)
    assert found["restarts", "worker_lost"] == 2
    assert found["skipped_steps",] == 1
    shares = {key[1]: value for key, value in found.items() if key[0] == "goodput"}
    assert shares.keys() == ledger.seconds.keys()
    assert sum(shares.values()) == pytest.approx(1.0)
    assert 0 < shares["productive"] == pytest.approx(ledger.goodput)


def test_after_a_lost_controller_only_that_is_new(exported: Exported) -> None:
    ledger = Ledger()
    of(exported, Failure(number=1, cause="worker_lost", text="killed"), ledger=ledger)
    exported.values = {}
    ledger.add(Stamped(Failure(cause="controller_lost", text="gone"), 2000.0, "s"))
    found = of(exported, AttemptRunning(number=1, num_workers=3), ledger=ledger)
    assert {key: value for key, value in found.items() if key[0] == "restarts"} == {("restarts", "controller_lost"): 1}


def test_gauges_are_set_again_for_ray_forgets_them(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = RayMetrics("run", "id", 4, Ledger())
    metrics.flush()
    first = exported.sets
    metrics.flush()
    assert exported.sets == 2 * first > 0
    monkeypatch.setattr(ray_metrics, "SET_EVERY_S", math.inf)
    metrics.flush()
    assert exported.sets == 2 * first, "not more often than once a second"


def test_a_metric_that_cannot_be_set_ends_no_run(exported: Exported, caplog: pytest.LogCaptureFixture) -> None:
    def broken() -> RayMetrics:
        raise AttributeError("Ray has changed it")

    metrics = sinks_of(broken, lambda: RayMetrics("run", "id", 4, Ledger()))
    metrics.write(Stamped(STEP, 1000.0, "a"))
    metrics.flush()
    assert exported.values["orchestrator_loss",] == 3.0
    assert "a sink is left out from now on" in caplog.text
