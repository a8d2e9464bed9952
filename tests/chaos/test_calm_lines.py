"""What the user sees when a worker is lost: a few lines of ours; Ray's own words are in a log file."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator.config import TrainConfig
from orchestrator.driver.ray_output import LOG_FILE
from tests.support.ray_runs import OWN_CLUSTER

RAYS = ("Traceback", "A worker died", "(RayTrainWorker", "The actor is dead", "Error in training function")


def screen_of(config: TrainConfig, folder: Path, *, in_terminal: bool = False, **fault: Any) -> str:
    """Run a driver of which rank 1 has a fault in iteration 13; return all that it prints."""
    spec, fault = folder / "spec.json", {"point": "forward", "iter_num": 13, "rank": 1, **fault}
    fault["marker"] = str(folder / "fired")
    spec.write_text(json.dumps({"config": asdict(config), "fault": fault, "whom": "worker"}))
    command = [sys.executable, "-m", "tests.support.driver", str(spec)]
    if not in_terminal:
        done = subprocess.run(command, timeout=240, capture_output=True, check=False, text=True, env=OWN_CLUSTER)
        return done.stdout + done.stderr
    ours, theirs = pty.openpty()
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=OWN_CLUSTER) as driver:
        os.close(theirs)
        pieces = []
        while True:
            try:
                pieces.append(os.read(ours, 65536))
            except OSError:  # the driver has ended
                break
        driver.wait(timeout=60)
    os.close(ours)
    return b"".join(pieces).decode()


@pytest.mark.slow
@pytest.mark.parametrize("in_terminal", [False, True])
def test_a_killed_worker_is_told_in_lines_of_ours(tiny: TrainConfig, tmp_path: Path, in_terminal: bool) -> None:
    config = replace(tiny, num_workers=2)
    screen = screen_of(config, tmp_path, in_terminal=in_terminal)
    assert "attempt lost (worker_lost, 1 of 8): rank 1 on" in screen
    assert ": its process was killed or has crashed" in screen
    assert "iteration 13 is safe in node memory: the next attempt starts there" in screen
    assert "at iteration 13 of" in screen
    for words in RAYS:
        assert words not in screen, screen
    log = Path(config.out_dir, LOG_FILE)
    assert screen.count(str(log)) == 1, "it is told once"
    assert "(raylet) A worker died or was killed" in log.read_text()
    for words in ("number of parameters", "decayed parameters", "fused AdamW"):
        assert screen.count(words) == 1, "the first attempt says it, and no other"


@pytest.mark.slow
def test_the_traceback_of_a_bug_is_on_the_screen(tiny: TrainConfig, tmp_path: Path) -> None:
    config = replace(tiny, num_workers=2)
    screen = screen_of(config, tmp_path, kind=None)
    assert "attempt lost (user_error, 1 of 8): rank 1 on" in screen
    assert "(RayTrainWorker" in screen
    assert "Traceback" in screen
    assert 'raise self.error("the bug")' in screen
    assert not Path(config.out_dir, LOG_FILE).exists()


@pytest.mark.slow
def test_a_run_that_is_given_up_shows_what_was_logged(tiny: TrainConfig, tmp_path: Path) -> None:
    config = replace(tiny, num_workers=2, max_failures=1)
    screen = screen_of(config, tmp_path, times=9)
    assert "the run is given up: worker_lost: 2 times" in screen
    assert "A worker died or was killed" in screen
