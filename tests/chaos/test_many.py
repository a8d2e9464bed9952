"""What else can be taken from a run: its storage while it fails over, memory, and everything again and again."""

from __future__ import annotations

import json
import random
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import psutil
import pytest

from orchestrator.checkpoint.snapshot import tensors_equal
from orchestrator.config import TrainConfig
from orchestrator.driver.launch import launch
from tests.conftest import Storage, Undisturbed, final_state
from tests.support.clusters import small_cluster
from tests.support.faults import Fault, worker_with
from tests.support.ray_runs import OWN_CLUSTER, causes, steps_repeated
from tests.support.runs import checkpoints_in, ledger_in, metrics_in
from tests.support.servers import S3Server

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]

_FAULTS = 20
_RESTART_S = 60  # at most, on cores that others use too: the faults come faster than spares are warm


@pytest.fixture
def cluster() -> Iterator[None]:
    """Started after the test's storage, whose address and credentials its processes inherit."""
    with small_cluster():
        yield


class OutOfMemory(Fault):
    """The process reaches a limit of its memory."""

    def fire(self) -> None:
        if self.marker.exists():
            return
        self.marker.touch()
        used_bytes = psutil.Process().memory_info().vms
        resource.setrlimit(resource.RLIMIT_AS, (used_bytes + 2**28, resource.RLIM_INFINITY))
        try:
            np.ones(2**30)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


@pytest.mark.usefixtures("cluster")
def test_a_memory_limit_is_recognised(tiny: TrainConfig, tmp_path: Path, undisturbed: Undisturbed) -> None:
    config = replace(tiny, num_workers=2)
    launch(config, worker_with(OutOfMemory("forward", 9, 1, tmp_path / "fired")))
    assert causes(config.out_dir) == ["out_of_memory"]
    assert steps_repeated(config.out_dir) == 0
    assert tensors_equal(final_state(config.out_dir), undisturbed(tiny, 2))


def test_rays_memory_monitor_is_recognised(tiny: TrainConfig, tmp_path: Path, undisturbed: Undisturbed) -> None:
    marker, spec = tmp_path / "fired", tmp_path / "spec.json"
    fault = {"point": "forward", "iter_num": 9, "rank": 1, "marker": str(marker)}
    spec.write_text(json.dumps({"config": asdict(replace(tiny, num_workers=2)), "fault": fault, "whom": "memory"}))
    memory = psutil.virtual_memory()
    limit = {"RAY_memory_usage_threshold": str((memory.used + 4 * 2**30) / memory.total)}
    command = [sys.executable, "-m", "tests.support.driver", str(spec)]
    done = subprocess.run(
        command, timeout=240, capture_output=True, check=False, text=True, env={**OWN_CLUSTER, **limit}
    )
    assert done.returncode == 0, done.stderr
    assert marker.exists()
    ledger = ledger_in(tiny.out_dir)
    # Ray may end small processes of its own as well, the controller's among them
    assert ledger.incidents[0].cause == "out_of_memory"
    assert sum(incident.steps_repeated for incident in ledger.incidents) == 0
    assert tensors_equal(final_state(tiny.out_dir), undisturbed(tiny, 2))


def test_storage_that_is_down_while_failing_over_is_waited_for(
    tiny: TrainConfig,
    tmp_path: Path,
    undisturbed: Undisturbed,
    s3_server: S3Server,
    s3: Storage,
    request: pytest.FixtureRequest,
) -> None:
    request.getfixturevalue("cluster")
    fault = Fault("forward", 13, 1, tmp_path / "fired")
    down_s: list[float] = []

    def take_away() -> None:
        while not fault.marker.exists():
            time.sleep(0.02)
        s3_server.kill()
        down_s.append(time.time())
        time.sleep(12)
        down_s.append(time.time())
        s3_server.start()

    taker = threading.Thread(target=take_away, daemon=True)
    taker.start()
    config = replace(tiny, out_dir=f"{s3.url}/run", num_workers=2)
    launch(config, worker_with(fault))
    taker.join(30)
    # the first attempt could not upload its metrics: its last ones were kept by the driver, which had heard them
    assert {record["iter"] for record in metrics_in(config.out_dir) if record["kind"] == "step"} == set(range(24))
    last = [record for record in metrics_in(config.out_dir) if record["kind"] == "begin"][-1]
    assert last["time"] > down_s[1], "it went on without its storage"
    assert last["iter"] == 13
    assert "worker_lost" in causes(config.out_dir)
    store = checkpoints_in(config.out_dir)
    assert tensors_equal(store.read(store.select("latest")), undisturbed(tiny, 2))


@pytest.mark.timeout(60 + _FAULTS * _RESTART_S)
@pytest.mark.usefixtures("cluster")
def test_twenty_random_faults_change_no_bit(tiny: TrainConfig, tmp_path: Path, undisturbed: Undisturbed) -> None:
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    draw = random.Random(seed)
    iters = sorted(draw.sample(range(1, 399), _FAULTS))
    points = ("forward", "optimizer", "after_optimizer")
    faults = [Fault(draw.choice(points), it, draw.randrange(3), tmp_path / f"fired{it}") for it in iters]
    config = replace(tiny, num_workers=3, max_iters=400, max_failures=-1, warm_spares=True)
    launch(config, worker_with(*faults))
    assert [fault.marker.exists() for fault in faults] == [True] * _FAULTS
    ledger = ledger_in(config.out_dir)
    assert [incident.cause for incident in ledger.incidents] == ["worker_lost"] * _FAULTS
    assert sum(incident.steps_repeated for incident in ledger.incidents) == 0
    assert tensors_equal(final_state(config.out_dir), undisturbed(config, 3))
