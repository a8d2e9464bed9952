"""GPU check: before a group makes its process group, each of its workers tries whether it can use its GPU.

Without it NCCL fails inside Ray's own part of the start, which Ray takes for a failure of its controller.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import RayTaskError
from ray.train.v2._internal.execution.callback import WorkerGroupCallback

from orchestrator.controller.attempts import AttemptMonitor

_ANSWER_S = 120.0  # CUDA starts in seconds, and imports take some more where workers are cold


def fault_of_worker() -> str:
    """Return why this worker cannot use the GPUs that Ray gave it, "" where it can."""
    from orchestrator.host.gpus import fault_here

    return fault_here([str(each) for each in ray.get_gpu_ids()])


def _answer(answer: Any) -> str:
    try:
        return str(ray.get(answer))
    except RayTaskError as error:  # such as a PyTorch that cannot be imported
        return f"nobody can tell: {str(error.cause).strip()}"


class GpuCheck(WorkerGroupCallback):  # type: ignore[misc]
    """One for all attempts. It comes after Ray's own callbacks, which first give the workers their GPUs.

    ask: runs on each worker; returns why that cannot use its GPU, "" where it can.
    """

    def __init__(self, monitor: AttemptMonitor, ask: Callable[[], str] = fault_of_worker) -> None:
        self._monitor, self._ask = monitor, ask

    def before_init_train_context(self, workers: list[Any]) -> dict[str, list[Any]]:
        """Ask all workers, and refuse the group if one cannot use its GPU.

        Raises:
            ControllerError: as the monitor decides.
        """
        asked = {worker.execute_async(self._ask): rank for rank, worker in enumerate(workers)}
        answered, mute = ray.wait(list(asked), num_returns=len(asked), timeout=_ANSWER_S)
        answers = {asked[answer]: _answer(answer) for answer in answered}
        answers |= {asked[answer]: f"CUDA did not answer within {_ANSWER_S:.0f} s" for answer in mute}
        if faults := {rank: fault for rank, fault in sorted(answers.items()) if fault}:
            self._monitor.refuse(workers, faults)
        return {}
