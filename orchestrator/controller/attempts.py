"""AttemptMonitor: sits in Ray Train's controller and sees every attempt begin and end.

    a worker fails -> the survivors put their state into node memory -> the cause is found and charged to its budget
                   -> Ray ends the group and starts the next one, or the run is given up

The hooks are Ray Train's own (`RunConfig(callbacks=...)`), but not all of their types are public: a test pins the
version that they were read in. A hook raises nothing, unless it gives the run up.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.train import ControllerError
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback

from orchestrator.cluster.reachability import ReachabilityMonitor, unreachable_nodes
from orchestrator.controller import spares
from orchestrator.controller.budgets import Budgets, RunAbandonedError, root_cause
from orchestrator.controller.group_rescue import GroupRescue, rescue_group
from orchestrator.controller.placement import Placement, label_selector, wait_for_places
from orchestrator.controller.ray_errors import failure_of
from orchestrator.controller.report import AttemptReport
from orchestrator.errors import ConfigError
from orchestrator.worker.failure import Cause, WorkerFailure

logger = logging.getLogger(__name__)

_SPARES_AFTER_S = 3.0  # once training is under way: starting them takes cores for a moment
_SPARES_AGAIN_S = 0.5  # after a loss: the next one may come soon
_GPU_REMEDY = (
    "Install a PyTorch with CUDA there, and an NVIDIA driver that is new enough for it, or train on CPUs (--device=cpu)"
)


class AttemptMonitor(WorkerGroupCallback, ControllerCallback):  # type: ignore[misc]
    """One for all attempts of a driver.

    mailbox: the run's, for lines and events.
    each: the resources of a worker, for warm spares; None: no spares.
    is_new: nothing of this run was trained before, so a GPU that cannot be used is a mistake and no loss.
    """

    def __init__(self, mailbox: Any, budgets: Budgets, each: dict[str, float] | None, is_new: bool = False) -> None:
        self._report, self._budgets, self._each, self._is_new = AttemptReport(mailbox), budgets, each, is_new
        self._placement = Placement()
        self._reachability: ReachabilityMonitor | None = None
        self._group: Any = None
        self._is_over = True  # this attempt has ended by itself, and what could be rescued is
        self._is_placing = False  # room was asked for, and not found yet
        self._iter_num: int | None = None  # the newest one that is safe
        self._back_off_s = 0.0

    def on_controller_start_worker_group(self, *, scaling_config: Any, num_workers: int) -> dict[str, str] | None:
        labels, cordoned = label_selector(num_workers, scaling_config._resources_per_worker_not_none, self._placement)
        if cordoned:
            self._report.note(f"workers are kept off {', '.join(cordoned)}: a GPU has failed there")
        return labels

    def before_worker_group_start(self, worker_group_context: Any) -> None:
        num_workers, each = worker_group_context.num_workers, worker_group_context.resources_per_worker
        if self._back_off_s:
            self._report.note(f"waiting {self._back_off_s:.0f} s before the next attempt")
            time.sleep(self._back_off_s)
            self._back_off_s = 0.0
        if self._is_placing:
            self._report.note(f"still no room for {num_workers} workers: waiting for machines")
        self._placement.start_group(each)
        self._report.starting(num_workers)
        if self._report.number > 1 and not self._is_placing:
            wait_for_places(num_workers, each)
        self._is_placing = True

    def after_worker_group_start(self, worker_group: Any) -> None:
        self._group, self._is_over, self._is_placing = worker_group, False, False
        self._report.placed(len(worker_group.get_workers()))
        used = {worker.metadata.node_id for worker in worker_group.get_workers()}
        self._reachability = ReachabilityMonitor(
            [node for node in ray.nodes() if node["NodeID"] in used], self._give_up_node
        )

    def after_worker_group_training_start(self, worker_group: Any) -> None:
        self._report.running([worker.metadata.hostname for worker in worker_group.get_workers()])
        if self._each:
            after_s = _SPARES_AFTER_S if self._report.number == 1 else _SPARES_AGAIN_S
            later = threading.Timer(after_s, spares.prestart, (worker_group, self._each))
            later.daemon = True
            later.start()

    def after_worker_group_poll_status(self, worker_group_status: Any) -> None:
        if worker_group_status.finished and not worker_group_status.errors:
            self._is_over = True
        if not worker_group_status.errors or self._is_over:
            return
        self._is_over = True
        with _run_goes_on("the end of an attempt could not be examined; it is restarted"):
            errors = {rank: status.error for rank, status in worker_group_status.worker_statuses.items()}
            try:
                self._end_attempt({rank: error for rank, error in errors.items() if error})
            except RunAbandonedError as given_up:
                raise ControllerError(given_up) from None

    def before_worker_group_shutdown(self, worker_group: Any) -> None:  # noqa: ARG002
        if self._reachability:
            self._reachability.close()
        if self._is_over:
            return
        self._is_over = True  # Ray ends a healthy group: another number of workers can run now
        with _run_goes_on("the state could not be rescued before the group ends"):
            seen_s, workers = time.time(), self._group.get_workers()
            rescued = self._rescue(workers, lost=set(), failures=[])
            self._placement.note_usage(workers)
            self._report.resized(rescued, seen_s)

    def after_worker_group_shutdown(self, worker_group_context: Any) -> None:  # noqa: ARG002
        self._report.ended()

    def refuse(self, workers: list[Any], faults: dict[int, str]) -> None:
        """End an attempt that has its places, before its process group is made; faults: of GPUs, by rank.

        Raises:
            ControllerError: with a mistake of the user's where nothing can have worked before, or RunAbandonedError, or
                with an error for which Ray starts the next group.
        """
        self._is_placing = False
        self._report.placed(len(workers))
        rank, fault = next(iter(faults.items()))
        node = workers[rank].metadata.hostname
        text = f"node {node}: Ray gives workers a GPU there, but {fault}"
        if self._report.number == 1 and (self._is_new or len(faults) == len(workers)):
            raise ControllerError(ConfigError(f"{text}. {_GPU_REMEDY}"))
        self._placement.cordon(workers, list(faults))
        failure = WorkerFailure(rank, Cause.GPU_FAULT, text, self._iter_num)
        self._report.refused(failure, list(faults), node)
        try:
            self._charge(failure, node)
        except RunAbandonedError as given_up:
            raise ControllerError(given_up) from None
        self._report.ended()
        raise ControllerError(WorkerGroupStartupFailedError(text))

    def _give_up_node(self, node_id: str) -> None:
        """End the workers of a node that does not answer, as far as Ray is concerned: it sees them gone then."""
        for worker in self._group.get_workers():
            if worker.metadata.node_id == node_id:
                self._report.note(f"node {worker.metadata.hostname} does not answer: going on without it", "WARNING")
                ray.kill(worker.actor)

    def _end_attempt(self, errors: dict[int, Exception]) -> None:
        """Rescue the state of an attempt that has failed, find the cause, and charge it to its budget.

        Raises:
            RunAbandonedError: no other attempt is worth starting.
        """
        seen_s, workers = time.time(), self._group.get_workers()
        nodes = [worker.metadata.node_id for worker in workers]
        unreachable = unreachable_nodes(ray.nodes())
        gone = {rank for rank, node_id in enumerate(nodes) if node_id in unreachable}
        for rank in gone:
            ray.kill(workers[rank].actor)  # or Ray would wait for it
        failures = [failure_of(error, rank, nodes[rank], self._iter_num) for rank, error in errors.items()]
        if not any(each.cause is Cause.USER_ERROR for each in failures):
            self._report.loss_is_seen()
        rescued = self._rescue(workers, set(errors) | gone, failures)
        # a survivor that turns out to be dead may be the one that the others' errors come from
        failures += [failure_of(death, rank, nodes[rank], self._iter_num) for rank, death in rescued.deaths.items()]
        failures += [WorkerFailure(rank, Cause.NODE_LOST, "its node does not answer", self._iter_num) for rank in gone]
        first = root_cause(failures)
        node = workers[first.rank].metadata.hostname
        ranks = sorted(errors.keys() | rescued.deaths.keys() | gone)
        self._report.failed(first, ranks, node, rescued, seen_s)
        self._placement.cordon(workers, [each.rank for each in failures if each.cause is Cause.GPU_FAULT])
        self._charge(first, node)
        self._report.resumes(rescued.iter_num)

    def _rescue(self, workers: list[Any], lost: set[int], failures: list[WorkerFailure]) -> GroupRescue:
        rescued = rescue_group(workers, lost, failures)
        if rescued.iter_num is not None:
            self._iter_num = rescued.iter_num
        return rescued

    def _charge(self, failure: WorkerFailure, node: str) -> None:
        self._back_off_s = self._budgets.charge(failure, self._iter_num)
        self._report.lost(failure, node, self._budgets)


@contextmanager
def _run_goes_on(what_failed: str) -> Iterator[None]:
    """Log an error of our own: out of a hook, it would end the run whatever its budgets."""
    try:
        yield
    except ControllerError:
        raise
    except Exception:  # whatever it is, the next attempt starts from a state that is safe
        logger.exception("%s", what_failed)
