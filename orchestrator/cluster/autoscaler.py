"""Autoscaler: we ask it for room, and find out whether it can ever bring so much.

We ask as Ray Train will, by a placement group, which is public. The answer of the autoscaler (v2, which `ray up` and
KubeRay start) is not: nothing public in Ray 2.60 tells which machines it may start, and no open autoscaler reports the
configuration that `get_cluster_config` would return. So we read the state behind `ray status`, with the requests that
the autoscaler holds for impossible. A test pins it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray._private.ray_constants import DEBUG_AUTOSCALING_STATUS
from ray._raylet import (  # type: ignore[attr-defined]
    GCS_AUTOSCALER_STATE_NAMESPACE,
    GCS_AUTOSCALER_V2_ENABLED_KEY,
    GcsClient,
)
from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply
from ray.util import placement_group, remove_placement_group

from orchestrator.cluster.ray_calls import RAY_CALL_ERRORS

logger = logging.getLogger(__name__)

_ANSWER_S = 10.0
_MIRRORED = "node_"  # so begin the node types of an autoscaler that may start nothing, as on a cluster by hand


class Request:
    """Room for workers, asked for. Lives in `asked_for`."""

    def __init__(self, group: Any) -> None:
        self._group = group
        self._version: int | None = None  # of the cluster's state, with this request in it

    def is_there(self, within_s: float) -> bool:
        """Wait for the room; return whether there is some now."""
        return bool(self._group.wait(within_s))

    def verdict(self) -> bool | None:
        """Return whether the autoscaler can bring what is asked for, as soon as it has looked at it; None before."""
        status = _status()
        if status is None:
            return None
        cluster, autoscaler = status.cluster_resource_state, status.autoscaling_state
        if self._version is None and self._is_in(cluster.pending_gang_resource_requests):
            self._version = cluster.cluster_resource_state_version
        if self._version is None or autoscaler.last_seen_cluster_resource_state_version < self._version:
            return None
        return not self._is_in(autoscaler.infeasible_gang_resource_requests)

    def _is_in(self, requests: Any) -> bool:
        name = self._group.id.hex()
        return any(name in request.details for request in requests)


@contextmanager
def asked_for(each: dict[str, float], count: int) -> Iterator[Request]:
    """Ask for room for so many workers, and give it back at the end: an autoscaler keeps idle machines for minutes.

    each: the resources of a worker.
    """
    group = placement_group([{kind: amount for kind, amount in each.items() if amount}] * count, strategy="PACK")
    try:
        yield Request(group)
    finally:
        remove_placement_group(group)


def version() -> int:
    """Return which autoscaler of Ray's starts machines for this cluster: 2, 1 (of which little is known), 0 for none.

    A cluster that was started by hand has 0, unless version 2 is switched on in its environment: that one says itself
    that it can start nothing.
    """
    try:
        client = GcsClient(address=ray.get_runtime_context().gcs_address)
        flag = client.internal_kv_get(
            GCS_AUTOSCALER_V2_ENABLED_KEY.encode(), GCS_AUTOSCALER_STATE_NAMESPACE.encode(), _ANSWER_S
        )
        if flag == b"1":
            return 2
        status = json.loads(client.internal_kv_get(DEBUG_AUTOSCALING_STATUS.encode(), None, _ANSWER_S) or b"{}")
        report = status.get("autoscaler_report") or {}
        types = [*report.get("active_nodes", {}), *report.get("pending_launches", {})]
        return int(any(not name.startswith(_MIRRORED) for name in types))
    except (*RAY_CALL_ERRORS, ValueError) as error:  # no answer, or none that can be read
        logger.info("whether there is an autoscaler is not known: %s: %s", type(error).__name__, error)
        return 0


def doing() -> str:
    """Return the autoscaler's efforts about missing machines, as text; "" if none are known."""
    status = _status()
    if status is None:
        return ""
    state = status.autoscaling_state
    starting = sum(request.count for request in state.pending_instance_requests) + len(state.pending_instances)
    failed = max(state.failed_instance_requests, key=lambda request: request.failed_ts, default=None)
    parts = [f"the autoscaler is starting {starting}"] if starting else []
    parts += [f"it could not start {failed.ray_node_type_name}: {failed.reason}"] if failed else []
    return ", ".join(parts)


def _status() -> GetClusterStatusReply | None:
    try:
        answer = GcsClient(address=ray.get_runtime_context().gcs_address).get_cluster_status(timeout_s=_ANSWER_S)
        return GetClusterStatusReply.FromString(answer)
    except (*RAY_CALL_ERRORS, ValueError) as error:  # as above
        logger.info("the autoscaler's state is not known: %s: %s", type(error).__name__, error)
        return None
