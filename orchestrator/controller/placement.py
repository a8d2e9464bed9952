"""Placement: which nodes a group of workers is kept off, and when the places of the group before are free."""

from __future__ import annotations

import time
from collections import Counter
from contextlib import suppress
from typing import Any

import ray
from ray._private.state import state as cluster
from ray._raylet import RAY_NODE_ID_KEY  # type: ignore[attr-defined]

from orchestrator.cluster.ray_calls import RAY_CALL_ERRORS
from orchestrator.cluster.reachability import unreachable_nodes
from orchestrator.cluster.room import Resources, used_by_others, workers_that_fit
from orchestrator.controller.cordon import CORDON

_FREE_AGAIN_S = 1.0  # in which the places of a group that has ended are free


class Placement:
    """Of one run's groups, one after the other; each: the resources of a worker."""

    def __init__(self) -> None:
        self._each: Resources = {}
        self._used_by_others: dict[str, Resources] = {}  # by node, when the group before ended

    def start_group(self, each: Resources) -> None:
        """Note what each worker of the group that starts now needs."""
        self._each = each

    def cordon(self, workers: list[Any], ranks: list[int]) -> None:
        """Keep workers off the nodes of these ranks from now on."""
        for rank in ranks:
            CORDON.put(workers[rank].metadata.node_id)
        self.note_usage(workers)

    def note_usage(self, workers: list[Any]) -> None:
        """Note what other programs use on the nodes, while we know where the workers of this group are."""
        if CORDON.has_any():
            ours = Counter(worker.metadata.node_id for worker in workers)
            free = cluster.available_resources_per_node()
            self._used_by_others = used_by_others(ray.nodes(), free, ours, self._each)

    def cordoned(self, num_workers: int, each: Resources, unreachable: set[str]) -> set[str]:
        """Return the nodes whose GPUs have failed, as far as the others have room for the group that is to start."""
        if not CORDON.has_any():
            return set()
        nodes, leaving = ray.nodes(), unreachable | set(cluster.get_draining_nodes())
        return CORDON.kept_off(
            num_workers, lambda without: workers_that_fit(each, nodes, leaving | without, self._used_by_others)
        )


def label_selector(num_workers: int, each: Resources, placement: Placement) -> tuple[dict[str, str] | None, list[str]]:
    """Return the labels of the nodes that the next group may use, None for all nodes; and the cordoned hosts."""
    unreachable = unreachable_nodes(ray.nodes())  # Ray takes them for alive, and would place workers there
    cordoned = placement.cordoned(num_workers, each, unreachable)
    hosts = sorted(node["NodeManagerHostname"] for node in ray.nodes() if node["NodeID"] in cordoned)
    avoided = sorted(unreachable | cordoned)
    return ({RAY_NODE_ID_KEY: f"!in({', '.join(avoided)})"} if avoided else None), hosts


def wait_for_places(num_workers: int, each: Resources) -> None:
    """Wait a moment until the head knows that the places of the group before are free.

    A placement group that is asked for before that is looked at again at Ray's next tick only, up to a second later.
    """
    deadline_s = time.monotonic() + _FREE_AGAIN_S
    with suppress(*RAY_CALL_ERRORS):  # a silent head: whoever asks it next will say so
        while time.monotonic() < deadline_s:
            free = ray.available_resources()
            if all(free.get(resource, 0.0) >= num_workers * amount for resource, amount in each.items()):
                return
            time.sleep(0.02)
