"""Why an attempt ended, and whether another one is worth starting. Knows no Ray.

Every cause has a budget of its own, which is full again as soon as training has come a checkpoint further: a run on
machines that come and go for weeks never runs out, one that gets nowhere stops soon.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from typing import Any

import torch
import torch.distributed as dist

from orchestrator.errors import StorageError, UnreadableError


class Cause(StrEnum):
    """In the order in which one explains the others: a lost node, and not that its peers' collectives failed."""

    PREEMPTED = "preempted"
    OUT_OF_MEMORY = "out_of_memory"
    NODE_LOST = "node_lost"
    GPU_FAULT = "gpu_fault"
    STORAGE = "storage"
    USER_ERROR = "user_error"
    WORKER_LOST = "worker_lost"
    HANG = "hang"
    PEER_LOST = "peer_lost"  # a collective failed, and nobody knows more
    UNKNOWN = "unknown"


_LIMITS = {
    Cause.OUT_OF_MEMORY: 3,
    Cause.HANG: 3,
    Cause.GPU_FAULT: 3,
}  # in a row without progress; of the others, max_failures
_FIRST_BACK_OFF_S, _LONGEST_BACK_OFF_S = 1.0, 60.0

# What CUDA, its libraries, NCCL and compiled kernels fail with has hardly any types: their words decide.
_OF_A_GPU = (
    "CUDA error",
    "CUDA driver error",
    "HIP error",
    "CUBLAS_STATUS_",
    "cuDNN error",
    "CUDNN_STATUS_",
    "Triton Error [CUDA]",
    "unhandled cuda error",  # NCCL's
    "ncclUnhandledCudaError",
)
_OF_A_PEER = ("gloo", "DistBackendError", "NCCL error", "NCCL communicator was aborted")  # out of a future: no type
_NO_MEMORY = ("out of memory", "STATUS_ALLOC_FAILED")
# of a program, which every GPU answers alike: a token beyond the vocabulary is a device-side assert
_OF_A_PROGRAM = (
    "device-side assert",
    "invalid argument",
    "invalid configuration",
    "invalid device",
    "invalid resource handle",
    "no kernel image",
    "STATUS_INVALID_VALUE",
    "STATUS_BAD_PARAM",
    "STATUS_NOT_SUPPORTED",
)


@dataclass(frozen=True)
class Ending:
    """How one rank ended: the cause, in words, and the iteration that it was in (None: not known).

    reached_at_s: where the state of that iteration is safe, when it was completed (seconds since 1970).
    """

    rank: int
    cause: Cause
    text: str
    iter_num: int | None = None
    traceback: str = ""
    reached_at_s: float | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Ending:
        return cls(**{**value, "cause": Cause(value["cause"])})


class AttemptFailedError(Exception):
    """What a worker raises, so that the controller learns why: the JSON of its Ending."""

    def __init__(self, ending: dict[str, Any]) -> None:
        super().__init__(ending)
        self.ending = ending

    def __str__(self) -> str:
        return f"{self.ending['cause']}: {self.ending['text']}\n{self.ending['traceback']}".strip()


class GivenUpError(Exception):
    """The run is not restarted any more; the message says why and what to do."""


def ending_of(error: BaseException, rank: int, iter_num: int | None, reached_at_s: float | None = None) -> Ending:
    """Return what an exception in the training loop means."""
    text = f"{type(error).__name__}: {str(error).strip()[:500]}"
    trace = "".join(traceback.format_exception(error))
    return Ending(rank, _cause_of(error), text, iter_num, trace, reached_at_s)


def _cause_of(error: BaseException) -> Cause:
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return Cause.OUT_OF_MEMORY
    if isinstance(error, (StorageError, UnreadableError)):
        return Cause.STORAGE
    if isinstance(error, RuntimeError) and (cause := _cause_on_gpu(error)):
        return cause
    if isinstance(error, dist.DistError):
        return Cause.PEER_LOST
    if isinstance(error, RuntimeError) and any(words in str(error) for words in _OF_A_PEER):
        return Cause.PEER_LOST
    return Cause.USER_ERROR


def _cause_on_gpu(error: RuntimeError) -> Cause | None:
    """Return what an error that a GPU has told of means, None where it is none."""
    text = str(error)
    if not (isinstance(error, torch.AcceleratorError) or any(words in text for words in _OF_A_GPU)):
        return None
    if any(words in text for words in _NO_MEMORY):
        return Cause.OUT_OF_MEMORY
    return Cause.USER_ERROR if any(words in text for words in _OF_A_PROGRAM) else Cause.GPU_FAULT


def explain(endings: Iterable[Ending]) -> Ending:
    """Return the ending that explains the others: by its cause, then the lowest rank's."""
    order = list(Cause)
    first = min(endings, key=lambda ending: (order.index(ending.cause), ending.rank))
    if first.cause is Cause.PEER_LOST:  # whose process is gone: a connection does not break by itself
        return replace(first, cause=Cause.WORKER_LOST)
    return first


@dataclass
class Budgets:
    """What has been spent.

    max_failures: in a row without progress, for each cause; -1 = no limit. max_preemptions: the same, of machines that
    were taken away with notice.
    refill_iters: iterations that count as progress.
    """

    max_failures: int
    max_preemptions: int
    refill_iters: int
    spent: dict[Cause, int] = field(default_factory=dict)
    at_iter: dict[Cause, int] = field(default_factory=dict)
    last_bug: tuple[str, int | None] | None = None

    def charge(self, ending: Ending, iter_num: int | None) -> float:
        """Charge an ending to its cause's budget; iter_num: how far training has come. Return the seconds to wait.

        Raises:
            GivenUpError: the budget is used up, or a bug of the user's has shown twice at the same place.
        """
        cause = ending.cause
        if cause is Cause.USER_ERROR:
            # who cannot tell, for its GPU answers no more, was as far as the others
            bug = (ending.text, ending.iter_num if ending.iter_num is not None else iter_num)
            if bug == self.last_bug:
                raise GivenUpError(
                    f"the same error at the same iteration ({bug[1]}), twice: it would come again. "
                    f"Rank {ending.rank}:\n{ending.traceback}"
                )
            self.last_bug = bug
        reached = iter_num if iter_num is not None else -1
        if cause not in self.at_iter or reached >= self.at_iter[cause] + self.refill_iters:
            self.spent[cause], self.at_iter[cause] = 0, reached
        self.spent[cause] += 1
        limit = self.limit_of(cause)
        if 0 <= limit < self.spent[cause]:
            raise GivenUpError(
                f"{cause}: {self.spent[cause]} times within {self.refill_iters} iterations, and the budget is "
                f"{limit} (--{'max_preemptions' if cause is Cause.PREEMPTED else 'max_failures'}). The last one, on "
                f"rank {ending.rank}: {ending.text}\n{ending.traceback}".rstrip()
            )
        return self._back_off_s(cause)

    def limit_of(self, cause: Cause) -> int:
        """Return how often a cause may end an attempt without progress in between; -1 = no limit."""
        if cause is Cause.PREEMPTED:
            return self.max_preemptions
        if self.max_failures < 0:
            return -1
        return min(self.max_failures, _LIMITS.get(cause, self.max_failures))

    def _back_off_s(self, cause: Cause) -> float:
        """Return 0 for the first time, then twice as long each time: what fails at once may need a moment."""
        if cause is Cause.PREEMPTED or self.spent[cause] == 1:
            return 0.0
        return float(min(_LONGEST_BACK_OFF_S, _FIRST_BACK_OFF_S * 2 ** (self.spent[cause] - 2)))
