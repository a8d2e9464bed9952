"""Metrics: what is written is read again, whatever was cut off; no sink ends a run."""

import json
import logging
import sys
import threading
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from orchestrator.errors import CheckpointError, ConfigError
from orchestrator.storage.run_folder import RunFolder
from orchestrator.telemetry.charts import scalars
from orchestrator.telemetry.metrics import MetricsLog, read_metrics, read_records, to_line
from orchestrator.telemetry.records import (
    Begin,
    CheckpointSaved,
    Evaluation,
    Note,
    Record,
    Stamped,
    Step,
    to_json,
)
from orchestrator.telemetry.sinks import Sinks, TensorBoardSink, WandbSink, open_sinks
from tests.support.runs import metrics_in


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


TIMES_S = count(1001.0)  # a record comes a second after the one before


def stamped(record: Record, attempt: str = "a") -> Stamped:
    return Stamped(record, next(TIMES_S), attempt)


def step(iter_num: int, loss: float = 1.0, attempt: str = "a") -> Stamped:
    computed = {"lr": 1e-3, "dt_s": 0.5, "mfu": 0.25, "tflops": None, "tokens_per_s": 9.0}
    return stamped(Step(iter=iter_num, loss=loss, **computed), attempt)


def evaluation(iter_num: int, val_loss: float = 2.0, mfu: float | None = None) -> Stamped:
    return stamped(Evaluation(iter=iter_num, train_loss=1.5, val_loss=val_loss, lr=1e-3, mfu=mfu, tflops=None))


def begin(iter_num: int, attempt: str = "a") -> Stamped:
    sizes = {"max_iters": 9, "num_params": 5, "tokens_per_iter": 64, "world_size": 1}
    return stamped(Begin(iter=iter_num, from_=None, device="cpu", dtype="float32", **sizes), attempt)


def saved(iter_num: int) -> Stamped:
    losses = {"best_val_loss": 2.0, "val_loss": None}
    return stamped(CheckpointSaved(iter=iter_num, name=f"c{iter_num}", seconds=0.5, pause_s=0.25, **losses))


@pytest.fixture
def memory_dir(request: pytest.FixtureRequest) -> str:
    return f"memory://metrics/{request.node.name}"


def parts(url: str) -> list[str]:
    fs = MemoryFileSystem()
    return sorted(path.rsplit("/", 1)[-1] for path in fs.ls(url.removeprefix("memory:/"), detail=False))


@pytest.fixture(params=["disk", "object store"])
def out_dir(request: pytest.FixtureRequest, tmp_path: Path, memory_dir: str) -> str:
    return str(tmp_path / "run") if request.param == "disk" else memory_dir


def test_records_come_back_with_attempt_and_time(out_dir: str) -> None:
    log = MetricsLog(RunFolder(out_dir), "a1")
    records = [evaluation(0), step(0), saved(5)]
    for record in records:
        log.write(record)
    log.close()
    assert read_metrics(RunFolder(out_dir)) == records
    expected = [{**to_json(each.record), "attempt": "a", "time": each.time_s} for each in records]
    assert metrics_in(out_dir) == expected


def test_a_run_without_metrics_has_none(out_dir: str) -> None:
    assert metrics_in(out_dir) == []


def test_of_an_iteration_computed_twice_the_last_wins(out_dir: str) -> None:
    for attempt, iters, loss in (("zz", range(6), 1.0), ("aa", range(3, 5), 2.0)):
        log = MetricsLog(RunFolder(out_dir), attempt)
        for i in iters:
            log.write(step(i, loss, attempt))
            log.write(evaluation(i))
        log.write(begin(iters[0], attempt))
        log.close()
    records = metrics_in(out_dir)
    steps = [(r["iter"], r["loss"], r["attempt"]) for r in records if r["kind"] == "step"]
    assert steps == [(0, 1.0, "zz"), (1, 1.0, "zz"), (2, 1.0, "zz"), (3, 2.0, "aa"), (4, 2.0, "aa"), (5, 1.0, "zz")]
    assert [r["iter"] for r in records if r["kind"] == "eval"] == list(range(6))
    assert [r["attempt"] for r in records if r["kind"] == "begin"] == ["zz", "aa"]


def test_what_was_computed_again_is_kept_apart(tmp_path: Path) -> None:
    log = MetricsLog(RunFolder(str(tmp_path)), "a")
    for record in (step(1), step(2), step(3, loss=9.0), step(2, loss=3.0), step(3, loss=4.0), step(4)):
        log.write(record)
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() * 2)  # the driver has added the same lines
    records = read_records(RunFolder(str(tmp_path)))
    assert [(x.record.iter, x.record.loss) for x in records.metrics if isinstance(x.record, Step)] == [
        *((1, 1.0), (2, 3.0), (3, 4.0), (4, 1.0))
    ]
    undone = {(x.record.iter, x.record.loss) for x in records.superseded if isinstance(x.record, Step)}
    assert undone == {(2, 1.0), (3, 9.0)}
    assert records.left_out == {}


def test_a_line_on_a_disk_is_there_at_once(tmp_path: Path) -> None:
    log = MetricsLog(RunFolder(str(tmp_path)), "a")
    log.write(step(1))
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["iter"] == 1


def test_a_torn_line_is_left_out_and_does_not_swallow_the_next(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    MetricsLog(RunFolder(str(tmp_path)), "a").write(step(1))
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"kind": "step", "iter": 2, "lo')
    MetricsLog(RunFolder(str(tmp_path)), "b").write(step(2, attempt="b"))
    assert [(r["iter"], r["attempt"]) for r in metrics_in(str(tmp_path))] == [(1, "a"), (2, "b")]
    assert "left out 1 cut off or damaged line" in caplog.text


def test_an_object_store_gets_parts_by_time(memory_dir: str) -> None:
    clock = Clock()
    log = MetricsLog(RunFolder(memory_dir), "a", flush_interval_s=30.0, clock=clock)
    log.write(step(7))
    assert metrics_in(memory_dir) == []
    clock.now_s += 30
    log.write(step(8))
    log.close()
    assert parts(memory_dir) == ["metrics-00000007-a.jsonl"]
    assert [r["iter"] for r in metrics_in(memory_dir)] == [7, 8]


def test_a_part_grows_until_it_is_large(memory_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.telemetry.metrics._PART_BYTES", len(to_line(step(0).to_json())) * 2)
    log = MetricsLog(RunFolder(memory_dir), "a")
    for i in (0, 1, 2, 3, 0, 1):  # back to 0: a rollback within the attempt
        log.write(step(i))
        log.close()
    assert parts(memory_dir) == ["metrics-00000000-a-2.jsonl", "metrics-00000000-a.jsonl", "metrics-00000002-a.jsonl"]
    assert [r["iter"] for r in metrics_in(memory_dir)] == [0, 1, 2, 3]


def test_training_does_not_wait_for_a_slow_upload(memory_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    is_open, has_begun = threading.Event(), threading.Event()
    put = MemoryFileSystem.pipe_file

    def slow_put(self: MemoryFileSystem, path: str, value: bytes) -> None:
        has_begun.set()
        assert is_open.wait(60)
        put(self, path, value)

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", slow_put)
    log = MetricsLog(RunFolder(memory_dir), "a", flush_interval_s=0.0)
    log.write(step(0))
    assert has_begun.wait(60)
    log.write(step(1))  # returns although the upload of step 0 hangs
    log.flush()
    is_open.set()
    log.close()
    assert [r["iter"] for r in metrics_in(memory_dir)] == [0, 1]


def test_close_gives_up_on_storage_that_hangs(
    memory_dir: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    is_open = threading.Event()
    monkeypatch.setattr(MemoryFileSystem, "pipe_file", lambda *_: is_open.wait(60))
    log = MetricsLog(RunFolder(memory_dir), "a", close_timeout_s=0.0)
    log.write(step(0))
    log.close()
    is_open.set()
    assert "1 metrics records were not written" in caplog.text


def test_lines_wait_while_storage_fails(
    out_dir: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    log = MetricsLog(RunFolder(out_dir), "a")

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr("orchestrator.storage.run_folder.append_lines", fail)
        broken.setattr(MemoryFileSystem, "pipe_file", fail)
        broken.setattr("orchestrator.telemetry.metrics._KEPT_LINES", 2)
        for i in range(4):
            log.write(step(i))
            log.close()
    log.write(step(4))
    log.close()
    assert [r["iter"] for r in metrics_in(out_dir)] == [2, 3, 4]
    changes = [r.levelname for r in caplog.records if "training goes on" in r.msg or "again" in r.msg]
    assert changes == ["WARNING", "INFO"]
    assert "No space left" in caplog.text


def test_a_record_without_iteration_belongs_to_the_one_before(out_dir: str) -> None:
    log = MetricsLog(RunFolder(out_dir), "a")
    for record in (stamped(Note(text="a line")), step(4), stamped(Note(text="another"))):
        log.write(record)
    log.close()
    folder = RunFolder(out_dir)
    lines = [json.loads(line) for name in folder.list() for line in (folder.read(name) or b"").splitlines()]
    assert [(line["kind"], line["iter"]) for line in lines] == [("note", 0), ("step", 4), ("note", 4)]
    assert [type(each.record) for each in read_metrics(folder)] == [Note, Step, Note]


def test_lines_are_standard_json() -> None:
    assert json.loads(to_line({"loss": float("nan"), "lr": float("inf"), "x": 1.5})) == {
        "loss": None,
        "lr": None,
        "x": 1.5,
    }


def test_what_is_no_storage_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nothing://run"):
        metrics_in("nothing://run")
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(CheckpointError, match="cannot be read"):
        metrics_in(str(tmp_path))


class Broken:
    """A sink that fails at everything."""

    def __init__(self) -> None:
        self.calls = 0

    def write(self, stamped: Stamped) -> None:
        self.calls += 1
        raise ConnectionError(f"no route at {stamped.record.iter}")

    def flush(self) -> None:
        raise ConnectionError

    def close(self) -> None:
        raise ConnectionError


class Kept:
    """A sink that remembers what it was told."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    def write(self, stamped: Stamped) -> None:
        self.told.append(stamped.record.iter)

    def flush(self) -> None:
        self.told.append("flush")

    def close(self) -> None:
        self.told.append("close")


def test_a_failing_sink_is_dropped_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    broken, kept = Broken(), Kept()
    sinks = Sinks([broken, kept])
    for i in range(3):
        sinks.write(step(i))
    sinks.flush()
    sinks.close()
    sinks.write(step(9))
    assert broken.calls == 1
    assert kept.told == [0, 1, 2, "flush", "close"]
    assert [r.getMessage() for r in caplog.records] == [
        "Broken is left out from now on (ConnectionError: no route at 0); training goes on"
    ]


def test_charts_have_nanogpts_names() -> None:
    assert scalars(evaluation(5, mfu=0.4).record) == {
        "train/loss": 1.5,
        "val/loss": 2.0,
        "lr": 1e-3,
        "mfu": 40.0,
    }
    assert scalars(evaluation(5).record).keys() == {"train/loss", "val/loss", "lr"}
    assert scalars(step(1).record)["step/mfu"] == 25.0
    assert scalars(saved(1).record) == {
        "checkpoint/seconds": 0.5,
        "checkpoint/best_val_loss": 2.0,
        "checkpoint/pause_s": 0.25,
    }


def test_open_sinks_writes_the_metrics_file(tmp_path: Path) -> None:
    sinks = open_sinks(RunFolder(str(tmp_path)), "a")
    sinks.write(step(3))
    sinks.close()
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize(
    ("module", "setting", "extra"),
    [
        ("torch.utils.tensorboard", "tensorboard_log", "tensorboard"),
        ("wandb", "wandb_log", "wandb"),
        ("mlflow", "mlflow_log", "mlflow"),
    ],
)
def test_a_missing_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, setting: str, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    settings: dict[str, Any] = {setting: True}
    with pytest.raises(ConfigError, match=rf"{setting}=True.*pip install 'nanogpt-orchestrator\[{extra}\]'"):
        open_sinks(RunFolder(str(tmp_path)), "a", **settings)


def test_a_sink_that_cannot_open_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(TensorBoardSink, "__init__", fail)
    sinks = open_sinks(RunFolder(str(tmp_path)), "a", tensorboard_log=True)
    sinks.write(step(1))
    assert len(metrics_in(str(tmp_path))) == 1
    assert "disk full" in caplog.text


def test_tensorboard_shows_each_iteration_once_after_a_restart(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for start, stop, loss in ((0, 5, 1.0), (3, 8, 2.0)):
        sink = TensorBoardSink(str(tmp_path))
        sink.write(stamped(Note(text="not an iteration's")))
        sink.write(begin(start))
        if start == 0:
            sink.write(evaluation(3, val_loss=2.5))
        for i in range(start, stop):
            sink.write(step(i, loss))
        sink.flush()
        sink.close()
    charts = EventAccumulator(str(tmp_path / "tensorboard"))
    charts.Reload()
    points = {event.step: event.value for event in charts.Scalars("step/loss")}
    assert points == {0: 1.0, 1: 1.0, 2: 1.0, 3: 2.0, 4: 2.0, 5: 2.0, 6: 2.0, 7: 2.0}
    assert [event.step for event in charts.Scalars("val/loss")] == [3]  # the state resumed from was evaluated before


def test_wandb_offline_continues_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    ids = []
    for _ in range(2):
        sink = WandbSink(RunFolder(str(tmp_path)), "owt", "mini", {"n_layer": 2})
        ids.append((sink._run.id, sink._run.project, sink._run.name, dict(sink._run.config)))
        sink.write(begin(0))
        sink.write(evaluation(5))
        sink.flush()
        sink.close()
    assert ids[0] == ids[1] == ((tmp_path / "wandb_run_id").read_text(), "owt", "mini", {"n_layer": 2})
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) >= 1
