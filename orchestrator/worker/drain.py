"""Draining: how Ray and this run tell each other that a node is about to be taken away.

Ray Train tells every worker of a drained node. Its public call for that is a barrier of all ranks, too dear for every
iteration. The loop's ranks agree in every iteration anyway, so we read this process's own copy, which is not public.
Nor is the call that drains a node: the hidden command `ray drain-node` makes the same one.
"""

from __future__ import annotations

import logging
import time

import ray
from ray._private.state import state as cluster
from ray._raylet import GcsClient  # type: ignore[attr-defined]
from ray.core.generated.autoscaler_pb2 import DrainNodeReason
from ray.train.v2._internal.execution.context import get_train_context

from orchestrator.cluster.ray_calls import RAY_CALL_ERRORS
from orchestrator.cluster.room import fit_on_node
from orchestrator.worker.notices import Notice

logger = logging.getLogger(__name__)


def notice() -> str:
    """Return Ray's drain notice to this worker, "" for none."""
    info = get_train_context().preemption_context.preemption_info
    if info is None:
        return ""
    left = f" in {max(0.0, info.deadline_ms / 1000 - time.time()):.0f} s" if info.deadline_ms else ""
    return f"the node of rank {', '.join(map(str, sorted(info.preempted_ranks)))} is taken away{left}"


def leave(announced: Notice, workers_here: int) -> None:
    """Drain this node, which a cloud will take away: then all ranks save, and go elsewhere.

    workers_here: if the cloud only recommends to leave, the run stays unless other nodes have room for so many.
    """
    try:
        if not announced.is_certain and _room_elsewhere() < workers_here:
            logger.warning("%s; no other node has room, so training stays", announced.text)
            return
        logger.warning("%s: leaving this node", announced.text)
        context = ray.get_runtime_context()
        reason = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        deadline_ms = int(1000 * announced.deadline_s) if announced.deadline_s else 0
        client = GcsClient(address=context.gcs_address)
        is_accepted, why_not = client.drain_node(context.get_node_id(), reason, announced.text, deadline_ms)
        if not is_accepted:
            logger.warning("Ray does not drain this node: %s", why_not)
    except RAY_CALL_ERRORS as error:  # no way to the head: the node is lost without notice then
        logger.warning("this node could not be drained: %s: %s", type(error).__name__, error)


def _room_elsewhere() -> int:
    here = ray.get_runtime_context().get_node_id()
    each = ray.get_runtime_context().get_assigned_resources()
    free = cluster.available_resources_per_node()
    return sum(fit_on_node(each, resources, {}) for node_id, resources in free.items() if node_id != here)
