"""Kill workers and drivers at chosen and random points: the run ends with the bits of an undisturbed one."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import ray

from orchestrator.checkpoint.snapshot import Snapshot, tensors_equal
from orchestrator.checkpoint.store import CheckpointStore
from orchestrator.config import TrainConfig
from orchestrator.launch import launch
from orchestrator.telemetry.metrics import read_metrics
from tests.chaos.faults import Fault, worker_with

Undisturbed = Callable[[TrainConfig, int], Snapshot]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(
        address="local", num_cpus=2, include_dashboard=False, object_store_memory=80 * 2**20, logging_level="ERROR"
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """The final state of a run that nothing happens to, with torchrun instead of Ray; one for each world size."""
    known: dict[int, Snapshot] = {}

    def final(config: TrainConfig, world_size: int) -> Snapshot:
        if world_size not in known:
            out_dir = str(tmp_path_factory.mktemp("undisturbed") / "run")
            train_with_torchrun(replace(config, out_dir=out_dir), world_size)
            known[world_size] = final_state(out_dir)
        return known[world_size]

    return final


def train_with_torchrun(config: TrainConfig, world_size: int) -> None:
    flags = [f"--{key}={value}" for key, value in asdict(config).items()]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world_size}"]
    subprocess.run([*command, "-m", "orchestrator.loop", *flags], check=True, timeout=120, capture_output=True)


def final_state(out_dir: str) -> Snapshot:
    store = CheckpointStore(out_dir)
    return store.read(store.select("latest"))


def attempts(out_dir: str) -> int:
    return len({record["attempt"] for record in read_metrics(out_dir, every_attempt=True)})


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize(
    ("world_size", "point", "rank", "iter_num"),
    [
        (2, "forward", 1, 10),
        (3, "optimizer", 0, 13),
        (3, "write", 2, 16),
        (2, "commit", 0, 12),
        (3, "forward", random.Random().randrange(3), random.Random().randrange(24)),
    ],
)
def test_killed_worker_changes_no_bit(
    tiny: TrainConfig, tmp_path: Path, undisturbed: Undisturbed, world_size: int, point: str, rank: int, iter_num: int
) -> None:
    fault = Fault(point, iter_num, rank, tmp_path / "fired")
    config = replace(tiny, num_workers=world_size)
    outcome = launch(config, worker_with(fault))
    assert fault.marker.exists(), "the fault did not fire"
    assert outcome.iter_num == config.max_iters
    assert attempts(config.out_dir) == 2
    assert tensors_equal(final_state(config.out_dir), undisturbed(tiny, world_size))


def test_killed_driver_continues_when_started_again(
    tiny: TrainConfig, tmp_path: Path, undisturbed: Undisturbed
) -> None:
    marker, spec = tmp_path / "fired", tmp_path / "spec.json"
    fault = {"point": "after_optimizer", "iter_num": 14, "rank": 1, "marker": str(marker)}
    spec.write_text(json.dumps({"config": asdict(replace(tiny, num_workers=2)), "fault": fault}))
    command = [sys.executable, "-m", "tests.chaos.driver", str(spec)]
    killed = subprocess.run(command, timeout=120, capture_output=True, check=False)
    assert marker.exists(), killed.stderr.decode()
    assert killed.returncode == -signal.SIGKILL
    again = subprocess.run(command, timeout=120, capture_output=True, check=False, text=True)
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout.splitlines()[-1]) == {"iter_num": tiny.max_iters}
    assert attempts(tiny.out_dir) == 2
    assert tensors_equal(final_state(tiny.out_dir), undisturbed(tiny, 2))


def test_every_process_of_a_local_cluster_is_gone_after_its_driver(tiny: TrainConfig, tmp_path: Path) -> None:
    """Every process that a driver starts carries its token in the environment; after Ctrl-C none is left."""
    token = f"token-{os.urandom(8).hex()}"
    flags = [f"--{key}={value}" for key, value in asdict(replace(tiny, num_workers=2, max_iters=10**6)).items()]
    env = {**os.environ, "TEST_TOKEN": token}
    with (tmp_path / "log").open("w") as log:
        driver = subprocess.Popen(
            [sys.executable, "-m", "orchestrator", "train", *flags], env=env, stdout=log, stderr=subprocess.STDOUT
        )
    wait_for_line(tmp_path / "log", "iter 20:")
    assert len(processes_with(token)) > 3
    driver.send_signal(signal.SIGINT)
    assert driver.wait(timeout=60) == 130, (tmp_path / "log").read_text()
    assert processes_with(token) == []
    stopped_at = CheckpointStore(tiny.out_dir).select("latest").iter_num
    assert f"stopped at iteration {stopped_at}" in (tmp_path / "log").read_text()


def wait_for_line(log: Path, text: str) -> None:
    import time

    deadline_s = time.monotonic() + 90
    while text not in log.read_text():
        assert time.monotonic() < deadline_s, log.read_text()
        time.sleep(0.1)


def processes_with(token: str) -> list[str]:
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            try:
                if token.encode() in (process / "environ").read_bytes():
                    found.append((process / "cmdline").read_text().replace("\0", " "))
            except OSError:
                continue
    return found
