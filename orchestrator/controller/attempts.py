"""AttemptMonitor: sits in Ray Train's controller and sees every attempt begin and end.

    a worker fails -> the survivors put their state into node memory -> the cause is found and charged to its budget
                   -> Ray ends the group and starts the next one, or the run is given up

The hooks are Ray Train's own (`RunConfig(callbacks=...)`), but not all of their types are public: those stand here
alone, and a test pins the version that they were read in. A hook must never raise, but to give the run up.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from contextlib import suppress
from typing import Any, cast

import ray
from ray._private.state import state as cluster
from ray._raylet import RAY_NODE_ID_KEY  # type: ignore[attr-defined]
from ray.exceptions import OutOfMemoryError, RayActorError
from ray.train import ControllerError
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError, WorkerHealthCheckFailedError
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback

from orchestrator.cluster.mailbox import note_on, tell_on
from orchestrator.cluster.reachability import ReachabilityMonitor, unreachable_nodes
from orchestrator.cluster.room import used_by_others, workers_that_fit
from orchestrator.controller import spares
from orchestrator.controller.budgets import Budgets, RunAbandonedError, root_cause
from orchestrator.controller.cordon import CORDON
from orchestrator.errors import ConfigError
from orchestrator.worker.failure import AttemptFailedError, Cause, WorkerFailure, classify

logger = logging.getLogger(__name__)

_ANSWER_S = 2.0  # in which a worker that lives begins to rescue its state
_RESCUE_S = 60.0  # in which it is done
_PLACES_S = 1.0  # in which those of a group that has ended are free again
_SPARES_AFTER_S = 3.0  # once training is under way: starting them takes cores for a moment
_SPARES_AGAIN_S = 0.5  # after a loss: the next one may come soon
_GPU_REMEDY = (
    "Install a PyTorch with CUDA there, and an NVIDIA driver that is new enough for it, or train on CPUs (--device=cpu)"
)


class AttemptMonitor(WorkerGroupCallback, ControllerCallback):  # type: ignore[misc]
    """One for all attempts of a driver; mailbox: where it tells of them. each: what a worker needs (None: no spares).

    is_new: nothing of this run was trained before, so that a GPU that cannot be used is a mistake, and no loss.
    """

    def __init__(self, mailbox: Any, budgets: Budgets, each: dict[str, float] | None, is_new: bool = False) -> None:
        self._mailbox, self._budgets, self._each, self._is_new = mailbox, budgets, each, is_new
        self._reachability: ReachabilityMonitor | None = None
        self._group: Any = None
        self._number = 0
        self._is_over = True  # of this attempt: it has ended by itself, and what could be rescued is
        self._is_placing = False  # room was asked for, and not found yet
        self._needs: dict[str, float] = {}  # of a worker of the group that has started last
        self._used_by_others: dict[str, dict[str, float]] = {}  # when that group ended, by node
        self._iter: int | None = None
        self._back_off_s = 0.0

    def on_controller_start_worker_group(self, *, scaling_config: Any, num_workers: int) -> dict[str, str] | None:
        silent = unreachable_nodes(ray.nodes())  # Ray takes them for alive, and would place workers there
        kept_off = self._kept_off(num_workers, scaling_config._resources_per_worker_not_none, silent)
        if kept_off:
            names = [node["NodeManagerHostname"] for node in ray.nodes() if node["NodeID"] in kept_off]
            self._note("INFO", f"workers are kept off {', '.join(sorted(names))}: a GPU has failed there")
        avoided = silent | kept_off
        return {RAY_NODE_ID_KEY: f"!in({', '.join(sorted(avoided))})"} if avoided else None

    def before_worker_group_start(self, worker_group_context: Any) -> None:
        if self._back_off_s:
            self._note("INFO", f"waiting {self._back_off_s:.0f} s before the next attempt")
            time.sleep(self._back_off_s)
            self._back_off_s = 0.0
        if self._is_placing:
            self._note("INFO", f"still no room for {worker_group_context.num_workers} workers: waiting for machines")
        self._number += 1
        self._needs = worker_group_context.resources_per_worker
        self._tell("attempt_starting", num_workers=worker_group_context.num_workers)
        if self._number > 1 and not self._is_placing:
            _wait_for_places(worker_group_context.num_workers, worker_group_context.resources_per_worker)
        self._is_placing = True

    def refuse(self, workers: list[Any], faults: dict[int, str]) -> None:
        """End an attempt that has its places, before its process group is made; faults: of GPUs, by rank.

        Raises:
            ControllerError: with a mistake of the user's where nothing can have worked before, or RunAbandonedError, or
                with what makes Ray start the next group.
        """
        self._is_placing = False
        self._tell("attempt_placed", num_workers=len(workers))
        rank, fault = next(iter(faults.items()))
        node = workers[rank].metadata.hostname
        text = f"node {node}: Ray gives workers a GPU there, but {fault}"
        if self._number == 1 and (self._is_new or len(faults) == len(workers)):
            raise ControllerError(ConfigError(f"{text}. {_GPU_REMEDY}"))
        self._put_on_bench(workers, list(faults))
        ending = WorkerFailure(rank, Cause.GPU_FAULT, text, self._iter)
        self._tell("failure", cause=str(ending.cause), ranks=list(faults), node=node, text=text)
        try:
            self._charge(ending, node)
        except RunAbandonedError as given_up:
            raise ControllerError(given_up) from None
        self._tell("attempt_ended")
        raise ControllerError(WorkerGroupStartupFailedError(text))

    def after_worker_group_start(self, worker_group: Any) -> None:
        self._group, self._is_over, self._is_placing = worker_group, False, False
        self._tell("attempt_placed", num_workers=len(worker_group.get_workers()))
        used = {worker.metadata.node_id for worker in worker_group.get_workers()}
        self._reachability = ReachabilityMonitor(
            [node for node in ray.nodes() if node["NodeID"] in used], self._give_up_node
        )

    def after_worker_group_training_start(self, worker_group: Any) -> None:
        self._tell("attempt_running", num_workers=len(worker_group.get_workers()))
        if self._each:
            after_s = _SPARES_AFTER_S if self._number == 1 else _SPARES_AGAIN_S
            later = threading.Timer(after_s, spares.prestart, (worker_group, self._each))
            later.daemon = True
            later.start()

    def after_worker_group_poll_status(self, worker_group_status: Any) -> None:
        if worker_group_status.finished and not worker_group_status.errors:
            self._is_over = True
        if not worker_group_status.errors or self._is_over:
            return
        self._is_over = True
        try:
            errors = {rank: status.error for rank, status in worker_group_status.worker_statuses.items()}
            self._failed({rank: error for rank, error in errors.items() if error})
        except RunAbandonedError as given_up:
            raise ControllerError(given_up) from None
        except Exception:
            logger.exception("the end of an attempt could not be examined; it is restarted")

    def before_worker_group_shutdown(self, worker_group: Any) -> None:  # noqa: ARG002
        if self._reachability:
            self._reachability.close()
        if self._is_over:
            return
        self._is_over = True  # Ray ends a group that is well: another number of workers can run now
        try:
            seen_s = time.time()
            saved, _ = self._rescue(lost=set(), by_themselves=[])
            self._see_others(self._group.get_workers())
            self._tell(
                "failure", time=seen_s, cause="resized", ranks=[], text="the number of machines has changed", **saved
            )
        except Exception:
            logger.exception("the state could not be rescued before the group ends")

    def after_worker_group_shutdown(self, worker_group_context: Any) -> None:  # noqa: ARG002
        self._tell("attempt_ended")

    def _give_up_node(self, node_id: str) -> None:
        """End the workers of a node that does not answer, as far as Ray is concerned: it sees them gone then."""
        for worker in self._group.get_workers():
            if worker.metadata.node_id == node_id:
                self._note("WARNING", f"node {worker.metadata.hostname} does not answer: going on without it")
                ray.kill(worker.actor)

    def _failed(self, errors: dict[int, Exception]) -> None:
        seen_s = time.time()
        silent = unreachable_nodes(ray.nodes())
        workers = self._group.get_workers()
        gone = {rank for rank, worker in enumerate(workers) if worker.metadata.node_id in silent}
        for rank in gone:
            ray.kill(workers[rank].actor)  # or Ray would wait for it
        endings = [self._ending(rank, error) for rank, error in errors.items()]
        saved, deaths = self._rescue(lost=set(errors) | gone, by_themselves=endings)
        endings += [self._ending(rank, error) for rank, error in deaths.items()]  # perhaps what the others tell of
        endings += [WorkerFailure(rank, Cause.NODE_LOST, "its node does not answer", self._iter) for rank in gone]
        first = root_cause(endings)
        node = workers[first.rank].metadata.hostname
        self._tell(
            "failure",
            time=seen_s,
            cause=str(first.cause),
            ranks=sorted(errors.keys() | deaths.keys() | gone),
            node=node,
            text=first.text,
            traceback=first.traceback,
            **saved,
        )
        self._put_on_bench(workers, [ending.rank for ending in endings if ending.cause is Cause.GPU_FAULT])
        self._charge(first, node)

    def _put_on_bench(self, workers: list[Any], ranks: list[int]) -> None:
        """Keep workers off the nodes of these ranks."""
        for rank in ranks:
            CORDON.put(workers[rank].metadata.node_id)
        self._see_others(workers)

    def _see_others(self, workers: list[Any]) -> None:
        """Note what other programs use, while it is known what this group does."""
        if CORDON.has_any():
            ours = Counter(worker.metadata.node_id for worker in workers)
            free = cluster.available_resources_per_node()
            self._used_by_others = used_by_others(ray.nodes(), free, ours, self._needs)

    def _kept_off(self, num_workers: int, each: dict[str, float], silent: set[str]) -> set[str]:
        """Return the nodes whose GPUs have failed, as far as others have room for a group that is about to start."""
        if not CORDON.has_any():
            return set()
        nodes, leaving = ray.nodes(), silent | set(cluster.get_draining_nodes())
        return CORDON.kept_off(
            num_workers, lambda without: workers_that_fit(each, nodes, leaving | without, self._used_by_others)
        )

    def _charge(self, ending: WorkerFailure, node: str) -> None:
        self._back_off_s = self._budgets.charge(ending, self._iter)
        spent, limit = self._budgets.spent[ending.cause], self._budgets.limit_of(ending.cause)
        of = "" if limit < 0 else f" of {limit}"
        where = f"rank {ending.rank} on {node}"
        self._note("WARNING", f"attempt lost ({ending.cause}, {spent}{of}): {where}: {ending.text}")

    def _ending(self, rank: int, error: Exception) -> WorkerFailure:
        error = getattr(error, "_base_exc", error)  # of the train function, with its traceback as text
        if isinstance(error, AttemptFailedError):
            return WorkerFailure.from_json(error.ending)
        if isinstance(error, WorkerHealthCheckFailedError):
            error = error.health_check_failure
        text = _in_short(str(error))
        if isinstance(error, OutOfMemoryError):  # Ray's memory monitor has ended the process
            return WorkerFailure(rank, Cause.OUT_OF_MEMORY, text, self._iter)
        if isinstance(error, RayActorError):
            return WorkerFailure(rank, self._cause_of_death(rank, error, text), text, self._iter)
        return classify(error, rank, self._iter)

    def _cause_of_death(self, rank: int, error: RayActorError, text: str) -> Cause:
        if error.preempted:
            return Cause.PREEMPTED
        node_id = self._group.get_workers()[rank].metadata.node_id
        lives = any(node["Alive"] for node in ray.nodes() if node["NodeID"] == node_id)
        return Cause.WORKER_LOST if lives and "node died" not in text else Cause.NODE_LOST

    def _rescue(
        self, lost: set[int], by_themselves: list[WorkerFailure]
    ) -> tuple[dict[str, Any], dict[int, Exception]]:
        """Have the workers that live put their state into node memory, and wait for that; return what came of it.

        by_themselves: the ends of those that are lost; some have put their state there before.

        Returns ({reached_iter, reached_at_s: the iteration that is safe, and when it was completed (where any is),
        ...}, by rank the deaths of those that turn out not to live).
        """
        from orchestrator.worker.run import begin_rescue, end_rescue

        began_s = time.monotonic()
        workers = {rank: worker for rank, worker in enumerate(self._group.get_workers()) if rank not in lost}
        asked = {worker.execute_async(begin_rescue): rank for rank, worker in workers.items()}
        answered, mute = ray.wait(list(asked), num_returns=len(asked), timeout=_ANSWER_S) if asked else ([], [])
        deaths = {asked[answer]: death for answer in answered if (death := _death_of(answer))}
        begun = [workers[asked[answer]] for answer in answered if asked[answer] not in deaths]
        waited = [worker.execute_async(end_rescue) for worker in begun]
        done, _ = ray.wait(waited, num_returns=len(waited), timeout=_RESCUE_S) if waited else ([], [])
        for answer in mute:
            ray.kill(workers[asked[answer]].actor)  # it stands still, and Ray would wait for it to leave
        answers = [*map(_value, done), *((ending.iter_num, ending.reached_at_s) for ending in by_themselves)]
        safe = [(iter_num, at_s) for iter_num, at_s in answers if iter_num is not None and at_s is not None]
        saved: dict[str, Any] = {"rescue_s": time.monotonic() - began_s, "ranks_rescued": len(safe)}
        if safe:
            self._iter, reached_at_s = max(safe)
            saved |= {"reached_iter": self._iter, "reached_at_s": reached_at_s}
        return saved, deaths

    def _tell(self, kind: str, **values: Any) -> None:
        tell_on(self._mailbox, kind, **{"number": self._number, **values})

    def _note(self, level: str, text: str) -> None:
        note_on(self._mailbox, text, level)


def _wait_for_places(num_workers: int, each: dict[str, float]) -> None:
    """Wait a moment until the head knows that the places of the group before are free.

    A placement group that is asked for before that is looked at again at Ray's next tick only, up to a second later.
    """
    deadline_s = time.monotonic() + _PLACES_S
    with suppress(Exception):  # a head that does not answer: whoever asks it next will say so
        while time.monotonic() < deadline_s:
            free = ray.available_resources()
            if all(free.get(resource, 0.0) >= num_workers * amount for resource, amount in each.items()):
                return
            time.sleep(0.02)


def _in_short(text: str) -> str:
    """Return what Ray says of a death without the actor's ids and what it guesses."""
    text = " ".join(text.split()).partition(" Some common causes")[0]
    return text[max(0, text.find("The actor is dead because")) :][:500]


def _death_of(answer: Any) -> Exception | None:
    """Return why nobody answers any more, None where somebody has."""
    try:
        ray.get(answer)
    except (RayActorError, OutOfMemoryError) as error:
        return cast(Exception, error)
    except ray.exceptions.RayError:  # it lives, and could not do it
        return None
    return None


def _value(answer: Any) -> tuple[int | None, float | None]:
    try:
        return ray.get(answer)  # type: ignore[no-any-return]
    except ray.exceptions.RayError:
        return (None, None)
