"""What is relied on, of Ray's that is not public, for GPUs: where one of these fails, read `gpu_check.py` again."""

from __future__ import annotations

import inspect
import os
import pickle

import pytest
import torch.distributed as dist
from ray.train import ControllerError, FailureConfig
from ray.train.torch.config import _setup_torch_process_group
from ray.train.v2._internal.callbacks import AcceleratorSetupCallback, BackendSetupCallback
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError
from ray.train.v2._internal.execution.callback import ExecutionGroupCallback
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2._internal.execution.failure_handling.default import DefaultFailurePolicy
from ray.train.v2._internal.execution.worker_group import WorkerGroup
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from orchestrator.config import TrainConfig
from orchestrator.controller.gpu_check import GpuCheck
from orchestrator.driver.trainer import _backend
from orchestrator.errors import ConfigError
from orchestrator.worker.environment import DEFAULTS


def test_gpus_are_checked_once_workers_know_theirs_and_before_the_process_group() -> None:
    hook = "before_init_train_context"
    assert {hook} <= vars(GpuCheck).keys() & vars(AcceleratorSetupCallback).keys() & vars(ExecutionGroupCallback).keys()
    source = inspect.getsource(WorkerGroup._start_impl)
    assert 0 < source.index("self._init_train_context(") < source.index("callback.after_worker_group_start(self)")
    assert f"cb.{hook}(workers)" in inspect.getsource(WorkerGroup._init_train_context)
    assert "after_execution_group_start" in vars(BackendSetupCallback)
    order = inspect.getsource(DataParallelTrainer._create_default_callbacks)
    assert order.index("AcceleratorSetupCallback(") < order.index("callbacks.extend(")


def test_a_group_that_is_refused_is_started_again_or_not_as_its_error_says() -> None:
    policy = DefaultFailurePolicy(FailureConfig(max_failures=-1, max_preemption_failures=-1))
    again, never = ControllerError(WorkerGroupStartupFailedError("a GPU")), ControllerError(ConfigError("a GPU"))
    assert policy.make_decision(again) is FailureDecision.RETRY
    assert policy.make_decision(never) is FailureDecision.RAISE
    assert isinstance(pickle.loads(pickle.dumps(never)).controller_failure, ConfigError)


@pytest.mark.parametrize(("given", "expected"), [(DEFAULTS, "0"), ({}, "1")])
def test_ray_leaves_nccls_own_guard_as_it_finds_it(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], expected: str
) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TORCH_NCCL_")}
    monkeypatch.setattr(os, "environ", {**environment, **given})
    monkeypatch.setattr(dist, "init_process_group", lambda **_options: None)
    _setup_torch_process_group("cpu:gloo,cuda:nccl", 0, 2, "env://")
    assert os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == expected


@pytest.mark.parametrize(
    ("settings", "gpus", "expected"),
    [
        ({"device": "cuda"}, 1.0, "cpu:gloo,cuda:nccl"),
        ({"device": "cuda", "backend": "gloo"}, 1.0, "gloo"),
        ({"device": "cuda"}, 0.5, "gloo"),  # NCCL takes no two ranks on one GPU
        ({"device": "cuda"}, None, "gloo"),
        ({"device": "cpu"}, 1.0, "gloo"),
    ],
)
def test_nccl_is_for_workers_that_have_a_gpu_each(settings: dict[str, str], gpus: float | None, expected: str) -> None:
    each = {"CPU": 1.0} | ({"GPU": gpus} if gpus else {})
    assert _backend(TrainConfig(**settings), each) == expected
