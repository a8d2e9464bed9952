"""Room: how many workers fit on the nodes of a cluster, and waiting until enough do."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable
from typing import Any

import ray

from orchestrator.cluster import autoscaler
from orchestrator.cluster.join import StoppedError
from orchestrator.config import TrainConfig
from orchestrator.errors import ConfigError
from orchestrator.telemetry.goodput import duration

logger = logging.getLogger(__name__)

Resources = dict[str, float]


def workers_that_fit(
    each: Resources, nodes: list[dict[str, Any]], leaving: set[str], used: dict[str, Resources]
) -> int:
    """Return how many workers fit; nodes: as ray.nodes() lists them; leaving, used: by node id."""
    return sum(
        fit_on_node(each, node["Resources"], used.get(node["NodeID"], {}))
        for node in nodes
        if node["Alive"] and node["NodeID"] not in leaving
    )


def fit_on_node(each: Resources, total: Resources, used: Resources) -> int:
    """Return how many workers that need `each` fit into a node's total, less what is used of it."""
    wanted = {kind: amount for kind, amount in each.items() if amount > 0}
    free = (total.get(kind, 0.0) - used.get(kind, 0.0) for kind in wanted)
    return max(0, min(int(left / amount + 1e-6) for left, amount in zip(free, wanted.values(), strict=True)))


def used_by_others(
    nodes: list[dict[str, Any]], available: dict[str, Resources], ours: dict[str, int], each: Resources
) -> dict[str, Resources]:
    """Return what programs other than this run use, by node; ours: how many of its workers are on each."""
    used = {}
    for node in nodes:
        node_id, total = node["NodeID"], node["Resources"]
        if node["Alive"] and node_id in available:
            free = available[node_id]
            mine = {kind: ours.get(node_id, 0) * amount for kind, amount in each.items()}
            used[node_id] = {kind: max(0.0, total.get(kind, 0.0) - free.get(kind, 0.0) - mine[kind]) for kind in each}
    return used


_VERDICT_S = 60.0  # an autoscaler looks every 5 s
_LOOK_EVERY_S = 0.5
_TELL_EVERY_S = 30.0
_REMEDY = "Lower --num_workers, --cpus_per_worker or --gpus_per_worker"


def wait_for_room(config: TrainConfig, may_wait: bool, stop: threading.Event, on_wait: Callable[[], None]) -> float:
    """Return the GPUs of each worker, once the cluster has room for all workers, or for the least of a range.

    What other runs use counts as room: they end. What is missing is waited for where an autoscaler can bring it.
    may_wait: the cluster had room before, and what is missing may come back: the run waits for it by itself.
    stop: ends the waiting. on_wait: is called when it begins.

    Raises:
        ConfigError: there will never be so much; says what is there and what was asked.
        StoppedError: it was stopped before there was room.
    """
    gpus = _gpus_per_worker(config)
    each = {"CPU": config.cpus_per_worker, "GPU": gpus}
    if (room := _room(each)) >= config.min_workers:
        return gpus
    if may_wait:
        logger.warning("the cluster has room for %d of %s workers now: waiting for machines", room, config.num_workers)
        return gpus
    if not autoscaler.version():
        raise ConfigError(f"{_too_much(config, gpus, room)}. {_REMEDY}, or add nodes")
    on_wait()
    _wait_for_autoscaler(config, each, stop)
    return gpus


def _gpus_per_worker(config: TrainConfig) -> float:
    """Return the GPUs of each worker: where they are not set, 1 if there are any, or an autoscaler can bring some.

    Raises:
        ConfigError: nobody can say whether it can.
    """
    if config.gpus_per_worker is not None or config.device == "cpu":
        return config.gpus_per_worker or 0.0
    if any(node["Resources"].get("GPU") for node in ray.nodes() if node["Alive"]):
        return 1.0
    version = autoscaler.version()
    if version == 1:
        raise ConfigError(
            "gpus_per_worker: no GPU is in the cluster now, and its autoscaler does not tell whether it can bring any: "
            "give --gpus_per_worker=1, or 0 to train on CPUs"
        )
    if version == 0:
        return 0.0
    with autoscaler.asked_for({"CPU": config.cpus_per_worker, "GPU": 1.0}, 1) as request:
        deadline_s = time.monotonic() + _VERDICT_S
        while (can_bring := request.verdict()) is None and time.monotonic() < deadline_s:
            time.sleep(_LOOK_EVERY_S)
    if can_bring is None:
        raise ConfigError(
            f"gpus_per_worker: no GPU is in the cluster now, and its autoscaler was silent for {_VERDICT_S:.0f} s: "
            "see `ray status`, or give --gpus_per_worker=1, or 0 to train on CPUs"
        )
    return float(can_bring)


def _wait_for_autoscaler(config: TrainConfig, each: dict[str, float], stop: threading.Event) -> None:
    began_s, told_s = time.monotonic(), -math.inf
    with autoscaler.asked_for(each, config.min_workers) as request:
        while not request.is_there(_LOOK_EVERY_S):
            if stop.is_set():
                raise StoppedError
            waited_s, room = time.monotonic() - began_s, _room(each)
            if request.verdict() is False and room < config.min_workers:
                raise ConfigError(
                    f"{_too_much(config, each['GPU'], room)}, and its autoscaler cannot start machines for the rest: "
                    f"no node type has such resources, or their max_workers are too few. {_REMEDY}, or change the "
                    "configuration of the cluster"
                )
            if waited_s - told_s >= _TELL_EVERY_S:
                told_s = waited_s
                logger.info(
                    "waiting for machines since %s: there is room for %d of at least %d workers with %g CPU and %g GPU "
                    "each%s",
                    duration(waited_s),
                    room,
                    config.min_workers,
                    each["CPU"],
                    each["GPU"],
                    f"; {doing}" if (doing := autoscaler.doing()) else "",
                )


def _room(each: dict[str, float]) -> int:
    return workers_that_fit(each, ray.nodes(), set(), {})


def _too_much(config: TrainConfig, gpus: float, room: int) -> str:
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    there = {kind: sum(node.get(kind, 0) for node in nodes) for kind in ("CPU", "GPU")}
    return (
        f"num_workers={config.num_workers} with {config.cpus_per_worker:g} CPU and {gpus:g} GPU each is more than "
        f"the cluster can give: it has {there['CPU']:g} CPU and {there['GPU']:g} GPU on {len(nodes)} node(s), "
        f"room for {room}"
    )
