"""Ray's own words: shown after a moment, or logged where a loss is expected."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from orchestrator.driver.ray_output import RayOutput, ray_output


class Screen:
    """A RayOutput over a list of lines, at a time that tests set."""

    def __init__(self, path: Path) -> None:
        self.lines: list[str] = []
        self.now_s = 100.0
        self.output = RayOutput(lambda batch, *_rest: self.lines.extend(batch["lines"]), clock=lambda: self.now_s)
        self.output.log_to(path)

    def prints(self, line: str, is_err: bool = True, **source: Any) -> None:
        self.output.write({"lines": [line], "is_err": is_err, "pid": 7, "actor_name": "RayTrainWorker", **source}, None)

    def after(self, seconds: float) -> list[str]:
        self.now_s += seconds
        self.output.pass_on()
        return self.lines


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "ray.log"


@pytest.fixture
def screen(log: Path) -> Screen:
    return Screen(log)


def test_a_print_in_the_users_code_is_shown_at_once(screen: Screen) -> None:
    screen.prints("a batch", is_err=False)
    assert screen.lines == ["a batch"]


def test_in_calm_times_all_is_shown_and_nothing_logged(screen: Screen, log: Path) -> None:
    screen.prints("a warning")
    screen.prints("a node is slow", is_err=False, pid="raylet")
    assert screen.after(2.0) == []
    assert screen.after(4.0) == ["a warning", "a node is slow"]
    assert not log.exists()
    assert screen.output.log_file_to_tell() is None


def test_words_about_an_expected_loss_are_logged_from_just_before_it_until_just_after(
    screen: Screen, log: Path
) -> None:
    screen.prints("connection closed by peer")  # before the driver knows
    screen.now_s += 1.0
    screen.output.expect_loss()
    screen.prints("Traceback", ip="10.0.0.2")
    screen.after(60.0)
    screen.output.end_loss()
    screen.prints("repeated 2x", is_err=False, pid="raylet")
    screen.after(1.0)
    assert screen.lines == []
    assert log.read_text().splitlines() == [
        "(RayTrainWorker pid=7, ip=None) connection closed by peer",
        "(RayTrainWorker pid=7, ip=10.0.0.2) Traceback",
        "(raylet) repeated 2x",
    ]
    assert screen.output.log_file_to_tell() == log
    assert screen.output.log_file_to_tell() is None, "it is told once"
    screen.now_s += 60.0
    screen.prints("a warning")
    assert screen.after(6.0) == ["a warning"], "the loss is over"


def test_all_is_shown_after_all_where_nobody_expected_the_end(screen: Screen) -> None:
    screen.output.expect_loss()
    screen.prints("Traceback")
    assert screen.after(5.0) == []
    screen.prints("more of it")
    screen.output.show_everything()
    screen.prints("the rest")
    assert screen.after(6.0) == ["Traceback", "more of it", "the rest"]


def test_where_losses_in_a_row_end_the_run_the_recent_ones_are_shown(screen: Screen) -> None:
    for line in ("long ago", "the first of a row"):
        screen.output.expect_loss()
        screen.prints(line)
        screen.after(1.0)
        screen.output.end_loss()
        screen.after(400.0)
    assert screen.lines == []
    screen.output.show_everything()
    assert screen.lines == ["the first of a row"], "Ray's words about the last loss may come after the end"
    screen.output.show_everything()
    assert len(screen.lines) == 1, "once is enough"


def test_a_log_that_cannot_be_written_ends_nothing(tmp_path: Path) -> None:
    screen = Screen(tmp_path / "missing" / "ray.log")
    screen.output.expect_loss()
    screen.prints("Traceback")
    assert screen.after(1.0) == []
    assert screen.output.log_file_to_tell() is None


def test_rays_printing_is_ours_for_a_while_and_nothing_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray._private import worker

    shown: list[str] = []

    def print_worker_logs(data: dict[str, Any], print_file: Any, ignore_prefix: bool = False) -> None:  # noqa: ARG001
        shown.extend(data["lines"])

    monkeypatch.setattr(worker, "print_worker_logs", print_worker_logs)
    with ray_output():
        worker.print_to_stdstream({"lines": ["a worker died"], "pid": "raylet", "is_err": False}, ignore_prefix=False)
        assert shown == []
    assert shown == ["a worker died"]
    assert worker.print_worker_logs is print_worker_logs
