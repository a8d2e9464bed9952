"""Group rescue: the workers of a group that live put their state into node memory before the group ends."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import ray
from ray.exceptions import OutOfMemoryError, RayActorError, RayError

from orchestrator.worker import rescue
from orchestrator.worker.failure import WorkerFailure

_ANSWER_S = 2.0  # in which a worker that lives begins to rescue its state
_RESCUE_S = 60.0  # in which it is done


@dataclass(frozen=True)
class GroupRescue:
    """The outcome of a rescue.

    iter_num: the iteration that is safe; reached_at_s: when it was completed (seconds since 1970); None if none is.
    deaths: by rank, the errors of workers that had died before we asked them.
    """

    iter_num: int | None
    reached_at_s: float | None
    ranks_rescued: int
    seconds: float
    deaths: dict[int, Exception]


def rescue_group(workers: list[Any], lost: set[int], failures: Iterable[WorkerFailure]) -> GroupRescue:
    """Have the workers of a group rescue their state, and wait for them.

    lost: ranks that are not asked.
    failures: of the lost ranks; some have put their state into node memory before they ended.
    """
    began_s = time.monotonic()
    asked = {worker.execute_async(rescue.begin_rescue): rank for rank, worker in enumerate(workers) if rank not in lost}
    answered, mute = ray.wait(list(asked), num_returns=len(asked), timeout=_ANSWER_S) if asked else ([], [])
    deaths = {asked[answer]: death for answer in answered if (death := _death_of(answer))}
    begun = [workers[asked[answer]] for answer in answered if asked[answer] not in deaths]
    ends = [worker.execute_async(rescue.end_rescue) for worker in begun]
    done, _ = ray.wait(ends, num_returns=len(ends), timeout=_RESCUE_S) if ends else ([], [])
    for answer in mute:
        ray.kill(workers[asked[answer]].actor)  # it stands still, and Ray would wait for it to leave
    reached = [*map(_reached, done), *((failure.iter_num, failure.reached_at_s) for failure in failures)]
    safe = [(iter_num, at_s) for iter_num, at_s in reached if iter_num is not None and at_s is not None]
    iter_num, reached_at_s = max(safe) if safe else (None, None)
    return GroupRescue(iter_num, reached_at_s, len(safe), time.monotonic() - began_s, deaths)


def _death_of(answer: Any) -> Exception | None:
    """Return why a worker does not answer any more, None if it has answered."""
    try:
        ray.get(answer)
    except (RayActorError, OutOfMemoryError) as error:
        return cast(Exception, error)
    except RayError:  # it lives, and could not do it
        return None
    return None


def _reached(answer: Any) -> tuple[int | None, float | None]:
    try:
        return ray.get(answer)  # type: ignore[no-any-return]
    except RayError:
        return (None, None)
