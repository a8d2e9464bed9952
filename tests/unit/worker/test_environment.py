from __future__ import annotations

import logging

import pytest

from orchestrator.config import TrainConfig
from orchestrator.worker.environment import DEFAULTS, log_passed_variables, passed_on, variables_of
from orchestrator.worker.run import on_what_is_given


def test_what_is_meant_for_the_processes_that_train_reaches_them() -> None:
    theirs = {
        "NCCL_DEBUG": "INFO",
        "NCCL_IB_HCA": "mlx5",
        "GLOO_DEVICE_TRANSPORT": "TCP",
        "TORCH_LOGS": "recompiles",
        "TORCHINDUCTOR_CACHE_DIR": "/scratch/inductor",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "CUDA_LAUNCH_BLOCKING": "1",
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "MLFLOW_TRACKING_URI": "https://mlflow.example",
    }
    assert passed_on({**theirs, "PATH": "/bin", "HOME": "/root", "MY_NCCL_DEBUG": "x"}) == theirs


@pytest.mark.parametrize(
    "name",
    [
        "CUDA_VISIBLE_DEVICES",
        "CUDA_HOME",
        "CUDA_PATH",
        "CUDA_PATH_V12_4",
        "CUDA_MPS_PIPE_DIRECTORY",
        "NCCL_SOCKET_IFNAME",
        "NCCL_OOB_NET_IFNAME",
        "GLOO_SOCKET_IFNAME",
        "NCCL_HOSTID",
        "TORCH_HOME",
        "TORCH_EXTENSIONS_DIR",
        "TORCHELASTIC_RUN_ID",
        "TORCHINDUCTOR_FX_GRAPH_REMOTE_CACHE",
        "TORCHINDUCTOR_REDIS_URL",
        "PYTORCH_HUB_TOKEN",
        "GLOO_SECRET_KEY",
        "MLFLOW_TRACKING_PASSWORD",
        "MLFLOW_TRACKING_TOKEN",
    ],
)
def test_what_belongs_to_one_machine_or_to_nobody_else_stays(name: str) -> None:
    assert passed_on({name: "x"}) == {}


def test_a_password_in_a_url_stays() -> None:
    assert passed_on({"MLFLOW_TRACKING_URI": "https://me:hush@mlflow.example"}) == {}


def test_bytes_that_are_no_text_end_no_run() -> None:
    assert passed_on({"NCCL_DEBUG_FILE": "/tmp/\udcff"}) == {}


def test_nobody_but_us_ends_collectives_unless_the_user_says_so() -> None:
    assert variables_of({}) == DEFAULTS
    assert DEFAULTS["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "0"
    wanted = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "3", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    assert variables_of(wanted) == {**DEFAULTS, **wanted}


def test_what_is_passed_on_is_told(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    log_passed_variables({"PATH": "/bin", "CUDA_HOME": "/usr/local/cuda"})
    assert not caplog.records
    log_passed_variables({"TORCH_LOGS": "dynamo", "NCCL_DEBUG": "INFO"})
    assert [r.getMessage() for r in caplog.records] == [
        "workers are started with this environment's NCCL_DEBUG=INFO, TORCH_LOGS=dynamo"
    ]


def test_a_worker_without_a_gpu_uses_none_that_it_sees() -> None:
    config = TrainConfig(device="cuda")
    assert on_what_is_given(config, []).device == "cpu"
    assert on_what_is_given(config, [0]).device == "cuda"
