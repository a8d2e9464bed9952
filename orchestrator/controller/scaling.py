"""Scaling policies: how many workers can run now, counted on the nodes that live. For `num_workers=2-8`.

Ray Train asks a policy before it starts a group and while one runs. Ray's own policy counts the resources that the
autoscaler has reserved for the run. The autoscaler learns of a lost node 20 s late, and counts nodes that the cloud is
about to take away. Ours counts nodes that live and stay, less what other programs use on them. Ray's classes are not
public: we extend them here alone, and a test pins what we rely on. If Ray changes its trainer (`trainer.py`), Ray's own
policy runs.
"""

from __future__ import annotations

import math
import time
from typing import Any

import ray
from ray._private.state import state as cluster
from ray.train import ScalingConfig
from ray.train.v2._internal.execution.scaling_policy import (
    ElasticScalingPolicy,
    FixedScalingPolicy,
    NoopDecision,
    ResizeDecision,
    ScalingDecision,
)

from orchestrator.cluster.mailbox import MailboxWriter
from orchestrator.cluster.reachability import unreachable_nodes
from orchestrator.cluster.room import Resources, used_by_others, workers_that_fit
from orchestrator.controller.cordon import CORDON
from orchestrator.telemetry.records import AttemptWaiting

_ASK_AGAIN_S = 0.25  # while there are too few machines
_TELL_EVERY_S = 30.0
_TIMES_THE_COST = 20.0  # a group runs for so many restarts' time before it is restarted to grow: at most 5% is lost
_AT_LEAST_S = 10.0


class WithoutAutoscaler:
    """Makes a policy ask no autoscaler for machines. Name it before Ray's class among the bases."""

    def _send_resource_request(self) -> None:
        pass

    _maybe_send_resource_request = _cancel_resource_request = _send_resource_request


class FixedPolicy(WithoutAutoscaler, FixedScalingPolicy):  # type: ignore[misc]
    """Always as many workers. The group's own request for places asks an autoscaler for them."""


class LiveNodesPolicy(ElasticScalingPolicy):  # type: ignore[misc]
    """As many workers as there is room for on nodes that live; more, while some run, only where that pays."""

    def __init__(self, scaling_config: ScalingConfig, mailbox: Any) -> None:
        super().__init__(scaling_config)
        self._writer = MailboxWriter(mailbox)
        self._used_by_others: dict[str, Resources] | None = None
        self._decided_s: float | None = None
        self._cost_s = 0.0  # of the last start of a group
        self._told_s = -math.inf  # while too few machines were there

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        self._maybe_send_resource_request()
        each = self.scaling_config._resources_per_worker_not_none
        if self._used_by_others is None:
            self._used_by_others = used_by_others(ray.nodes(), cluster.available_resources_per_node(), {}, each)
        room = self._room()
        if room < self.scaling_config.min_workers:
            self._tell_of_waiting(room)
            time.sleep(_ASK_AGAIN_S)  # the controller asks again at once, and would do nothing else
            return NoopDecision()
        self._told_s = -math.inf
        self._decided_s = time.monotonic()
        return ResizeDecision(num_workers=room, resources_per_worker=each)

    def make_decision_for_running_worker_group(
        self,
        worker_group_state: Any,
        worker_group_status: Any,  # noqa: ARG002
    ) -> ScalingDecision:
        self._maybe_send_resource_request()
        now_s = time.monotonic()
        if self._decided_s is not None:  # it has just begun
            self._cost_s, self._decided_s = now_s - self._decided_s, None
            self._latest_monitor_time = now_s
        if now_s - self._latest_monitor_time < max(_AT_LEAST_S, _TIMES_THE_COST * self._cost_s):
            return NoopDecision()
        self._latest_monitor_time = now_s
        each = self.scaling_config._resources_per_worker_not_none
        ours: dict[str, int] = {}
        for worker in worker_group_state.workers:
            ours[worker.metadata.node_id] = ours.get(worker.metadata.node_id, 0) + 1
        self._used_by_others = used_by_others(ray.nodes(), cluster.available_resources_per_node(), ours, each)
        room = self._room()
        if room <= worker_group_state.num_workers:  # a group that is well is never made smaller
            return NoopDecision()
        was = worker_group_state.num_workers
        self._writer.note(f"room for {room} workers: going on with them instead of {was}")
        self._decided_s = time.monotonic()
        return ResizeDecision(num_workers=room, resources_per_worker=each)

    def _room(self) -> int:
        each = self.scaling_config._resources_per_worker_not_none
        nodes = ray.nodes()
        leaving = unreachable_nodes(nodes) | set(cluster.get_draining_nodes())

        def room_without(kept_off: set[str]) -> int:
            return workers_that_fit(each, nodes, leaving | kept_off, self._used_by_others or {})

        room = room_without(CORDON.kept_off(int(self.scaling_config.min_workers), room_without))
        return min(room, int(self.scaling_config.max_workers))

    def _tell_of_waiting(self, room: int) -> None:
        now_s = time.monotonic()
        if now_s - self._told_s >= _TELL_EVERY_S:
            self._told_s = now_s
            least = self.scaling_config.min_workers
            self._writer.emit(AttemptWaiting(room=room, least=least))
            self._writer.note(f"waiting for machines: there is room for {room} of at least {least} workers")


class UnscaledLiveNodesPolicy(WithoutAutoscaler, LiveNodesPolicy):
    """The same on a cluster without an autoscaler."""
