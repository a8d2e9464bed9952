"""How a thread beside training tells Ray's controller why it ends.

The controller polls every worker for the error of its training function. It also takes the errors that other threads
put into a queue of the worker's; Ray Train itself does so when an upload fails in the background. So the worker's
failure and its reason arrive as one, and are charged to the right attempt. The way to that queue is not public: a test
pins it.
"""

from __future__ import annotations

from collections.abc import Callable

from ray.train.v2._internal.exceptions import UserExceptionWithTraceback
from ray.train.v2._internal.execution.context import get_train_context

from orchestrator.worker.failure import AttemptFailedError, WorkerFailure


def failure_reporter() -> Callable[[WorkerFailure], None]:
    """Return a function by which any thread of this worker fails it. Call this from the thread that trains."""
    queue = get_train_context().execution_context.training_thread_runner.get_exception_queue()

    def report(failure: WorkerFailure) -> None:
        queue.put(UserExceptionWithTraceback(AttemptFailedError(failure), traceback_str=failure.text))

    return report
