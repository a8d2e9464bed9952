"""The lines of metrics.jsonl and events.jsonl, byte for byte, a kind after the other: reports and tools read them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest

from orchestrator.storage.run_folder import RunFolder
from orchestrator.telemetry.metrics import MetricsLog, read_events, read_metrics
from orchestrator.telemetry.records import (
    AttemptEnded,
    AttemptPlaced,
    AttemptRunning,
    AttemptStarting,
    AttemptWaiting,
    Begin,
    CheckpointFailed,
    CheckpointSaved,
    CheckpointSkipped,
    DriverEnded,
    DriverStarted,
    Evaluation,
    Event,
    Failure,
    LanesChanged,
    LoopRecord,
    RollingBack,
    Stamped,
    Step,
    StepSkipped,
    StepWindow,
)

SIZES: dict[str, Any] = {"max_iters": 9, "num_params": 5, "tokens_per_iter": 64}
PLACE: dict[str, Any] = {"world_size": 1, "device": "cpu", "dtype": "float32"}
LOSSES: dict[str, Any] = {"iter": 8, "train_loss": 2.0, "val_loss": 2.125, "lr": 0.001, "mfu": None, "tflops": None}
PACE: dict[str, Any] = {"lr": 0.001, "dt_s": 0.125, "tokens_per_s": 512.0}
OF_A_NODE: dict[str, Any] = {"number": 2, "ranks": [1], "node": "n1"}
RESCUED: dict[str, Any] = {"rescue_s": 0.25, "ranks_rescued": 1, "reached_iter": 7, "reached_at_s": 999.5}

OF_THE_LOOP: dict[str, LoopRecord] = {
    '"iter": 0, STAMP, "kind": "begin", "max_iters": 9, "from": null, "num_params": 5, "tokens_per_iter": 64, '
    '"world_size": 1, "device": "cpu", "dtype": "float32"': Begin(iter=0, from_=None, **SIZES, **PLACE),
    '"iter": 4, STAMP, "kind": "begin", "max_iters": 9, "from": "c4", "restore_s": 0.5, "size_bytes": 9, '
    '"from_storage_bytes": 0, "num_params": 5, "tokens_per_iter": 64, "world_size": 1, "device": "cpu", '
    '"dtype": "float32"': Begin(
        iter=4, from_="c4", restore_s=0.5, size_bytes=9, from_storage_bytes=0, **SIZES, **PLACE
    ),
    '"iter": 4, STAMP, "kind": "step", "loss": 2.5, "lr": 0.001, "dt_s": 0.125, "mfu": null, "tflops": null, '
    '"tokens_per_s": 512.0': Step(iter=4, loss=2.5, mfu=None, tflops=None, **PACE),
    '"iter": 5, STAMP, "kind": "step", "loss": null, "lr": 0.001, "dt_s": 0.125, "mfu": 0.25, "tflops": 80.0, '
    '"tokens_per_s": 512.0': Step(iter=5, loss=float("nan"), mfu=0.25, tflops=80.0, **PACE),
    '"iter": 5, STAMP, "kind": "step", "loss": 2.5, "lr": 0.001, "dt_s": 0.125, "mfu": null, "tflops": null, '
    '"tokens_per_s": 512.0, "grad_norm": 0.75': Step(iter=5, loss=2.5, mfu=None, tflops=None, grad_norm=0.75, **PACE),
    '"iter": 6, STAMP, "kind": "steps", "count": 2, "step_s": 0.25, "median_s": 0.125, "longest_s": 0.125, '
    '"eval_s": 0.0, "pause_s": 0.0': StepWindow(
        iter=6, count=2, step_s=0.25, median_s=0.125, longest_s=0.125, eval_s=0.0, pause_s=0.0
    ),
    '"iter": 6, STAMP, "kind": "lanes_changed", "lanes": 8, "before": 4': LanesChanged(iter=6, lanes=8, before=4),
    '"iter": 6, STAMP, "kind": "step_skipped", "why": "the norm of the gradient is nan", "skipped": 1, '
    '"in_a_row": 1': StepSkipped(iter=6, why="the norm of the gradient is nan", skipped=1, in_a_row=1),
    '"iter": 8, STAMP, "kind": "eval", "train_loss": 2.0, "val_loss": 2.125, "lr": 0.001, "mfu": null, '
    '"tflops": null': Evaluation(**LOSSES),
    '"iter": 8, STAMP, "kind": "eval", "train_loss": 2.0, "val_loss": 2.125, "lr": 0.001, "mfu": null, '
    '"tflops": null, "perplexity": 8.5, "bits_per_byte": 3.0': Evaluation(**LOSSES, perplexity=8.5, bits_per_byte=3.0),
    '"iter": 8, STAMP, "kind": "checkpoint", "name": "c8", "seconds": 0.5, "best_val_loss": 2.125, "val_loss": null, '
    '"pause_s": 0.25': CheckpointSaved(
        iter=8, name="c8", seconds=0.5, best_val_loss=2.125, val_loss=None, pause_s=0.25
    ),
    '"iter": 8, STAMP, "kind": "checkpoint_skipped", "name": "c8", "why": "too slow"': CheckpointSkipped(
        iter=8, name="c8", why="too slow"
    ),
    '"iter": 8, STAMP, "kind": "checkpoint_failed", "name": "c8", "seconds": 0.5, "why": "no space", '
    '"pause_s": 0.25': CheckpointFailed(iter=8, name="c8", seconds=0.5, why="no space", pause_s=0.25),
    '"iter": 9, STAMP, "kind": "rollback", "to_iter": 4, "skipped_iters": 5, "why": "bad steps"': RollingBack(
        iter=9, to_iter=4, skipped_iters=5, why="bad steps"
    ),
}

EVENTS: dict[str, Event] = {
    '"iter": 0, STAMP, "kind": "driver_started", "start_id": "a"': DriverStarted(start_id="a"),
    '"iter": 0, STAMP, "kind": "attempt_starting", "number": 2, "num_workers": 2': AttemptStarting(
        number=2, num_workers=2
    ),
    '"iter": 0, STAMP, "kind": "attempt_waiting"': AttemptWaiting(),
    '"iter": 0, STAMP, "kind": "attempt_waiting", "room": 1, "least": 2': AttemptWaiting(room=1, least=2),
    '"iter": 0, STAMP, "kind": "attempt_placed", "number": 2, "num_workers": 2': AttemptPlaced(number=2, num_workers=2),
    '"iter": 0, STAMP, "kind": "attempt_running", "number": 2, "num_workers": 2': AttemptRunning(
        number=2, num_workers=2
    ),
    '"iter": 0, STAMP, "kind": "attempt_running", "number": 2, "num_workers": 2, "nodes": ["n1", "n2"]': AttemptRunning(
        number=2, num_workers=2, nodes=["n1", "n2"]
    ),
    '"iter": 0, STAMP, "kind": "failure", "cause": "controller_lost", "text": "gone"': Failure(
        cause="controller_lost", text="gone"
    ),
    '"iter": 0, STAMP, "kind": "failure", "number": 2, "cause": "resized", "ranks": [], "text": "grown", '
    '"rescue_s": 0.25, "ranks_rescued": 1, "reached_iter": 7, "reached_at_s": 999.5': Failure(
        number=2, cause="resized", ranks=[], text="grown", **RESCUED
    ),
    '"iter": 0, STAMP, "kind": "failure", "number": 2, "cause": "worker_lost", "ranks": [1], "text": "killed", '
    '"node": "n1", "traceback": "", "rescue_s": 0.25, "ranks_rescued": 1, "reached_iter": 7, '
    '"reached_at_s": 999.5': Failure(cause="worker_lost", text="killed", traceback="", **OF_A_NODE, **RESCUED),
    '"iter": 0, STAMP, "kind": "failure", "number": 2, "cause": "gpu_fault", "ranks": [1], "text": "no CUDA", '
    '"node": "n1"': Failure(cause="gpu_fault", text="no CUDA", **OF_A_NODE),
    '"iter": 0, STAMP, "kind": "attempt_ended", "number": 2': AttemptEnded(number=2),
    '"iter": 0, STAMP, "kind": "driver_ended", "outcome": "finished"': DriverEnded(outcome="finished"),
}


def written(folder: Path, stem: str, records: list[Stamped]) -> list[str]:
    log = MetricsLog(RunFolder(str(folder)), "a", stem=stem)
    for stamped in records:
        log.write(stamped)
    log.close()
    return (folder / f"{stem}.jsonl").read_text().splitlines(keepends=True)


@pytest.mark.parametrize(("stem", "expected"), [("metrics", OF_THE_LOOP), ("events", EVENTS)])
def test_a_line_of_each_kind(tmp_path: Path, stem: str, expected: dict[str, Any]) -> None:
    lines = written(tmp_path, stem, [Stamped(record, 1000.5, "a") for record in expected.values()])
    assert lines == [f"{{{line}}}\n".replace("STAMP", '"attempt": "a", "time": 1000.5') for line in expected]


def test_every_kind_has_a_line() -> None:
    assert {type(record) for record in OF_THE_LOOP.values()} == set(get_args(LoopRecord))
    assert {type(record) for record in EVENTS.values()} == set(get_args(Event))


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    events = [Stamped(record, 1000.0 + n, "a") for n, record in enumerate(EVENTS.values())]
    written(tmp_path, "events", events)
    assert read_events(RunFolder(str(tmp_path))) == events
    several = [Stamped(record, 1000.5, "a") for line, record in OF_THE_LOOP.items() if '"loss": null' not in line]
    last = {each.record.iter if isinstance(each.record, Evaluation) else id(each): each for each in several}
    written(tmp_path, "metrics", several)
    assert read_metrics(RunFolder(str(tmp_path))) == list(last.values()), "of two evaluations the last"
