from __future__ import annotations

import pickle

import pytest
import torch

from orchestrator.controller.budgets import Budgets, RunAbandonedError, root_cause
from orchestrator.errors import StorageError, StorageUnavailableError
from orchestrator.worker.failure import AttemptFailedError, Cause, WorkerFailure, classify


def lost(
    cause: Cause = Cause.WORKER_LOST, rank: int = 0, text: str = "gone", iter_num: int | None = 7
) -> WorkerFailure:
    return WorkerFailure(rank, cause, text, iter_num)


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (
            RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer"),
            "peer_lost",
        ),
        (torch.distributed.DistNetworkError("reset"), "peer_lost"),
        (MemoryError(), "out_of_memory"),
        (StorageError("down"), "storage"),
        (StorageUnavailableError("no answer"), "storage"),
        (RuntimeError("shapes do not match"), "user_error"),
        (torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered"), "gpu_fault"),
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), "gpu_fault"),
        (torch.AcceleratorError("CUDA error: uncorrectable NVLink error detected during the execution"), "gpu_fault"),
        (torch.AcceleratorError("CUDA error: unspecified launch failure"), "gpu_fault"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx(...)`"), "gpu_fault"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR"), "gpu_fault"),
        (RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"), "gpu_fault"),
        (
            torch.distributed.DistBackendError("NCCL error in: x.cpp:1, unhandled cuda error (run with ...)"),
            "gpu_fault",
        ),
        (torch.distributed.DistBackendError("NCCL error in: x.cpp:1, remote process exited"), "peer_lost"),
        (RuntimeError("DistBackendError: NCCL error in: x.cpp:1, remote process exited"), "peer_lost"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), "out_of_memory"),
        (torch.AcceleratorError("CUDA error: out of memory"), "out_of_memory"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "out_of_memory"),
        (torch.AcceleratorError("CUDA error: device-side assert triggered"), "user_error"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_INVALID_VALUE when calling `cublasGemmEx(...)`"), "user_error"),
        (ZeroDivisionError("x"), "user_error"),
    ],
)
def test_an_exception_has_a_cause(error: Exception, cause: str) -> None:
    assert classify(error, 0, 3).cause == cause


def test_what_explains_the_others_is_told() -> None:
    assert root_cause([lost(Cause.PEER_LOST, 0), lost(Cause.NODE_LOST, 2), lost(Cause.WORKER_LOST, 1)]).rank == 2
    assert root_cause([lost(Cause.PEER_LOST, 1)]).cause is Cause.WORKER_LOST
    assert root_cause([lost(rank=2), lost(rank=1)]).rank == 1


def test_an_ending_survives_its_way_to_the_controller() -> None:
    ending = classify(ValueError("nan in batch 3"), 2, 5)
    back = pickle.loads(pickle.dumps(AttemptFailedError(ending)))
    assert back.failure == ending
    assert "ValueError: nan in batch 3" in str(back)


def test_a_budget_is_full_again_after_progress() -> None:
    budgets = Budgets(max_failures=2, max_preemptions=-1, refill_iters=10)
    for iter_num in (5, 6, 16, 17, 27):
        budgets.charge(lost(), iter_num)
    budgets.charge(lost(), 27)
    with pytest.raises(RunAbandonedError, match=r"worker_lost: 3 times within 10 iterations.*max_failures"):
        budgets.charge(lost(), 28)


def test_causes_have_budgets_of_their_own() -> None:
    budgets = Budgets(max_failures=1, max_preemptions=-1, refill_iters=10)
    for _ in range(20):
        budgets.charge(lost(Cause.PREEMPTED), 5)
    budgets.charge(lost(Cause.WORKER_LOST), 5)
    budgets.charge(lost(Cause.NODE_LOST), 5)
    with pytest.raises(RunAbandonedError):
        budgets.charge(lost(Cause.NODE_LOST), 5)


def test_no_limit_is_no_limit() -> None:
    budgets = Budgets(max_failures=-1, max_preemptions=-1, refill_iters=10)
    for _ in range(50):
        budgets.charge(lost(Cause.HANG), None)


def test_the_same_bug_at_the_same_place_stops_the_run_with_its_traceback() -> None:
    budgets = Budgets(max_failures=8, max_preemptions=-1, refill_iters=10)
    bug = WorkerFailure(1, Cause.USER_ERROR, "ValueError: x", 9, "Traceback: train.py, line 3")
    budgets.charge(bug, 9)
    with pytest.raises(RunAbandonedError, match=r"(?s)same iteration \(9\), twice.*line 3"):
        budgets.charge(bug, 9)


def test_a_bug_that_has_silenced_its_gpu_is_where_the_others_are() -> None:
    budgets = Budgets(max_failures=8, max_preemptions=-1, refill_iters=10)
    bug = WorkerFailure(
        1, Cause.USER_ERROR, "AcceleratorError: CUDA error: device-side assert triggered", None, "its trace"
    )
    budgets.charge(bug, 9)
    budgets.charge(bug, 700)
    with pytest.raises(RunAbandonedError, match=r"same iteration \(700\), twice"):
        budgets.charge(bug, 700)


def test_faults_of_gpus_have_a_budget_of_their_own() -> None:
    budgets = Budgets(max_failures=8, max_preemptions=-1, refill_iters=10)
    for _ in range(3):
        budgets.charge(lost(Cause.GPU_FAULT), 5)
        budgets.charge(lost(Cause.WORKER_LOST), 5)
    with pytest.raises(RunAbandonedError, match=r"(?s)gpu_fault: 4 times.*budget is 3"):
        budgets.charge(lost(Cause.GPU_FAULT), 5)


def test_a_fault_of_a_gpu_explains_that_its_peers_have_lost_somebody() -> None:
    assert root_cause([lost(Cause.PEER_LOST, 0), lost(Cause.GPU_FAULT, 1)]).cause is Cause.GPU_FAULT


def test_another_bug_or_another_place_may_pass() -> None:
    budgets = Budgets(max_failures=8, max_preemptions=-1, refill_iters=10)
    for text, iter_num in (("a", 1), ("b", 1), ("b", 2), ("a", 2)):
        budgets.charge(lost(Cause.USER_ERROR, text=text, iter_num=iter_num), iter_num)


def test_what_fails_at_once_again_waits_longer_each_time() -> None:
    budgets = Budgets(max_failures=-1, max_preemptions=-1, refill_iters=10)
    waits = [budgets.charge(lost(), 3) for _ in range(9)]
    assert waits == [0, 1, 2, 4, 8, 16, 32, 60, 60]
