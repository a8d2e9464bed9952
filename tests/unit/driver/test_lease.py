"""One driver works on an out_dir: whoever comes second, comes back, or meets storage that fails."""

from __future__ import annotations

import logging
import os
import platform
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from orchestrator.driver.holder import machine, process_started
from orchestrator.driver.lease import LEASE_FILE, Lease
from orchestrator.errors import CheckpointError, ConfigError
from orchestrator.storage.run_folder import RunFolder

NEVER_S = 60.0  # a beat interval at which the thread does not come into play


@dataclass
class Time:
    """Seconds that pass only in sleep, where something may happen."""

    meanwhile: Callable[[], None] = lambda: None
    now_s: float = 0.0

    def clock(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds
        self.meanwhile()


@dataclass
class Other:
    """A driver on another machine, by what it writes."""

    folder: RunFolder
    values: dict[str, Any] = field(default_factory=dict)
    beats: int = 0

    def beat(self) -> None:
        self.beats += 1
        known = {
            "driver": "other",
            "host": "node7",
            "pid": 4711,
            "machine": "its boot, its processes",
            "process_started": 1,
            "started_at": "2026-01-01T00:00:00+00:00",
            "beat_interval_s": 5.0,
        }
        self.folder.write_json(LEASE_FILE, {**known, **self.values, "beat": self.beats})


@pytest.fixture(params=["disk", "object store"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> RunFolder:
    is_disk = request.param == "disk"
    return RunFolder(str(tmp_path / "a" / "run") if is_disk else f"memory://lease/{request.node.name}")


@pytest.fixture(autouse=True)
def _logs(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "orchestrator.driver.lease")


def new_lease(folder: RunFolder, time: Time, beat_interval_s: float = 5.0) -> Lease:
    return Lease(folder, beat_interval_s, time.clock, time.sleep)


def written(folder: RunFolder) -> dict[str, Any]:
    return folder.read_json(LEASE_FILE)


def put(folder: RunFolder, content: bytes) -> None:
    folder.fs.makedirs(folder.root, exist_ok=True)
    folder.fs.pipe_file(folder.path(LEASE_FILE), content)


def here(**values: Any) -> dict[str, Any]:
    """What a driver on this machine writes of itself."""
    return {"host": platform.node(), "machine": machine(), **values}


def test_free_out_dir_is_had_at_once_and_left_as_it_was(folder: RunFolder, tmp_path: Path) -> None:
    time = Time()
    lease = new_lease(folder, time, NEVER_S)
    lease.wait_until_free()
    assert time.now_s == 0
    with lease.held():
        lease.confirm()
        assert time.now_s == 1, "the other one's write gets its time to arrive"
        assert (written(folder)["pid"], written(folder)["driver"]) == (os.getpid(), lease.start_id)
    assert not folder.fs.exists(folder.path(LEASE_FILE))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_lease_is_given_back_however_the_run_ends(folder: RunFolder, error: type[BaseException]) -> None:
    with pytest.raises(error), new_lease(folder, Time(), NEVER_S).held():
        raise error
    assert written(folder) == {}


SKEWED = ["1970-01-01T00:00:00+00:00", "2026-01-01T00:00:00+00:00", "2999-12-31T23:59:59+00:00"]


@pytest.mark.parametrize("started_at", SKEWED)
def test_driver_that_lives_is_not_disturbed(folder: RunFolder, started_at: str) -> None:
    other = Other(folder, {"started_at": started_at})
    other.beat()
    time = Time()
    time.meanwhile = lambda: other.beat() if time.now_s == 5 else None
    with pytest.raises(ConfigError, match=r"is in use by the driver on node7 \(pid 4711, .* or give another --out_dir"):
        new_lease(folder, time).wait_until_free()
    assert time.now_s == 5
    assert written(folder)["beat"] == 2


@pytest.mark.parametrize("started_at", SKEWED)
def test_silent_driver_is_replaced_after_three_beats(
    folder: RunFolder, started_at: str, caplog: pytest.LogCaptureFixture
) -> None:
    Other(folder, {"started_at": started_at}).beat()
    time = Time()
    new_lease(folder, time).wait_until_free()
    assert time.now_s == 15
    who = f"the driver on node7 (pid 4711, started {started_at})"
    assert [entry.getMessage() for entry in caplog.records] == [
        f"out_dir={folder.out_dir} is in use by {who}: waiting up to 15 s to see whether it is alive",
        f"{who} has shown no life for 15 s: taking over",
    ]


def test_file_of_any_age_says_nothing(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path))
    other = Other(folder)
    other.beat()
    os.utime(tmp_path / LEASE_FILE, (0, 0))
    with pytest.raises(ConfigError):
        new_lease(folder, Time(meanwhile=other.beat)).wait_until_free()


def test_the_beats_of_the_one_that_is_there_decide(folder: RunFolder) -> None:
    Other(folder, {"beat_interval_s": 1.0}).beat()
    time = Time()
    new_lease(folder, time, 5.0).wait_until_free()
    assert time.now_s == pytest.approx(3)


def test_newcomer_that_stood_still_itself_watches_on(folder: RunFolder) -> None:
    other = Other(folder)
    other.beat()
    time = Time()

    def suspended() -> None:  # the whole machine, with both in it; the other one comes to its next beat later
        time.now_s += 3600
        if time.now_s > 2 * 3600:
            other.beat()

    time.meanwhile = suspended
    with pytest.raises(ConfigError):
        new_lease(folder, time).wait_until_free()


def test_driver_that_ends_in_the_meantime_is_not_waited_for(folder: RunFolder) -> None:
    Other(folder).beat()
    time = Time(meanwhile=lambda: folder.delete(LEASE_FILE))
    new_lease(folder, time).wait_until_free()
    assert time.now_s == 1


def test_dead_process_of_this_machine_is_replaced_at_once(folder: RunFolder, caplog: pytest.LogCaptureFixture) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    Other(folder, here(pid=dead.pid)).beat()
    time = Time()
    new_lease(folder, time).wait_until_free()
    assert time.now_s == 0
    assert f"(pid {dead.pid}, " in caplog.text
    assert "is gone: taking over at once" in caplog.text


def test_dead_process_that_nobody_has_reaped_is_replaced_at_once(folder: RunFolder) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        Other(folder, here(pid=process.pid, process_started=process_started(process.pid))).beat()
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        time = Time()
        new_lease(folder, time).wait_until_free()
    assert time.now_s == 0


def test_number_of_a_dead_process_may_be_anothers_by_now(folder: RunFolder) -> None:
    Other(folder, here(pid=os.getpid(), process_started=1)).beat()
    time = Time()
    new_lease(folder, time).wait_until_free()
    assert time.now_s == 0


@pytest.mark.parametrize(
    "values",
    [
        here(pid=os.getpid(), process_started=process_started(os.getpid())),  # it hangs, or it is stopped
        here(pid=2**22 + 1, machine="another boot, or another container"),
        here(pid=2**22 + 1, machine=None),
        here(pid=2**22 + 1, host="another"),
    ],
)
def test_process_that_cannot_be_seen_to_be_gone_is_watched(folder: RunFolder, values: dict[str, Any]) -> None:
    Other(folder, values).beat()
    time = Time()
    new_lease(folder, time).wait_until_free()
    assert time.now_s == 15


DAMAGED = [b"", b"{", b"[1]", b"\xff", b'{"driver": "x"}']


@pytest.mark.parametrize("content", DAMAGED)
def test_damaged_file_is_watched_and_then_replaced(
    folder: RunFolder, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    put(folder, content)
    time = Time()
    lease = new_lease(folder, time)
    lease.wait_until_free()
    assert time.now_s == 15
    assert "a driver that a damaged driver.json does not name has shown no life for 15 s: taking over" in caplog.text
    with lease.held():
        lease.confirm()
        assert written(folder)["driver"] == lease.start_id


@pytest.mark.parametrize("values", [{"pid": 0}, {"pid": "1"}, {"beat_interval_s": 1e9}, {"beat_interval_s": None}])
def test_values_that_cannot_be_are_damage(folder: RunFolder, values: dict[str, Any]) -> None:
    Other(folder, values).beat()
    time = Time()
    new_lease(folder, time).wait_until_free()
    assert time.now_s == 15


def test_damaged_file_that_changes_is_somebodys(folder: RunFolder) -> None:
    put(folder, b"{")  # caught in the middle of a write
    with pytest.raises(ConfigError, match="node7"):
        new_lease(folder, Time(meanwhile=Other(folder).beat)).wait_until_free()


def test_storage_that_cannot_be_read_is_not_taken_for_free(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(folder.fs), "cat_file", failing(PermissionError("no")))
    with pytest.raises(CheckpointError, match=r"driver.json cannot be read: access denied .PermissionError: no"):
        new_lease(folder, Time()).wait_until_free()


def failing(error: Exception) -> Callable[..., Any]:
    def call(*_args: Any, **_options: Any) -> Any:
        raise error

    return call


def test_of_two_that_begin_at_the_same_moment_one_stays(folder: RunFolder) -> None:
    first, second = new_lease(folder, Time(), NEVER_S), new_lease(folder, Time(), NEVER_S)
    first.wait_until_free()
    second.wait_until_free()
    with first.held(), second.held():
        with pytest.raises(ConfigError, match=f"pid {os.getpid()}"):
            first.confirm()
        second.confirm()
        first.beat()
        assert written(folder)["driver"] == second.start_id


def test_driver_that_was_cut_off_notices_and_writes_nothing(folder: RunFolder) -> None:
    lease = new_lease(folder, Time(), NEVER_S)
    with lease.held():
        lease.beat()
        assert written(folder)["beat"] == 2
        assert lease.check() is None
        Other(folder).beat()
        lease.beat()
        assert lease.successor
        assert "taken over by the driver on node7 (pid 4711" in lease.cut_off
        assert written(folder)["driver"] == "other"
    assert written(folder)["driver"] == "other", "what is another's is not deleted"


def test_driver_that_comes_back_after_its_successor_has_ended_notices(folder: RunFolder) -> None:
    lease = new_lease(folder, Time(), NEVER_S)
    with lease.held():
        folder.write_json("run.json", {"start_id": lease.start_id})
        folder.write_json("run.json", {"start_id": "its successor's"})
        folder.delete(LEASE_FILE)
        lease.beat()
        assert lease.successor == "a driver that has ended since"
        assert written(folder) == {}


@pytest.mark.parametrize("started", ["nobody", "the one before", "this one"])
@pytest.mark.parametrize("content", [None, b"{"])
def test_file_that_is_lost_or_damaged_is_written_again(folder: RunFolder, started: str, content: bytes | None) -> None:
    folder.write_json("run.json", {"start_id": "the one before"})
    lease = new_lease(folder, Time(), NEVER_S)
    with lease.held():
        if started == "this one":
            folder.write_json("run.json", {"start_id": lease.start_id})
        if started == "nobody":
            folder.delete("run.json")
        folder.delete(LEASE_FILE)
        if content is not None:
            put(folder, content)
        lease.beat()
        assert lease.successor is None
        assert written(folder)["driver"] == lease.start_id


@pytest.mark.parametrize("broken", ["cat_file", "put_file"])
def test_storage_that_fails_does_not_end_the_run(
    broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = RunFolder(f"memory://lease/{tmp_path.name}")
    lease = new_lease(folder, Time(), NEVER_S)
    with lease.held():
        with monkeypatch.context() as patch:
            patch.setattr(type(folder.fs), broken, failing(OSError("503 Slow Down")))
            for _ in range(3):
                lease.beat()
        assert lease.successor is None
        assert written(folder)["beat"] == 1
        lease.beat()
        assert written(folder)["beat"] > 1
    levels = [entry.levelname for entry in caplog.records]
    assert levels == ["WARNING", "INFO"], "one line when it begins, one when it is over"
    assert "cannot show that it is alive" in caplog.text
    assert "503 Slow Down" in caplog.text


def test_storage_that_is_gone_at_the_end_does_not_hide_how_the_run_ended(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def work() -> None:
        monkeypatch.setattr(folder.fs, "cat_file", failing(OSError("gone")))
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), new_lease(folder, Time()).held():
        work()
    assert "driver.json stays behind, the next driver may wait 15 s" in caplog.text


def test_file_that_was_replaced_while_it_was_opened_is_read_again(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    lease = new_lease(folder, Time(), NEVER_S)
    with lease.held():
        original, calls = folder.fs.cat_file, []

        def stale_at_first(*args: Any, **options: Any) -> Any:
            calls.append(args)
            if len(calls) == 1:
                raise OSError(116, "Stale file handle")
            return original(*args, **options)

        monkeypatch.setattr(folder.fs, "cat_file", stale_at_first)
        lease.beat()
        assert written(folder)["beat"] == 2


def test_it_beats_by_itself(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    third = threading.Event()
    original = folder.write_json

    def write_json(name: str, value: dict[str, Any], **options: Any) -> None:
        original(name, value, **options)
        if value["beat"] >= 3:
            third.set()

    monkeypatch.setattr(folder, "write_json", write_json)
    with new_lease(folder, Time(), 0.001).held():
        assert third.wait(timeout=30)
    assert "lease" not in {thread.name for thread in threading.enumerate()}
