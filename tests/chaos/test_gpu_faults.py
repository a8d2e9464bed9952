"""GPUs that fail, on a cluster of several raylets on this machine: workers go to other nodes where there is room."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray.cluster_utils import Cluster

from orchestrator.checkpoint.save.rescue import Rescuer
from orchestrator.checkpoint.snapshot import tensors_equal
from orchestrator.config import TrainConfig
from orchestrator.controller.gpu_check import GpuCheck
from orchestrator.driver import trainer
from orchestrator.driver.launch import RunFailedError, launch
from orchestrator.worker.job import Job
from tests.conftest import Undisturbed, final_state
from tests.support.faults import Fault, worker_with
from tests.support.ray_runs import causes, steps_repeated
from tests.support.runs import events_in

pytestmark = [
    pytest.mark.slow,  # several raylets share two cores
    pytest.mark.filterwarnings("default"),  # Ray starts in this process and its parts warn of themselves
]

UNFIT = "ORCHESTRATOR_TEST_UNFIT"  # on a node: why its GPUs cannot be used
OCCUPANT = "occupant"  # the actor that holds the GPU of such a node until a test wants it


@pytest.fixture
def cluster(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A head that trains nothing, and nodes of one worker each: for every word one, "" or why it is unfit."""
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:9")  # no dashboard runs: Ray need not wait for one
    small = {"object_store_memory": 80 * 2**20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args={**small, "num_cpus": 0})
    for why in request.param:
        node = {"num_cpus": 1, "num_gpus": 1, "object_store_memory": 80 * 2**20, "env_vars": {UNFIT: why}}
        cluster.add_node(**node, resources={"unfit": 1} if why else {})
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, logging_level="ERROR")
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@dataclass(frozen=True)
class GpuBroken(Fault):
    """The GPU of a worker answers no more: the step fails, and no state can be read from it."""

    text: str = "CUDA error: uncorrectable ECC error encountered"

    def fire(self) -> None:
        fired = self.marker.read_text() if self.marker.exists() else ""
        if len(fired.splitlines()) < self.times:
            self.marker.write_text(f"{fired}{ray.get_runtime_context().get_node_id()}\n")
            Rescuer._save = self.broken  # type: ignore[method-assign]
            self.before_it_breaks()
            self.broken()

    def broken(self, *_: Any) -> int | None:
        raise torch.AcceleratorError(self.text)

    def before_it_breaks(self) -> None:
        pass


class GpuBrokenAndAnotherFree(GpuBroken):
    """And just before, another program leaves another node, which has room now."""

    def before_it_breaks(self) -> None:
        ray.kill(ray.get_actor(OCCUPANT, namespace=OCCUPANT))
        while not ray.available_resources().get("unfit"):
            time.sleep(0.05)


def settings(tiny: TrainConfig) -> TrainConfig:
    """A run on GPUs, whose workers find none: PyTorch's share is computed on CPUs."""
    config = replace(tiny, num_workers=2, gpus_per_worker=1.0, cpus_per_worker=1.0, max_failures=4)
    return replace(config, max_iters=100, eval_interval=100, checkpoint_interval=100)


def noting_places(folder: Path, fault: Fault) -> Callable[[Job], dict[str, Any]]:
    """Return a worker with the fault that notes on which node it is; `places` reads what it noted."""
    folder.mkdir()
    train = worker_with(fault)

    def worker(job: Job) -> dict[str, Any]:
        rank = ray.train.get_context().get_world_rank()
        (folder / f"{time.time_ns()}-{rank}").write_text(ray.get_runtime_context().get_node_id())
        return train(job)

    return worker


def places(folder: Path) -> list[set[str]]:
    """Return the nodes of each attempt of two workers, in their order."""
    nodes = [path.read_text() for path in sorted(folder.iterdir())]
    return [set(nodes[i : i + 2]) for i in range(0, len(nodes), 2)]


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("cluster", [("", "", "")], indirect=True)
def test_a_gpu_that_breaks_costs_no_step_and_its_node_is_left(
    tiny: TrainConfig, tmp_path: Path, undisturbed: Undisturbed
) -> None:
    config = settings(tiny)
    fault = GpuBroken("forward", 33, 1, tmp_path / "fired")
    launch(config, noting_places(tmp_path / "places", fault))
    assert fault.marker.exists(), "the fault did not fire"
    assert causes(config.out_dir) == ["gpu_fault"]
    assert steps_repeated(config.out_dir) == 0, "its peer has rescued the state"
    [failure] = [record for record in events_in(config.out_dir) if record["kind"] == "failure"]
    assert (failure["ranks"], failure["reached_iter"]) == ([1], 33)
    assert "AcceleratorError: CUDA error: uncorrectable ECC error encountered" in failure["text"]
    before, after = places(tmp_path / "places")
    broken = fault.marker.read_text().strip()
    assert broken in before
    assert broken not in after
    assert tensors_equal(final_state(config.out_dir), undisturbed(config, 2))


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("cluster", [("", "")], indirect=True)
def test_with_no_room_elsewhere_its_node_is_used_again_at_once(
    tiny: TrainConfig, tmp_path: Path, undisturbed: Undisturbed
) -> None:
    config = settings(tiny)
    fault = GpuBroken("forward", 33, 1, tmp_path / "fired")
    launch(config, noting_places(tmp_path / "places", fault))
    assert causes(config.out_dir) == ["gpu_fault"]
    before, after = places(tmp_path / "places")
    assert before == after
    times = {record["kind"]: record["time"] for record in events_in(config.out_dir)}
    assert times["attempt_placed"] - times["failure"] < 20
    assert tensors_equal(final_state(config.out_dir), undisturbed(config, 2))


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("cluster", [("", "")], indirect=True)
@pytest.mark.parametrize(
    ("text", "told", "times"),
    [
        (GpuBroken.text, r"gpu_fault: 4 times within 100 iterations, and the budget is 3", 4),
        ("CUDA error: device-side assert triggered", r"the same error at the same iteration \(33\), twice", 2),
    ],
)
def test_what_comes_again_and_again_ends_the_run(
    tiny: TrainConfig, tmp_path: Path, text: str, told: str, times: int
) -> None:
    config = settings(tiny)
    fault = GpuBroken("forward", 33, 1, tmp_path / "fired", times=99, text=text)
    with pytest.raises(RunFailedError, match=told):
        launch(config, worker_with(fault))
    assert len(causes(config.out_dir)) == times


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("cluster", [("", "", "CUDA is missing here")], indirect=True)
def test_a_node_that_turns_out_to_be_unfit_later_is_left_and_the_run_goes_on(
    tiny: TrainConfig, tmp_path: Path, undisturbed: Undisturbed, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Occupant:
        pass

    occupant = ray.remote(Occupant).options(
        name=OCCUPANT, namespace=OCCUPANT, num_cpus=1, num_gpus=1, resources={"unfit": 1}
    )
    actor = occupant.remote()
    ray.get(actor.__ray_ready__.remote())
    monkeypatch.setattr(trainer, "GpuCheck", lambda monitor: GpuCheck(monitor, ask=why_unfit))
    config = replace(settings(tiny), device="cuda", backend="gloo")
    fault = GpuBrokenAndAnotherFree("forward", 33, 1, tmp_path / "fired")
    launch(config, noting_places(tmp_path / "places", fault))
    failures = [record for record in events_in(config.out_dir) if record["kind"] == "failure"]
    assert [failure["cause"] for failure in failures] == ["gpu_fault", "gpu_fault"]
    assert "CUDA is missing here" in failures[1]["text"]
    before, after = places(tmp_path / "places")
    assert before == after, "the one that has broken first is used again"
    assert steps_repeated(config.out_dir) == 0
    assert tensors_equal(final_state(config.out_dir), undisturbed(settings(tiny), 2))


def why_unfit() -> str:
    return os.environ[UNFIT]
