"""Why a worker failed: the causes, and how an exception of the training loop is classified. Knows no Ray."""

from __future__ import annotations

import traceback
from dataclasses import dataclass
from enum import StrEnum

import torch
import torch.distributed as dist

from orchestrator.errors import StorageError, StorageUnavailableError


class Cause(StrEnum):
    """In the order in which one explains the others: a node is lost, so its peers' collectives fail."""

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


# Errors of CUDA, its libraries, NCCL and compiled kernels have hardly any types of their own: their words decide.
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
    """How one rank failed: the cause, in words, and the iteration that it was in (None: not known).

    reached_at_s: when that iteration was completed (seconds since 1970), if its state is safe; else None.
    """

    rank: int
    cause: Cause
    text: str
    iter_num: int | None = None
    traceback: str = ""
    reached_at_s: float | None = None


class AttemptFailedError(Exception):
    """A worker raises this, so that the controller learns why its attempt has failed."""

    def __init__(self, failure: WorkerFailure) -> None:
        super().__init__(failure)
        self.failure = failure

    def __str__(self) -> str:
        return f"{self.failure.cause}: {self.failure.text}\n{self.failure.traceback}".strip()


def classify(error: BaseException, rank: int, iter_num: int | None, reached_at_s: float | None = None) -> WorkerFailure:
    """Classify an exception of the training loop."""
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
    """Return the cause of a GPU's error, None for any other error."""
    text = str(error)
    if not (isinstance(error, torch.AcceleratorError) or any(words in text for words in _OF_A_GPU)):
        return None
    if any(words in text for words in _NO_MEMORY):
        return Cause.OUT_OF_MEMORY
    return Cause.USER_ERROR if any(words in text for words in _OF_A_PROGRAM) else Cause.GPU_FAULT
