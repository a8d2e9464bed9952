"""Nodes that go, on a cluster of several raylets on this machine: with notice, and without."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from orchestrator.checkpoint.snapshot import tensors_equal
from orchestrator.config import TrainConfig
from orchestrator.driver.launch import launch
from orchestrator.worker import notices
from tests.conftest import Undisturbed, final_state
from tests.support.faults import Fault, NodeKilled, worker_with
from tests.support.metadata import Metadata
from tests.support.ray_runs import causes, steps_repeated
from tests.support.runs import events_in, ledger_in, metrics_in
from tests.support.stuck import check_teardown

pytestmark = [
    pytest.mark.slow,  # several raylets share two cores
    pytest.mark.filterwarnings("default"),  # Ray starts in this process and its parts warn of themselves
]


@pytest.fixture
def clouds() -> Iterator[list[Metadata]]:
    """A cloud's metadata service for each node."""
    services = [Metadata() for _ in range(4)]
    yield services
    for service in services:
        service.close()


@pytest.fixture
def cluster(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, clouds: list[Metadata]
) -> Iterator[Cluster]:
    """A head that trains nothing, and three nodes (or as many as asked for) of one worker each."""
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:9")  # no dashboard runs: Ray need not wait for one
    small = {"object_store_memory": 80 * 2**20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args={**small, "num_cpus": 0})
    for n in range(getattr(request, "param", 3)):
        variables = {notices.VARIABLE: f"gcp={clouds[n].url}"}
        cluster.add_node(num_cpus=1, object_store_memory=80 * 2**20, env_vars=variables)
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, logging_level="ERROR")
    yield cluster
    ray.shutdown()
    cluster.shutdown()


class Drained(Fault):
    """Not killed: Ray is told that this rank's node will be taken away, as by a cloud's notice."""

    def fire(self) -> None:
        if self.marker.exists():
            return
        node_id = ray.get_runtime_context().get_node_id()
        self.marker.write_text(node_id)
        words = ["drain-node", "--address", ray.get_runtime_context().gcs_address, "--node-id", node_id]
        reason = [
            "--reason",
            "DRAIN_NODE_REASON_PREEMPTION",
            "--reason-message",
            "spot",
            "--deadline-remaining-seconds",
        ]
        subprocess.run([sys.executable, "-m", "ray.scripts.scripts", *words, *reason, "30"], check=True, timeout=60)


class Announced(Fault):
    """The cloud announces in its metadata service that this rank's node will be taken away."""

    def fire(self) -> None:
        if not self.marker.exists():
            self.marker.write_text(os.environ[notices.VARIABLE])


class NodeTerminated(Fault):
    """SIGTERM for `ray start --block`, as from systemd or at the end of a container; it is the pid."""

    def fire(self) -> None:
        if not self.marker.exists():
            self.marker.touch()
            assert self.pid
            os.kill(self.pid, signal.SIGTERM)


def settings(tiny: TrainConfig) -> TrainConfig:
    return replace(tiny, num_workers=2, cpus_per_worker=1.0, max_iters=400, eval_interval=100, checkpoint_interval=100)


STUCK = pytest.mark.parametrize("gets_stuck", [False, pytest.param(True, marks=pytest.mark.stuck_collectives)])


def check_that_nothing_shows(
    config: TrainConfig, fault: Fault, cause: str, undisturbed: Undisturbed, gets_stuck: bool = False
) -> None:
    launch(config, worker_with(fault, gets_stuck=gets_stuck))
    assert fault.marker.exists(), "the fault did not fire"
    assert causes(config.out_dir) == [cause]
    assert steps_repeated(config.out_dir) == 0
    assert tensors_equal(final_state(config.out_dir), undisturbed(config, config.num_workers))


@STUCK
@pytest.mark.usefixtures("cluster")
def test_a_drained_node_is_left_without_a_lost_step(
    tiny: TrainConfig, tmp_path: Path, undisturbed: Undisturbed, gets_stuck: bool
) -> None:
    config = replace(settings(tiny), max_failures=0)
    fault = Drained("forward", 33, 1, tmp_path / "fired")
    check_that_nothing_shows(config, fault, "preempted", undisturbed, gets_stuck)
    check_teardown(ledger_in(config.out_dir).incidents)


@pytest.mark.usefixtures("cluster")
def test_a_node_that_its_cloud_takes_away_is_left_without_a_lost_step(
    tiny: TrainConfig, tmp_path: Path, undisturbed: Undisturbed, clouds: list[Metadata]
) -> None:
    fault = Announced("forward", 33, 0, tmp_path / "fired")  # the first of its host: only that one listens

    def announce() -> None:
        while not fault.marker.exists():
            time.sleep(0.05)
        service = next(cloud for cloud in clouds if cloud.url in fault.marker.read_text())
        service.answers["/computeMetadata/v1/instance/preempted"] = "TRUE"

    threading.Thread(target=announce, daemon=True).start()
    config = replace(settings(tiny), max_failures=0, max_iters=1600)
    check_that_nothing_shows(config, fault, "preempted", undisturbed)


@STUCK
@pytest.mark.usefixtures("cluster")
def test_a_lost_node_is_replaced_by_another(
    tiny: TrainConfig, tmp_path: Path, undisturbed: Undisturbed, gets_stuck: bool
) -> None:
    config = settings(tiny)
    fault = NodeKilled("forward", 33, 1, tmp_path / "fired")
    check_that_nothing_shows(config, fault, "node_lost", undisturbed, gets_stuck)
    check_teardown(ledger_in(config.out_dir).incidents)
    assert [record["reached_iter"] for record in events_in(config.out_dir) if record["kind"] == "failure"] == [33]


@pytest.mark.parametrize("cluster", [1], indirect=True)
def test_sigterm_on_a_node_is_a_notice(
    cluster: Cluster, tiny: TrainConfig, tmp_path: Path, undisturbed: Undisturbed
) -> None:
    command = [str(Path(sys.executable).with_name("ray")), "start", f"--address={cluster.address}", "--num-cpus=1"]
    flags = ["--object-store-memory=80000000", "--disable-usage-stats", "--block", '--resources={"going": 1}']
    with (tmp_path / "node.log").open("wb") as log:
        node = subprocess.Popen([*command, *flags], stdout=log, stderr=log)
    try:
        deadline_s = time.monotonic() + 60
        while not ray.cluster_resources().get("going"):
            assert time.monotonic() < deadline_s, (tmp_path / "node.log").read_text()
            time.sleep(0.1)
        fault = NodeTerminated("forward", 33, 1, tmp_path / "fired", pid=node.pid)
        config = replace(settings(tiny), max_failures=0)
        trained = threading.Thread(target=launch, args=(config, worker_with(fault, replace(fault, rank=0))))
        trained.start()
        while not causes(config.out_dir) and trained.is_alive():
            time.sleep(0.1)
        cluster.add_node(num_cpus=1, object_store_memory=80 * 2**20)  # only the main thread may
        trained.join(timeout=120)
        assert fault.marker.exists(), "the fault did not fire"
        assert causes(config.out_dir) == ["preempted"]
        assert steps_repeated(config.out_dir) == 0
        assert tensors_equal(final_state(config.out_dir), undisturbed(config, 2))
    finally:
        node.terminate()
        node.wait(60)


@STUCK
@pytest.mark.timeout(900)  # 6000 iterations, twice: growth waits until a restart is a small part of the time
@pytest.mark.parametrize(("cluster", "fewest"), [(2, 1), (3, 2)], indirect=["cluster"])
def test_fewer_machines_go_on_at_once_and_more_are_used_when_they_come(
    cluster: Cluster, fewest: int, tiny: TrainConfig, tmp_path: Path, undisturbed: Undisturbed, gets_stuck: bool
) -> None:
    most = fewest + 1
    config = replace(settings(tiny), num_workers=f"{fewest}-{most}", max_iters=6000, eval_interval=3000)
    config = replace(config, checkpoint_interval=3000, gradient_accumulation_steps=2 * most)
    fault = NodeKilled("forward", 333, 1, tmp_path / "fired")
    returned = threading.Event()

    def bring_a_node() -> None:
        while "begin" not in kinds_after(config.out_dir, fault.marker):
            time.sleep(0.1)
        cluster.add_node(num_cpus=1, object_store_memory=80 * 2**20)
        returned.set()

    trained = threading.Thread(target=launch, args=(config, worker_with(fault, gets_stuck=gets_stuck)))
    trained.start()
    bring_a_node()  # in this thread: only the main one may
    trained.join(timeout=600)
    assert returned.is_set()
    begins = [record for record in metrics_in(config.out_dir) if record["kind"] == "begin"]
    assert [record["world_size"] for record in begins] == [most, fewest, most]
    ledger = ledger_in(config.out_dir)
    assert [(incident.cause, incident.steps_repeated) for incident in ledger.incidents] == [
        ("node_lost", 0),
        ("resized", 0),
    ]
    check_teardown(ledger.incidents)
    final, expected = final_state(config.out_dir), undisturbed(config, most)
    assert final.iter_num == expected.iter_num == config.max_iters
    assert tensors_equal(final, expected)
    assert final.best_val_loss == expected.best_val_loss


@dataclass(frozen=True)
class KilledWhenThere(Fault):
    """SIGKILL for this rank, once there are so many nodes for workers: the next attempt is to be on all of them."""

    room: int = 0

    def fire(self) -> None:
        if self.marker.exists():
            return
        while sum(node["Alive"] and "CPU" in node["Resources"] for node in ray.nodes()) < self.room:
            time.sleep(0.1)
        super().fire()


@pytest.mark.parametrize(
    ("trained", "gets_stuck"),
    [("tiny", False), ("adapters", False), pytest.param("tiny", True, marks=pytest.mark.stuck_collectives)],
)
@pytest.mark.timeout(600)
@pytest.mark.parametrize("cluster", [4], indirect=True)
def test_the_same_bits_whatever_machines_came_and_went(
    cluster: Cluster,
    trained: str,
    gets_stuck: bool,
    tmp_path: Path,
    undisturbed: Undisturbed,
    request: pytest.FixtureRequest,
) -> None:
    """4 workers, 3, 1, 2 and 4: no number of them shows in the end."""
    known: TrainConfig = request.getfixturevalue(trained)
    config = replace(settings(known), num_workers="1-4", lanes=8, gradient_accumulation_steps=12, max_iters=300)
    nodes, room = tmp_path / "nodes", tmp_path / "room"
    faults = [
        NodeKilled("forward", 60, 3, tmp_path / "node"),
        NodeKilled("forward", 120, 1, tmp_path / "other"),
        NodeKilled("forward", 120, 2, nodes),
        KilledWhenThere("forward", 180, 0, room, room=2),
        KilledWhenThere("forward", 240, 1, tmp_path / "more", room=4),
    ]
    trained = threading.Thread(target=launch, args=(config, worker_with(*faults, gets_stuck=gets_stuck)))
    trained.start()
    for marker, count in ((nodes, 1), (room, 2)):
        while not marker.exists() and trained.is_alive():
            time.sleep(0.1)
        for _ in range(count):
            cluster.add_node(num_cpus=1, object_store_memory=80 * 2**20)  # only the main thread may
    trained.join(timeout=400)
    assert [fault.marker.exists() for fault in faults] == [True] * len(faults), "a fault did not fire"
    begins = [record["world_size"] for record in metrics_in(config.out_dir) if record["kind"] == "begin"]
    assert begins == [4, 3, 1, 2, 4]
    incidents = ledger_in(config.out_dir).incidents
    repeated = [incident.steps_repeated for incident in incidents if incident is not incidents[2]]
    assert repeated == [0, 0, 0]  # the third one was alone: nobody was left to save its last steps
    final, expected = final_state(config.out_dir), undisturbed(replace(config, num_workers=2), 2)
    assert tensors_equal(final, expected)
    assert final.best_val_loss == expected.best_val_loss


def kinds_after(out_dir: str, marker: Path) -> list[str]:
    if not marker.exists():
        return []
    return [record["kind"] for record in metrics_in(out_dir) if record["time"] > marker.stat().st_mtime]
