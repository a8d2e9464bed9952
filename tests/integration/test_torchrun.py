"""Ranks as torchrun starts them, of which one stands still: a collective waits for it in C, and hears no signal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from orchestrator.checkpoint.snapshot import tensors_equal
from orchestrator.config import TrainConfig
from tests.conftest import Undisturbed, final_state
from tests.support.ports import free_ports

PLAIN = """
import sys
from orchestrator.worker.plain import main
from orchestrator.worker import torchrun as peer_loss
from tests.support.faults import Fault, arm
import os, pathlib, signal

peer_loss._ITERATION_S = 3.0
marker = pathlib.Path(sys.argv.pop(1))
if os.environ["RANK"] == "1":
    arm(Fault("forward", 13, 1, marker, kind=signal.SIGSTOP))
sys.exit(main())
"""


def start(config: TrainConfig, rank: int, port: int, marker: Path) -> subprocess.Popen[str]:
    """Start a rank as torchrun does."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    flags = [f"--{key}={value}" for key, value in asdict(config).items()]
    return subprocess.Popen(
        [sys.executable, "-c", PLAIN, str(marker), *flags],
        env={**os.environ, **{key: str(value) for key, value in place.items()}},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("asked", "told"),
    [(True, "asked to stop, and this iteration did not end within 3 s"), (False, "no progress for ")],
)
def test_a_rank_that_waits_for_one_that_stands_still_keeps_its_state(
    tiny: TrainConfig, tmp_path: Path, undisturbed: Undisturbed, asked: bool, told: str
) -> None:
    config = replace(tiny, hang_timeout_s=600.0 if asked else 4.0, checkpoint_interval=100)
    marker = tmp_path / "fired"
    (port,) = free_ports(1)
    ranks = [start(config, rank, port, marker) for rank in (0, 1)]
    deadline_s = time.monotonic() + 120
    while not marker.exists():
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
    if asked:
        time.sleep(0.5)  # it waits for the other one by now
        ranks[0].send_signal(signal.SIGTERM)
    said = ranks[0].communicate(timeout=60)[0]
    ranks[1].kill()
    ranks[1].communicate()
    assert ranks[0].returncode == 1, said
    assert f"error: rank 0: {told}" in said
    assert "iteration 13 is safe in node memory" in said
    assert "loop.py" in next(Path(config.out_dir).glob("hang-*-rank0.txt")).read_text()

    (port,) = free_ports(1)
    again = [start(config, rank, port, marker) for rank in (0, 1)]
    said = again[0].communicate(timeout=120)[0]
    again[1].communicate(timeout=60)
    assert [rank.returncode for rank in again] == [0, 0], said
    assert "iter 13:" in said
    assert "iter 12:" not in said
    assert tensors_equal(final_state(config.out_dir), undisturbed(tiny, 2))
