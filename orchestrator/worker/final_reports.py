"""How a thread beside training tells Ray's controller why it ends.

The controller polls every worker for the error of its training function, and takes for that what other threads put
into a queue of the worker's: Ray Train does so when an upload fails behind. The word and the failure are one thing
then, so that neither comes without the other, nor is charged to another attempt. How the queue is reached is not
public; a test pins it.
"""

from __future__ import annotations

from collections.abc import Callable

from ray.train.v2._internal.exceptions import UserExceptionWithTraceback
from ray.train.v2._internal.execution.context import get_train_context

from orchestrator.worker.failure import AttemptFailedError, WorkerFailure


def failure_reporter() -> Callable[[WorkerFailure], None]:
    """Return what any thread of this worker calls to fail it; to be called by the one that trains."""
    queue = get_train_context().execution_context.training_thread_runner.get_exception_queue()

    def say(ending: WorkerFailure) -> None:
        queue.put(UserExceptionWithTraceback(AttemptFailedError(ending.to_json()), traceback_str=ending.text))

    return say
