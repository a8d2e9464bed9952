"""Which rank was where, and when: by events of this version and of older ones, and without any."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
from bokeh.models import Text
from bokeh.plotting import figure

from orchestrator.report import timeline
from orchestrator.report.curves import curves_of
from orchestrator.report.presences import Presence, evaluations_of, presences_of
from orchestrator.report.run import Run
from orchestrator.report.timeline import _row_names, timeline_of
from orchestrator.telemetry.goodput import Stretch
from orchestrator.telemetry.records import Records, Stamped, StepWindow


def record(kind: str, time_s: float, attempt: str = "a", **values: Any) -> Stamped:
    found = Stamped.from_json({"kind": kind, "time": time_s, "attempt": attempt, "iter": 0, **values})
    assert found
    return found


def window(time_s: float, it: int, eval_s: float, attempt: str = "a", step_s: float = 9.0) -> Stamped:
    about = {"count": 9, "median_s": 1.0, "longest_s": 1.0, "eval_s": eval_s, "pause_s": 0.0}
    return record("steps", time_s, attempt, iter=it, step_s=step_s, **about)


KILLED = [
    record("driver_started", 100.0),
    record("attempt_placed", 102.0, number=1, num_workers=2),
    record("attempt_running", 103.0, number=1, num_workers=2, nodes=["n1", "n2"]),
    record("failure", 121.0, number=1, cause="node_lost", ranks=[1], reached_at_s=119.5),
    record("attempt_ended", 122.0, number=1),
    record("attempt_placed", 125.0, number=2, num_workers=2),
    record("attempt_running", 126.0, number=2, num_workers=2, nodes=["n1", "n3"]),
    record("driver_ended", 150.0, outcome="finished"),
]
METRICS = [
    record("begin", 104.0, world_size=2),
    window(119.0, 9, eval_s=4.0),
    record("begin", 128.0, "b", iter=9, world_size=2),
    window(149.0, 20, eval_s=0.0, attempt="b"),
]


def test_a_rank_that_fails_is_gone_before_the_others() -> None:
    assert presences_of(Records(KILLED, METRICS, [], {})) == [
        Presence(0, "n1", 102.0, 122.0),
        Presence(1, "n2", 102.0, 119.5),
        Presence(0, "n1", 125.0, 150.0),
        Presence(1, "n3", 125.0, 150.0),
    ]


def test_a_driver_that_ended_without_a_word_left_its_ranks_at_the_last_record() -> None:
    events = [*KILLED[:3], record("driver_started", 500.0)]
    found = presences_of(Records(events, METRICS[:2], [], {}))
    assert [each.end_s for each in found] == [119.0, 119.0]


def test_events_of_an_older_version_name_no_nodes() -> None:
    events = [
        each if each.record.kind != "attempt_running" else record("attempt_running", each.time_s, num_workers=2)
        for each in KILLED
    ]
    found = presences_of(Records(events, METRICS, [], {}))
    assert [(each.rank, each.node) for each in found] == [(0, ""), (1, "")] * 2


def test_without_events_the_metrics_tell() -> None:
    run = Run("run", Records([], METRICS, [], {}))
    assert presences_of(run.records) == [
        *(Presence(rank, "", 104.0, 119.0) for rank in range(2)),
        *(Presence(rank, "", 128.0, 149.0) for rank in range(2)),
    ]
    assert run.ledger.wall_s == pytest.approx(15.0 + 21.0), "what came between two starts is not counted"
    assert run.ledger.incidents == []


def test_a_rollback_ends_a_presence_of_the_same_start() -> None:
    metrics = [
        *METRICS[:2],
        record("rollback", 119.5, iter=9, to_iter=4),
        record("begin", 121.0, restore_s=1.0),
        METRICS[3],
    ]
    found = presences_of(Records([], metrics, [], {}))
    assert {(each.begin_s, each.end_s) for each in found} == {(104.0, 119.5), (120.0, 149.0)}


def test_evaluations_share_the_time_that_their_window_tells() -> None:
    metrics = [record("eval", 110.0, val_loss=2.0), record("eval", 116.0, val_loss=2.0), window(119.0, 9, eval_s=4.0)]
    assert evaluations_of(metrics) == [Stretch("evaluation", 108.0, 110.0), Stretch("evaluation", 114.0, 116.0)]


def test_the_stretches_are_all_the_time_that_the_ledger_has() -> None:
    run = Run("run", Records(KILLED, METRICS, [], {}))
    assert sum(each.end_s - each.begin_s for each in run.ledger.stretches) == pytest.approx(run.ledger.wall_s)
    assert [each.entry for each in run.ledger.stretches] == [
        "start_up", "productive", "detection", "recovery", "productive", "start_up",
    ]  # fmt: skip


def test_the_ranks_of_many_nodes_share_their_nodes_rows() -> None:
    nodes = [f"node-{rank // 8}" for rank in range(64)]
    events = [
        record("driver_started", 100.0),
        record("attempt_placed", 102.0, number=1, num_workers=64),
        record("attempt_running", 103.0, number=1, num_workers=64, nodes=nodes),
        record("driver_ended", 150.0, outcome="finished"),
    ]
    made = timeline_of(Run("run", Records(events, METRICS[:2], [], {})))
    assert made
    rows = list(made.yaxis.major_label_overrides.values())
    assert rows == ["incidents", "checkpoints", "run", *(f"node-{n}" for n in range(8))]


def killed_often(times: int, ranks: int) -> Records:
    """Return records of a run that loses a worker again and again, after 30 s of training each time."""
    events, metrics = [record("driver_started", 100.0)], []
    for n in range(times):
        at_s, nodes = 100.0 + 40 * n, [f"gpu-{rank // 8}.mine.internal" for rank in range(ranks)]
        events += [
            record("attempt_placed", at_s + 2, number=n, num_workers=ranks),
            record("attempt_running", at_s + 3, number=n, num_workers=ranks, nodes=nodes),
            record("failure", at_s + 36, number=n, cause="worker_lost", ranks=[1], reached_at_s=at_s + 34, text="lost"),
            record("attempt_ended", at_s + 37, number=n),
        ]
        metrics += [
            record("begin", at_s + 5, f"a{n}", iter=9 * n, world_size=ranks),
            window(at_s + 34, 9 * (n + 1), 0.0, f"a{n}", step_s=28.0),
        ]
    return Records([*events, record("driver_ended", 100.0 + 40 * times, outcome="finished")], metrics, [], {})


def bars_of(made: figure) -> dict[str, list[tuple[str, float, float]]]:
    """Return the row, begin and end of what is drawn, by the words of the legend."""
    rows = made.yaxis.major_label_overrides
    return {
        each.name: [
            (rows[round(float(top) + 0.36)], left / 1000, right / 1000)
            for top, left, right in zip(data["top"], data["left"], data["right"], strict=True)
        ]
        for each in made.renderers
        if "top" in (data := each.data_source.data)
    }


@pytest.mark.parametrize("ranks", [8, 64])
def test_many_attempts_leave_no_gap_where_a_rank_was_there(ranks: int) -> None:
    run = Run("run", killed_often(200, ranks))
    made = timeline_of(run)
    assert made
    drawn = [bar for bars in bars_of(made).values() for bar in bars]
    of_run = sum(end - begin for row, begin, end in drawn if row == "run")
    assert of_run == pytest.approx(run.ledger.wall_s, rel=1e-4)
    rank_0 = "gpu-0 · rank 0" if ranks == 8 else "gpu-7"
    assert sum(end - begin for row, begin, end in drawn if row == rank_0) == pytest.approx(200 * 35.0, rel=1e-4)


def test_where_there_is_too_much_to_draw_the_shortest_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timeline, "_MAX_BARS", 100)
    made = timeline_of(Run("run", killed_often(20, 4)))
    assert made
    assert {name: len(bars) for name, bars in bars_of(made).items()} == {"training": 100}


def test_rows_are_named_by_hosts_without_their_domain_where_that_tells_them_apart() -> None:
    def rows(*nodes: str) -> list[str]:
        return list(_row_names([Presence(rank, node, 0.0, 1.0) for rank, node in enumerate(nodes)]).values())

    assert rows("a.x.net", "b.x.net") == ["a · rank 0", "b · rank 1"]
    assert rows("a.x.net", "a.y.net") == ["a.x.net · rank 0", "a.y.net · rank 1"]
    assert rows("10.0.0.1", "11.0.0.1") == ["10.0.0.1 · rank 0", "11.0.0.1 · rank 1"]


def test_of_several_runs_the_legend_has_one_word_each() -> None:
    records = killed_often(3, 4)
    steps = [record("step", 101.0 + n, iter=n, loss=3.0) for n in range(9)]
    evaluated = [record("eval", 110.0, iter=9, val_loss=2.5), record("rollback", 111.0, iter=9, to_iter=4)]
    run = Run(
        "s3://bucket/mine", replace(records, metrics=[*records.metrics, *steps, *evaluated], superseded=steps[:3])
    )

    def legend_of(*runs: Run) -> list[str]:
        return [item.label.value for item in curves_of(runs)["loss"].legend[0].items]

    assert legend_of(run) == ["computed again", "train", "validation", "best: 2.5000", "rolled back", "failure"]
    assert legend_of(run, replace(run, name="other")) == ["s3://bucket/mine", "other"]
    assert legend_of(run, run) == ["s3://bucket/mine (1)", "s3://bucket/mine (2)"]


def test_many_incidents_are_dots_without_numbers() -> None:
    for times, is_numbered in ((10, True), (200, False)):
        made = timeline_of(Run("run", killed_often(times, 4)))
        assert made
        assert any(isinstance(each.glyph, Text) for each in made.renderers) == is_numbered


def test_checkpoints_are_marks_by_where_they_went() -> None:
    windows = [
        replace(each, record=replace(each.record, snapshots=5 if n % 3 else 0))
        for n in range(3_000)
        if isinstance((each := window(104.0 + n / 200, n, eval_s=0.0)).record, StepWindow)
    ]
    saved = record("checkpoint", 110.0, iter=9, name="checkpoint_9", state="s", seconds=1.0)
    failed = record("checkpoint_failed", 111.0, iter=9, name="checkpoint_9", why="no room")
    rescued = record("failure", 121.0, iter=9, cause="node_lost", ranks=[1], reached_iter=9, reached_at_s=119.5)
    made = timeline_of(Run("run", Records([*KILLED[:3], rescued], [*windows, saved, failed], [], {})))
    assert made
    marks = {each.name: each.data_source.data for each in made.renderers if "checkpoint" in (each.name or "")}
    assert 90 < len(marks["checkpoint in memory"]["x"]) <= 150
    assert {name: len(data["x"]) for name, data in marks.items() if name != "checkpoint in memory"} == {
        "checkpoint in storage": 1,
        "checkpoint rescued into memory": 1,
        "checkpoint failed": 1,
    }
    told = [re.fullmatch(r"(\d+) in the last (\d+) iterations", text) for text in marks["checkpoint in memory"]["text"]]
    assert sum(int(each[1]) for each in told if each) == 5 * 2000
    assert sum(int(each[2]) for each in told if each) == 9 * 3000
