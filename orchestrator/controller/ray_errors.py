"""What Ray's errors mean: the failure of a rank, in the words of `worker/failure.py`."""

from __future__ import annotations

import ray
from ray.exceptions import OutOfMemoryError, RayActorError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

from orchestrator.worker.failure import AttemptFailedError, Cause, WorkerFailure, classify


def failure_of(error: Exception, rank: int, node_id: str, iter_num: int | None) -> WorkerFailure:
    """Return why a rank failed; iter_num: the last iteration that is known of it."""
    error = getattr(error, "_base_exc", error)  # of the train function, with its traceback as text
    if isinstance(error, AttemptFailedError):
        return error.failure
    if isinstance(error, WorkerHealthCheckFailedError):
        error = error.health_check_failure
    if isinstance(error, OutOfMemoryError):  # Ray's memory monitor has ended the process
        return WorkerFailure(rank, Cause.OUT_OF_MEMORY, _in_short(str(error)), iter_num)
    if isinstance(error, RayActorError):
        cause = _cause_of_death(error, node_id)
        return WorkerFailure(rank, cause, _text_of_death(cause, str(error)), iter_num)
    return classify(error, rank, iter_num)


def _cause_of_death(error: RayActorError, node_id: str) -> Cause:
    if error.preempted:
        return Cause.PREEMPTED
    is_alive = any(node["Alive"] for node in ray.nodes() if node["NodeID"] == node_id)
    return Cause.WORKER_LOST if is_alive and "node died" not in str(error) else Cause.NODE_LOST


def _text_of_death(cause: Cause, text: str) -> str:
    """Return our words for the two deaths that we expect; for any other, Ray's."""
    if cause is Cause.NODE_LOST:
        return "its node is gone"
    if cause is Cause.WORKER_LOST and "connection error code 2" in text:  # Ray saw the connection close, and no more
        return "its process was killed or has crashed"
    return _in_short(text)


def _in_short(text: str) -> str:
    """Return Ray's words about a death without the actor's ids and without guesses."""
    text = " ".join(text.split()).partition(" Some common causes")[0]
    return text[max(0, text.find("The actor is dead because")) :][:500]
