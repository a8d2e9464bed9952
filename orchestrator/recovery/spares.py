"""Warm spares: on every node an idle process for each worker, that has imported already what the next attempt needs.

Starting Python and importing torch are most of what a restart takes. Ray gives an actor an idle process of its pool if
that has the same runtime environment, to the letter. There is no public call for it: `PrestartWorkers` of the raylet
and the variable that names a start-up hook are Ray's own. They are used here alone, a test pins the version that they
were read in, and where they fail attempts start cold, as without them.
"""

from __future__ import annotations

import importlib
import logging
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

from orchestrator.recovery.elastic import fit

logger = logging.getLogger(__name__)

_KEEP_S = 7 * 24 * 3600  # Ray ends idle processes after a second otherwise
_ANSWER_S = 5.0
_ATTENDANTS = 2  # a group's actors beside its controller: where its ranks meet, and who watches for drain notices
_REPLACEMENTS = 4  # nodes that are not used, and get spares: in a large cluster, not all of them
_MODULES = (
    "orchestrator.worker",
    "torch._dynamo",
    "torch.distributed",
    "ray.train.torch",
    "ray.tune.trainable.trainable_fn_utils",  # which Ray Train asks whether it is a part of Ray Tune
)


def runtime_env() -> dict[str, Any]:
    """Return what workers are started with, so that those of the pool do `preload` before they wait."""
    return {"env_vars": {WORKER_PROCESS_SETUP_HOOK_ENV_VAR: f"{__name__}.preload"}}


def preload() -> None:
    """Import what a worker needs; Ray calls this when a process starts."""
    for module in _MODULES:
        with suppress(ImportError):
            importlib.import_module(module)


def prestart(worker_group: Any, each: dict[str, float]) -> None:
    """Have the nodes start spares, behind: those of a group one for each worker, others as many as may be needed there.

    each: the resources of a worker.
    """
    try:
        workers = worker_group.get_workers()
        environment = ray.get(workers[0].execute_async(_environment), timeout=_ANSWER_S)
        nodes = ray.nodes()
        addresses = {node["NodeID"]: f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}" for node in nodes}
        for node_id, count in wanted(Counter(worker.metadata.node_id for worker in workers), nodes, each).items():
            _ask(addresses[node_id], environment, count)
        here = ray.get_runtime_context().get_node_id()
        _ask(addresses[here], _environment(), _ATTENDANTS)
    except Exception as error:  # another version of Ray, a node that has just gone: the next attempt starts cold
        logger.info("no warm spares: %s: %s", type(error).__name__, error)


def _ask(address: str, environment: str, count: int) -> None:
    request = PrestartWorkersRequest(
        language=Language.PYTHON,
        job_id=bytes.fromhex(ray.get_runtime_context().get_job_id()),
        runtime_env_info=RuntimeEnvInfo(serialized_runtime_env=environment),
        keep_alive_duration_secs=_KEEP_S,
        num_workers=count,
    )
    channel = init_grpc_channel(address)
    NodeManagerServiceStub(channel).PrestartWorkers(request, timeout=_ANSWER_S)
    channel.close()


def wanted(used: dict[str, int], nodes: list[dict[str, Any]], each: dict[str, float]) -> dict[str, int]:
    """Return how many spares each node should have; used: the group's workers by node.

    A node that is not used may replace one that is, so it gets as many as the fullest one has, if they fit.
    """
    most = max(used.values())
    free = {
        node["NodeID"]: min(most, fit(each, node["Resources"], {}))
        for node in nodes
        if node["Alive"] and node["NodeID"] not in used
    }
    replacing = {node_id: count for node_id, count in free.items() if count}
    return {**used, **dict(sorted(replacing.items())[:_REPLACEMENTS])}


def _environment() -> str:
    return str(ray.get_runtime_context().get_runtime_env_string())
