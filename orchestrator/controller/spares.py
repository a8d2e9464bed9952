"""Warm spares: on every node a process for each worker that has imported torch before Ray Train asks for it.

    a run begins     the nodes start the processes of its first workers while Ray Train itself still starts
    it is under way  the nodes start spares, for the attempt after this one

To start Python and to import torch takes most of the time of a start. Ray gives an actor an idle process of its pool if
that has the same runtime environment, to the letter. There is no public call for it: `PrestartWorkers` of the raylet
and the variable that names a start-up hook are Ray's own. We use them here alone, and a test pins the version that they
were read in. Where they fail, attempts start cold.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
from collections import Counter
from contextlib import suppress
from typing import Any

import ray
from ray._private.grpc_utils import init_grpc_channel
from ray._private.ray_constants import WORKER_PROCESS_SETUP_HOOK_ENV_VAR
from ray.core.generated.common_pb2 import Language
from ray.core.generated.node_manager_pb2 import PrestartWorkersRequest
from ray.core.generated.node_manager_pb2_grpc import NodeManagerServiceStub
from ray.core.generated.runtime_environment_pb2 import RuntimeEnvInfo
from ray.train.v2._internal.constants import (
    DEFAULT_RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_VALUE,
    RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_ENV_VAR,
    get_env_vars_to_propagate,
)

from orchestrator.cluster.ray_calls import RAY_CALL_ERRORS
from orchestrator.cluster.room import fit_on_node
from orchestrator.worker.environment import variables_of

logger = logging.getLogger(__name__)

_KEEP_S = 7 * 24 * 3600  # Ray ends idle processes after a second otherwise
_KEEP_FIRST_S = 120  # those that begin a run are asked for at once, or never
_ANSWER_S = 5.0
_ATTENDANTS = 2  # a group's actors beside its controller: where its ranks meet, and who watches for drain notices
_REPLACEMENTS = 4  # nodes that are not used, and get spares: in a large cluster, not all of them
_MODULES = (
    "orchestrator.worker.run",
    "torch._dynamo",
    "torch.distributed",
    "ray.train.torch",
    "ray.tune.trainable.trainable_fn_utils",  # which Ray Train asks whether it is a part of Ray Tune
)


def runtime_env(is_warm: bool = True) -> dict[str, Any]:
    """Return what workers are started with; is_warm: those of the pool do `preload` before they wait."""
    hook = {WORKER_PROCESS_SETUP_HOOK_ENV_VAR: f"{__name__}.preload"} if is_warm else {}
    return {"env_vars": variables_of(os.environ) | hook}


def preload() -> None:
    """Import what a worker needs; Ray calls this when a process starts."""
    for module in _MODULES:
        with suppress(ImportError):
            importlib.import_module(module)


def prestart_first(num_workers: int, each: dict[str, float]) -> None:
    """Have the nodes start the processes of a run's first workers. For the driver.

    num_workers: the most that the run takes; each: the resources of one.
    """
    try:
        nodes = ray.nodes()
        _ask(nodes, first_places(num_workers, nodes, each), first_environment(), _KEEP_FIRST_S)
    except (*RAY_CALL_ERRORS, KeyError) as error:  # a node has just gone: they start cold
        logger.info("workers start cold: %s: %s", type(error).__name__, error)


def prestart(worker_group: Any, each: dict[str, float]) -> None:
    """Have the nodes start spares: nodes of the group one for each worker, other nodes as many as may be needed there.

    For the controller. each: the resources of a worker.
    """
    try:
        workers = worker_group.get_workers()
        environment = ray.get(workers[0].execute_async(_environment), timeout=_ANSWER_S)
        nodes = ray.nodes()
        _ask(nodes, wanted(Counter(worker.metadata.node_id for worker in workers), nodes, each), environment)
        _ask(nodes, {ray.get_runtime_context().get_node_id(): _ATTENDANTS}, _environment())
    except (*RAY_CALL_ERRORS, KeyError) as error:  # as above: the next attempt starts cold
        logger.info("no warm spares: %s: %s", type(error).__name__, error)


def first_places(num_workers: int, nodes: list[dict[str, Any]], each: dict[str, float]) -> dict[str, int]:
    """Return how many of a run's first workers each node will have; nothing where Ray has a choice."""
    room = {node["NodeID"]: fit_on_node(each, node["Resources"], {}) for node in nodes if node["Alive"]}
    used = {node_id: min(count, num_workers) for node_id, count in room.items() if count}
    return used if len(used) == 1 or sum(used.values()) <= num_workers else {}


def first_environment() -> str:
    """Return the runtime environment of the workers that Ray Train starts for this driver, as Ray writes it."""
    job = json.loads(_environment())
    added = {
        RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_ENV_VAR: DEFAULT_RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_VALUE,
        **get_env_vars_to_propagate(),
        **runtime_env()["env_vars"],
    }
    variables = {**job.get("env_vars", {}), **added}
    return json.dumps({**job, "env_vars": variables}, separators=(",", ":"), sort_keys=True, ensure_ascii=False)


def wanted(used: dict[str, int], nodes: list[dict[str, Any]], each: dict[str, float]) -> dict[str, int]:
    """Return how many spares each node should have; used: the group's workers by node.

    A node that is not used may replace one that is, so it gets as many as the fullest one has, if they fit.
    """
    most = max(used.values())
    free = {
        node["NodeID"]: min(most, fit_on_node(each, node["Resources"], {}))
        for node in nodes
        if node["Alive"] and node["NodeID"] not in used
    }
    replacing = {node_id: count for node_id, count in free.items() if count}
    return {**used, **dict(sorted(replacing.items())[:_REPLACEMENTS])}


def _environment() -> str:
    return str(ray.get_runtime_context().get_runtime_env_string())


def _ask(nodes: list[dict[str, Any]], counts: dict[str, int], environment: str, keep_s: int = _KEEP_S) -> None:
    """Ask nodes for idle processes; counts: by node id; environment: their runtime environment, to the letter."""
    addresses = {node["NodeID"]: f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}" for node in nodes}
    for node_id, count in counts.items():
        request = PrestartWorkersRequest(
            language=Language.PYTHON,
            job_id=bytes.fromhex(ray.get_runtime_context().get_job_id()),
            runtime_env_info=RuntimeEnvInfo(serialized_runtime_env=environment),
            keep_alive_duration_secs=keep_s,
            num_workers=count,
        )
        channel = init_grpc_channel(addresses[node_id])
        NodeManagerServiceStub(channel).PrestartWorkers(request, timeout=_ANSWER_S)
        channel.close()
