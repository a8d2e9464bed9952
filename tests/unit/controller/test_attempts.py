"""What the monitor makes of GPUs that cannot be used, and where it lets workers go. Without Ray's processes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from ray.train import ControllerError
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError

from orchestrator.controller import placement
from orchestrator.controller.attempts import AttemptMonitor
from orchestrator.controller.budgets import Budgets, RunAbandonedError
from orchestrator.controller.cordon import Cordon
from orchestrator.errors import ConfigError
from orchestrator.telemetry.records import Failure, from_json

WORKERS = [SimpleNamespace(metadata=SimpleNamespace(hostname=f"gpu-{n}", node_id=f"id{n}")) for n in range(2)]
ONE, ALL = {1: "CUDA is missing"}, {0: "CUDA is missing", 1: "CUDA is missing"}


@pytest.fixture(autouse=True)
def _cordon(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cordon of this test's own, and four nodes of one worker each."""
    nodes = [
        {"NodeID": f"id{n}", "NodeManagerHostname": f"gpu-{n}", "Alive": True, "Resources": {"CPU": 8.0, "GPU": 1.0}}
        for n in range(4)
    ]
    free = {node["NodeID"]: dict(node["Resources"]) for node in nodes}
    for node_id in ("id0", "id1", "id3"):  # ours, and the last another program's
        free[node_id]["GPU"] = 0.0
    monkeypatch.setattr(placement, "CORDON", Cordon())
    monkeypatch.setattr(placement, "unreachable_nodes", lambda _nodes: set())
    monkeypatch.setattr(placement.ray, "nodes", lambda: nodes)
    state = SimpleNamespace(available_resources_per_node=lambda: free, get_draining_nodes=lambda: {})
    monkeypatch.setattr(placement, "cluster", state)


def monitor_of(told: list[dict[str, Any]], is_new: bool, number: int = 1) -> AttemptMonitor:
    mailbox = SimpleNamespace(post=SimpleNamespace(remote=told.extend))
    found = AttemptMonitor(mailbox, Budgets(max_failures=8, max_preemptions=-1, refill_iters=10), None, is_new)
    found._report.number = number
    found._placement.start_group({"CPU": 1.0, "GPU": 1.0})
    return found


@pytest.mark.parametrize(("is_new", "faults"), [(True, ONE), (True, ALL), (False, ALL)])
def test_gpus_that_cannot_have_worked_are_a_mistake(is_new: bool, faults: dict[int, str]) -> None:
    with pytest.raises(ControllerError) as refused:
        monitor_of([], is_new).refuse(WORKERS, faults)
    why = refused.value.controller_failure
    assert isinstance(why, ConfigError)
    assert "Ray gives workers a GPU there, but CUDA is missing. Install a PyTorch with CUDA there" in str(why)


@pytest.mark.parametrize(("is_new", "number", "faults"), [(False, 1, ONE), (True, 2, ONE), (True, 2, ALL)])
def test_on_nodes_that_come_later_they_are_faults(is_new: bool, number: int, faults: dict[int, str]) -> None:
    told: list[dict[str, Any]] = []
    found = monitor_of(told, is_new, number)
    for _ in range(3):
        with pytest.raises(ControllerError) as refused:
            found.refuse(WORKERS, faults)
        assert isinstance(refused.value.controller_failure, WorkerGroupStartupFailedError), "Ray starts the next group"
    records = map(from_json, told)
    assert [record.cause for record in records if isinstance(record, Failure)] == ["gpu_fault"] * 3
    assert placement.CORDON.kept_off(0, lambda _without: 9) == {f"id{rank}" for rank in faults}
    with pytest.raises(ControllerError) as refused:
        found.refuse(WORKERS, faults)
    assert isinstance(refused.value.controller_failure, RunAbandonedError)


def test_workers_are_kept_off_where_others_have_room_that_is_free() -> None:
    told: list[dict[str, Any]] = []
    found = monitor_of(told, is_new=True)
    scaling = SimpleNamespace(_resources_per_worker_not_none={"CPU": 1.0, "GPU": 1.0})

    def selector(num_workers: int) -> Any:
        return found.on_controller_start_worker_group(scaling_config=scaling, num_workers=num_workers)

    assert selector(2) is None
    found._placement.cordon(WORKERS, [1])
    assert selector(2) == {placement.RAY_NODE_ID_KEY: "!in(id1)"}
    assert told[-1]["text"] == "workers are kept off gpu-1: a GPU has failed there"
    assert selector(3) is None, "the fourth node is another program's"
