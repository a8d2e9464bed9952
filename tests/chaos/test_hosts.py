"""Hosts with networks of their own: cut off, switched off, crashed, and the head lost. Needs root and the test bed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from orchestrator.checkpoint.formats.huggingface import write_huggingface
from orchestrator.checkpoint.snapshot import tensors_equal
from orchestrator.config import TrainConfig
from tests.conftest import Undisturbed, final_state
from tests.support.runs import events_in, ledger_in, metrics_in
from tests.support.weights import random_weights

HOSTS = Path(__file__).parents[3] / "shared/testbed/hosts.sh"
_LONG_S = 240.0

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not HOSTS.exists(), reason=f"the test bed {HOSTS} is not here"),
    pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("ip"), reason="hosts need root and iproute2"),
]


class Bed:
    """A head that trains nothing and two nodes of one worker each."""

    def __init__(self) -> None:
        ray = str(Path(sys.executable).with_name("ray"))
        self._environment = {**os.environ, "RAY": ray, "RAY_AUTH_MODE": "disabled"}
        self._environment["RAY_API_SERVER_ADDRESS"] = "http://127.0.0.1:9"  # no dashboard runs

    def do(self, *words: str) -> str:
        command = ["bash", str(HOSTS), *words]
        done = subprocess.run(command, check=True, env=self._environment, timeout=120, capture_output=True, text=True)
        return done.stdout

    def start(self, spec: Path, log: Path) -> subprocess.Popen[bytes]:
        """Start a driver on the head."""
        command = ["bash", str(HOSTS), "exec", "head", sys.executable, "-m", "tests.support.driver", str(spec)]
        with log.open("wb") as file:
            return subprocess.Popen(command, env=self._environment, stdout=file, stderr=file)

    def ray_on(self, host: str) -> list[str]:
        """Return the raylets and the workers on a host."""
        pids = subprocess.run(["ip", "netns", "pids", f"fx-{host}"], capture_output=True, text=True, check=True).stdout
        names = []
        for pid in pids.split():
            with suppress(FileNotFoundError):
                names.append(Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode())
        return [name for name in names if name.startswith("ray::") or "/raylet " in name]

    def sent_bytes(self) -> int:
        """Return what the nodes have sent: the bridge's ends of their cables have received it."""
        ends = [Path(f"/sys/class/net/fxnode{number}/statistics/rx_bytes") for number in (1, 2)]
        return sum(int(end.read_text()) for end in ends)


@pytest.fixture
def bed() -> Iterator[Bed]:
    bed = Bed()
    bed.do("up", "2")
    try:
        bed.do("ray")
        yield bed
    finally:
        bed.do("down")


def wait_for(what: str, is_there: object, driver: subprocess.Popen[bytes], log: Path) -> None:
    deadline_s = time.monotonic() + _LONG_S
    while not is_there():  # type: ignore[operator]
        assert driver.poll() is None, f"the driver has ended before {what}:\n{log.read_text()[-3000:]}"
        assert time.monotonic() < deadline_s, f"no {what}:\n{log.read_text()[-3000:]}"
        time.sleep(0.05)


def world_sizes(config: TrainConfig) -> list[int]:
    return [record["world_size"] for record in metrics_in(config.out_dir) if record["kind"] == "begin"]


def begin(config: TrainConfig, tmp_path: Path, bed: Bed) -> tuple[subprocess.Popen[bytes], Path, Path]:
    """Start a run and wait until rank 1 has come to iteration 300; return the driver, its marker and its log."""
    marker, spec, log = tmp_path / "fired", tmp_path / "spec.json", tmp_path / "log"
    fault = {"point": "forward", "iter_num": 300, "rank": 1, "marker": str(marker)}
    spec.write_text(json.dumps({"config": asdict(config), "fault": fault, "whom": "outside"}))
    driver = bed.start(spec, log)
    wait_for("iteration 300", marker.exists, driver, log)
    return driver, marker, log


@pytest.mark.parametrize("loss", ["cut", "poweroff", "crash"])
def test_a_host_that_is_gone_is_done_without(
    bed: Bed, tiny: TrainConfig, tmp_path: Path, undisturbed: Undisturbed, loss: str
) -> None:
    config = replace(tiny, num_workers="1-2", max_iters=4000, eval_interval=2000, memory_dir="/dev/shm")
    config = replace(config, checkpoint_interval=1000, cpus_per_worker=1.0)
    driver, marker, log = begin(config, tmp_path, bed)
    host = marker.read_text()
    bed.do(loss, host)
    marker.with_suffix(".done").touch()
    wait_for("a second attempt", lambda: len(world_sizes(config)) > 1, driver, log)
    if loss == "cut":
        bed.do("heal", host)  # the late-comer must not disturb
    assert driver.wait(_LONG_S) == 0, log.read_text()[-3000:]
    assert world_sizes(config)[:2] == [2, 1]
    ledger = ledger_in(config.out_dir)
    assert ledger.incidents[0].cause == "node_lost"
    assert [incident.steps_repeated for incident in ledger.incidents] == [0] * len(ledger.incidents)
    final, expected = final_state(config.out_dir), undisturbed(replace(config, memory_dir=tiny.memory_dir), 2)
    assert final.iter_num == config.max_iters
    assert tensors_equal(final, expected)
    assert final.best_val_loss == expected.best_val_loss


def test_all_nodes_lost_at_once_are_waited_for(
    bed: Bed, tiny: TrainConfig, tmp_path: Path, undisturbed: Undisturbed
) -> None:
    config = replace(tiny, num_workers=2, max_iters=1000, eval_interval=500, memory_dir="/dev/shm")
    config = replace(config, checkpoint_interval=100, cpus_per_worker=1.0)
    driver, marker, log = begin(config, tmp_path, bed)
    for host in ("node1", "node2"):
        bed.do("crash", host)
    marker.with_suffix(".done").touch()
    kinds = lambda: [record["kind"] for record in events_in(config.out_dir)]
    wait_for("a second attempt", lambda: kinds().count("attempt_starting") > 1, driver, log)
    for host in ("node1", "node2"):
        bed.do("boot", host)
    assert driver.wait(_LONG_S) == 0, log.read_text()[-3000:]
    first, second = (record for record in metrics_in(config.out_dir) if record["kind"] == "begin")
    assert (first["iter"], second["iter"]) in [(0, 200), (0, 300)], "what was in storage, for no memory is left"
    assert tensors_equal(final_state(config.out_dir), undisturbed(replace(config, memory_dir=tiny.memory_dir), 2))


def test_without_the_head_no_worker_runs_on(bed: Bed, tiny: TrainConfig, tmp_path: Path) -> None:
    config = replace(tiny, num_workers=2, max_iters=10**6, memory_dir="/dev/shm", cpus_per_worker=1.0)
    driver, marker, _ = begin(config, tmp_path, bed)
    marker.with_suffix(".done").touch()
    assert any("RayTrainWorker" in name for name in bed.ray_on("node1"))
    bed.do("crash", "head")
    assert driver.wait(30) != 0
    deadline_s = time.monotonic() + 150
    while left := bed.ray_on("node1") + bed.ray_on("node2"):
        assert time.monotonic() < deadline_s, left
        time.sleep(1)


@pytest.mark.parametrize("holders", ["node1 node2", "node2", ""])
def test_weights_on_the_nodes_own_disks_do_not_travel(
    bed: Bed, tiny: TrainConfig, tmp_path: Path, holders: str
) -> None:
    folder = "/dev/shm/weights"  # every host's own
    weights = random_weights(n_layer=2, n_embd=512, vocab_size=20_000)  # 67 MB
    write_huggingface(weights, tmp_path / "weights")
    size_bytes = sum(tensor.nbytes for tensor in weights.model.values())
    for host in ("head", *holders.split()):  # the driver looks at them too
        bed.do("exec", host, "cp", "-r", str(tmp_path / "weights"), folder)
    config = replace(tiny, num_workers=2, init_from=folder, memory_dir="/dev/shm", cpus_per_worker=1.0, eval_only=True)
    settings = [f"--{key}={value}" for key, value in asdict(config).items() if value != getattr(TrainConfig(), key)]
    before_bytes = bed.sent_bytes()
    if holders:
        said = bed.do("exec", "head", sys.executable, "-m", "orchestrator", "train", *settings)
        assert "done: 0 iterations" in said
        sent = (bed.sent_bytes() - before_bytes) / size_bytes
        assert sent < 0.1 if " " in holders else 1 <= sent < 1.1, "to the one other node"
        return
    with pytest.raises(subprocess.CalledProcessError) as failed:
        bed.do("exec", "head", sys.executable, "-m", "orchestrator", "train", *settings)
    assert f"error: init_from={folder}: no worker's node has it" in failed.value.stderr
