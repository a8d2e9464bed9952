from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.driver.resubmit import LOST, is_lost, resubmit

# ends with the codes that are given, one after the other; a negative one is a signal to itself
DRIVER = """
import os, sys, time
log, *codes = sys.argv[1:]
n = len(open(log).read()) if os.path.exists(log) else 0
open(log, "a").write("x")
code = int(codes[min(n, len(codes) - 1)])
if code < 0:
    os.kill(os.getpid(), -code)
if code == 99:
    try:
        time.sleep(60)
    except KeyboardInterrupt:
        sys.exit(130)
sys.exit(code)
"""


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("codes", "expected", "starts"),
    [
        ((0,), 0, 1),
        ((2,), 2, 1),  # a mistake of the user's
        ((1,), 1, 1),  # given up
        ((130,), 130, 1),
        ((LOST, -signal.SIGKILL, 0), 0, 3),
        ((LOST,), LOST, 4),  # again and again
    ],
)
def test_only_a_lost_driver_is_started_again(
    tmp_path: Path, codes: tuple[int, ...], expected: int, starts: int
) -> None:
    log = tmp_path / "log"
    command = [sys.executable, "-c", DRIVER, str(log), *map(str, codes)]
    assert resubmit(command, wait_s=0.01, in_a_row=3) == expected
    assert len(log.read_text()) == starts


def test_a_signal_is_passed_on_and_ends_it(tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = [sys.executable, "-c", DRIVER, str(log), "99"]
    code = f"from orchestrator.driver.resubmit import resubmit; raise SystemExit(resubmit({command}))"
    process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    deadline_s = time.monotonic() + 20
    while not log.exists() and time.monotonic() < deadline_s:
        time.sleep(0.02)
    time.sleep(0.2)
    os.kill(process.pid, signal.SIGINT)
    assert process.wait(20) == 130
    assert len(log.read_text()) == 1


def test_what_is_lost() -> None:
    assert [is_lost(code) for code in (0, 1, 2, 130, LOST, -9)] == [False, False, False, False, True, True]
