from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from ray.train import ScalingConfig

from orchestrator.cluster.reachability import ReachabilityMonitor, unreachable_nodes
from orchestrator.cluster.room import fit_on_node, used_by_others, workers_that_fit
from orchestrator.controller import scaling as elastic
from orchestrator.controller.cordon import Cordon
from orchestrator.controller.scaling import LiveNodesPolicy
from orchestrator.controller.spares import first_places, wanted


def node(name: str, cpus: float, gpus: float = 0.0, alive: bool = True, port: int = 0) -> dict[str, Any]:
    resources = {"CPU": cpus} | ({"GPU": gpus} if gpus else {})
    place = {"NodeManagerAddress": "127.0.0.1", "NodeManagerPort": port}
    return {"NodeID": name, "Alive": alive, "Resources": resources, **place}


def test_fit() -> None:
    assert fit_on_node({"CPU": 0.1}, {"CPU": 0.3}, {}) == 3  # binary fractions
    assert fit_on_node({"CPU": 1, "GPU": 1}, {"CPU": 8, "GPU": 4}, {"GPU": 1}) == 3
    assert fit_on_node({"CPU": 1, "GPU": 1}, {"CPU": 8}, {}) == 0
    assert fit_on_node({"CPU": 1, "GPU": 0}, {"CPU": 2}, {"CPU": 3}) == 0


def test_only_nodes_that_live_and_stay_have_room() -> None:
    nodes = [node("head", 0), node("a", 2), node("b", 2), node("dead", 8, alive=False), node("silent", 8)]
    assert workers_that_fit({"CPU": 1}, nodes, {"silent"}, {}) == 4
    assert workers_that_fit({"CPU": 1}, nodes, {"silent", "a"}, {"b": {"CPU": 1.0}}) == 1


def test_a_run_of_some_sizes_goes_on_without_a_node_whose_gpu_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Cordon()
    nodes = [node("head", 0), node("a", 1), node("b", 1), node("c", 1)]
    monkeypatch.setattr(elastic, "CORDON", bench)
    monkeypatch.setattr(elastic, "unreachable_nodes", lambda _nodes: set())
    monkeypatch.setattr(elastic, "cluster", SimpleNamespace(get_draining_nodes=lambda: []))
    monkeypatch.setattr(elastic, "ray", SimpleNamespace(nodes=lambda: nodes))
    each = {"CPU": 1}
    some = LiveNodesPolicy(ScalingConfig(num_workers=(2, 8), resources_per_worker=each), None)
    all_of_them = LiveNodesPolicy(ScalingConfig(num_workers=(3, 8), resources_per_worker=each), None)
    assert some._room() == 3
    bench.put("b")
    assert some._room() == 2
    assert all_of_them._room() == 3, "where the others are too few it is used"


def test_what_others_use_is_neither_free_nor_ours() -> None:
    nodes = [node("a", 4), node("b", 4)]
    used = used_by_others(nodes, {"a": {"CPU": 1.0}, "b": {}}, {"a": 2, "b": 4}, {"CPU": 1.0})
    assert used == {"a": {"CPU": 1.0}, "b": {"CPU": 0.0}}


def test_nodes_that_may_replace_others_get_spares() -> None:
    nodes = [node("head", 0), node("a", 2), node("b", 2), node("c", 1), node("dead", 2, alive=False)]
    assert wanted({"a": 2}, nodes, {"CPU": 1}) == {"a": 2, "b": 2, "c": 1}
    many = [node(f"{i:02d}", 2) for i in range(100)]
    assert len(wanted({"00": 1}, many, {"CPU": 1})) == 5


def test_first_workers_are_foretold_only_where_ray_has_no_choice() -> None:
    nodes = [node("head", 0), node("a", 2), node("b", 1), node("dead", 2, alive=False)]
    assert first_places(3, nodes, {"CPU": 1}) == {"a": 2, "b": 1}
    assert first_places(8, nodes, {"CPU": 1}) == {"a": 2, "b": 1}  # of 2-8
    assert first_places(2, nodes, {"CPU": 1}) == {}
    assert first_places(2, [node("only", 8)], {"CPU": 1}) == {"only": 2}


@pytest.fixture
def listening() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def unused() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def test_a_node_that_does_not_answer_is_silent(listening: int) -> None:
    there, gone, dead = node("a", 1, port=listening), node("b", 1, port=unused()), node("c", 1, alive=False)
    assert unreachable_nodes([there, gone, dead]) == {"b"}
    assert unreachable_nodes([]) == set()


def test_the_lookout_tells_of_silence_once(listening: int) -> None:
    told: list[str] = []
    rang = threading.Event()

    def tell(node_id: str) -> None:
        told.append(node_id)
        rang.set()

    nodes = [node("a", 1, port=listening), node("b", 1, port=unused())]
    lookout = ReachabilityMonitor(nodes, tell, silence_s=1.2, every_s=0.02)
    assert rang.wait(10)
    assert not threading.Event().wait(0.2)
    lookout.close()
    assert told == ["b"]
