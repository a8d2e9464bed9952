from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator.__main__ import main
from orchestrator.telemetry.goodput import Ledger, account, duration, summary_of
from orchestrator.telemetry.records import Event, Stamped, StepWindow
from orchestrator.telemetry.stopwatch import Stopwatch


def steps(
    time_s: float, iter_num: int, count: int, step_s: float, eval_s: float = 0.0, pause_s: float = 0.0
) -> Stamped:
    window = {"count": count, "step_s": step_s, "median_s": step_s / count, "eval_s": eval_s, "pause_s": pause_s}
    return event("steps", time_s, iter=iter_num, **window)


def event(kind: str, time_s: float, **values: Any) -> Stamped:
    found = Stamped.from_json({"kind": kind, "time": time_s, "attempt": "a", **values})
    assert found
    return found


# 10 s of start, 5 s of a first step that compiles, 20 steps of 1 s and 1 s of evaluation in which training paused for 2
FIRST = [
    event("driver_started", 100.0),
    event("attempt_starting", 102.0),
    event("attempt_placed", 106.0),
    event("attempt_running", 107.0),
    event("begin", 109.0, iter=0),
    steps(115.0, 1, 1, 5.0),
    steps(136.0, 21, 20, 20.0, eval_s=1.0, pause_s=2.0),
]
END = event("driver_ended", 139.0, outcome="finished")


def test_undisturbed() -> None:
    ledger = account([*FIRST, END])
    assert ledger.wall_s == pytest.approx(39.0)
    assert ledger.seconds["start_up"] == pytest.approx(10 + 4 + 3)  # 4 s of the first step are not the median; the end
    assert ledger.seconds["pause"] == pytest.approx(2.0)
    assert ledger.seconds["productive"] == pytest.approx(20.0)
    assert ledger.goodput == pytest.approx(20 / 39)
    assert ledger.incidents == []
    assert ledger.iter_num == 21


FAILED = [
    *FIRST,
    event("failure", 141.0, cause="worker_lost", node="n1", reached_iter=24, reached_at_s=139.0, rescue_s=0.5),
    event("attempt_ended", 142.0),
    event("attempt_starting", 142.5),
]


def test_failure_by_phase() -> None:
    again = [
        event("attempt_placed", 144.0),
        event("attempt_running", 144.5),
        event("begin", 146.0, iter=24, restore_s=1.0),
        steps(148.0, 25, 1, 1.5),
        steps(158.0, 35, 10, 10.0),
        event("driver_ended", 158.5),
    ]
    ledger = account(reversed([*FAILED, *again]))
    assert ledger.seconds["detection"] == pytest.approx(2.0)
    assert ledger.seconds["recovery"] == pytest.approx(146.5 - 141 + 0.5)
    assert ledger.seconds["lost"] == 0
    (incident,) = ledger.incidents
    assert (incident.cause, incident.where, incident.iter_num, incident.steps_repeated) == ("worker_lost", "n1", 24, 0)
    expected = {"detect": 2.0, "rescue": 0.5, "tear_down": 1.0, "place": 1.5, "start": 0.5}
    assert incident.phases == pytest.approx(expected | {"set_up": 0.5, "restore": 1.0, "first_step": 2.0})
    assert incident.total_s == pytest.approx(9.0)
    assert ledger.wall_s == pytest.approx(58.5)


def test_iterations_that_are_computed_again_are_lost() -> None:
    again = [event("begin", 146.0, iter=20), steps(147.0, 21, 1, 1.0), event("driver_ended", 148.0)]
    ledger = account([*FAILED, *again])
    assert ledger.seconds["lost"] == pytest.approx(4.0)
    assert ledger.incidents[0].steps_repeated == 4


def test_a_rollback_loses_its_stretch() -> None:
    again = [event("rollback", 136.0, to_iter=16), event("begin", 137.0, iter=16), steps(138.0, 17, 1, 1.0)]
    ledger = account([*FIRST, *again])
    assert ledger.seconds["lost"] == pytest.approx(5.0)
    assert [(incident.cause, incident.steps_repeated) for incident in ledger.incidents] == [("bad_numbers", 5)]


def test_asking_again_for_machines_is_waiting() -> None:
    again = [event("attempt_starting", 202.5), event("attempt_placed", 203.5), event("driver_ended", 204.0)]
    ledger = account([*FAILED, *again])
    assert ledger.seconds["waiting"] == pytest.approx(60.0)
    assert ledger.incidents[0].phases["wait"] == pytest.approx(60.0)


def test_a_driver_that_was_killed_leaves_a_gap_and_one_that_stopped_does_not() -> None:
    later = [event("driver_started", 236.0), event("begin", 240.0, iter=21), event("driver_ended", 241.0)]
    killed = account([*FIRST, *later])
    assert killed.seconds["waiting"] == pytest.approx(100.0)
    assert [incident.cause for incident in killed.incidents] == ["driver_lost"]
    stopped = account([*FIRST, event("driver_ended", 136.0), *later])
    assert stopped.seconds["waiting"] == 0
    assert stopped.incidents == []


def test_every_second_is_booked_once() -> None:
    for cut in range(1, len(FAILED)):
        ledger = account(FAILED[:cut])
        assert ledger.wall_s == pytest.approx(max(each.time_s for each in FAILED[:cut]) - 100.0)


def test_report_reads_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def write(name: str, records: list[Stamped]) -> None:
        lines = (json.dumps({"iter": 0, **stamped.to_json()}) + "\n" for stamped in records)
        (tmp_path / name).write_text("".join(lines))

    write("events.jsonl", [each for each in FAILED if isinstance(each.record, Event)])
    write("metrics.jsonl", [each for each in FAILED if not isinstance(each.record, Event)])
    assert main(["report", f"--out_dir={tmp_path}"]) == 0
    text = capsys.readouterr().out
    assert "worker_lost" in text
    assert "24 iterations" in text
    assert main(["report", f"--out_dir={tmp_path}", "--json=True"]) == 0
    assert json.loads(capsys.readouterr().out)["incidents"][0]["cause"] == "worker_lost"
    assert main(["report", f"--out_dir={tmp_path / 'none'}"]) == 2
    assert "holds no events" in capsys.readouterr().err


def test_words() -> None:
    assert [duration(s) for s in (12.34, 245, 12000, 187200)] == ["12.3 s", "4 min 05 s", "3 h 20 min", "2 d 04 h"]
    assert summary_of(Ledger()).startswith("goodput 0.000")


def test_windows_of_the_stopwatch() -> None:
    times = iter([0.0, 3.0, 4.0, 6.0, 7.0, 15.0])
    watch = Stopwatch(clock=lambda: next(times))
    first = watch.stepped(1, paused_s=0.5)
    assert first
    assert (first.count, first.step_s, first.pause_s) == (1, 3.0, 0.5)
    assert watch.stepped(2, 0.5) is None
    watch.evaluated()
    assert watch.stepped(3, 0.5) is None
    window = watch.stepped(4, 0.75)
    expected = {"count": 3, "step_s": 10.0, "median_s": 1.0, "longest_s": 8.0, "eval_s": 2.0, "pause_s": 0.25}
    assert window == StepWindow(iter=4, **expected)
