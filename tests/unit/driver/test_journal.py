"""What a driver keeps of its attempts, the last metrics of one that was killed among it."""

from __future__ import annotations

import math
import time
from pathlib import Path

from orchestrator.driver.journal import Journal
from orchestrator.storage.run_folder import RunFolder
from orchestrator.telemetry.metrics import MetricsLog
from orchestrator.telemetry.records import Note, Stamped
from tests.support.runs import events_in, metrics_in

BEGAN_S = time.time() - 1000


def record(kind: str, it: int, attempt: str, after_s: float) -> Stamped:
    steps = {"count": 1, "step_s": 1.0, "eval_s": 0.0, "median_s": 1.0, "pause_s": 0.0} if kind == "steps" else {}
    found = Stamped.from_json({"kind": kind, "iter": it, "attempt": attempt, "time": BEGAN_S + after_s, **steps})
    assert found
    return found


def attempt(name: str, first: int, last: int) -> list[Stamped]:
    """Return what rank 0 tells, an iteration each ten seconds."""
    told = [record("begin", first, name, 10 * first)]
    for it in range(first, last):
        told += [record("step", it, name, 10 * it + 9), record("steps", it + 1, name, 10 * it + 9.5)]
    return told


def test_what_a_killed_rank_had_not_uploaded_is_kept_by_the_driver(tmp_path: Path) -> None:
    url = f"memory://events/{tmp_path.name}"
    uploaded = MetricsLog(RunFolder(url), "a", flush_interval_s=1e9)
    events = Journal(
        "driver",
        MetricsLog(RunFolder(url), "driver", stem="events"),
        MetricsLog(RunFolder(url), "driver", flush_interval_s=math.inf),
    )
    events.begin()
    told = attempt("a", 0, 20)
    for each in told[:30]:
        uploaded.write(each)
    uploaded.close()  # and the rest is lost with its process
    for each in told:
        events.observe(each)
    uploaded = MetricsLog(RunFolder(url), "b")
    again = attempt("b", 20, 22)
    for each in again:
        uploaded.write(each)
        events.observe(each)
    uploaded.close()
    events.observe(Stamped(Note(text="a line for people"), BEGAN_S))
    events.close()
    expected = [each.to_json() for each in told + again]
    assert metrics_in(url) == sorted(expected, key=lambda each: each["iter"]), "all of it, once"
    assert events_in(url) == []


def test_of_a_run_that_fails_the_last_metrics_are_kept_too(tmp_path: Path) -> None:
    url = f"memory://events/{tmp_path.name}"
    events = Journal("driver", None, MetricsLog(RunFolder(url), "driver"))
    for each in attempt("a", 0, 3):
        events.observe(each)
    events.keep_metrics()
    events.close()
    assert [each["iter"] for each in metrics_in(url) if each["kind"] == "step"] == [0, 1, 2]
