"""Why an attempt ended, and whether another one is worth starting. Knows no Ray.

Every cause has a budget of its own, which is full again as soon as training has come a checkpoint further: a run on
machines that come and go for weeks never runs out, one that gets nowhere stops soon.
"""

from __future__ import annotations

import traceback
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

import torch
import torch.distributed as dist

from orchestrator.errors import StorageError, StorageUnavailableError


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
class WorkerFailure:
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
    def from_json(cls, value: dict[str, Any]) -> WorkerFailure:
        return cls(**{**value, "cause": Cause(value["cause"])})


class AttemptFailedError(Exception):
    """What a worker raises, so that the controller learns why: the JSON of its Ending."""

    def __init__(self, ending: dict[str, Any]) -> None:
        super().__init__(ending)
        self.ending = ending

    def __str__(self) -> str:
        return f"{self.ending['cause']}: {self.ending['text']}\n{self.ending['traceback']}".strip()


def classify(error: BaseException, rank: int, iter_num: int | None, reached_at_s: float | None = None) -> WorkerFailure:
    """Return what an exception in the training loop means."""
    text = f"{type(error).__name__}: {str(error).strip()[:500]}"
    trace = "".join(traceback.format_exception(error))
    return WorkerFailure(rank, _cause_of(error), text, iter_num, trace, reached_at_s)


def _cause_of(error: BaseException) -> Cause:
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return Cause.OUT_OF_MEMORY
    if isinstance(error, (StorageError, StorageUnavailableError)):
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
