"""A worker's GPU before training, on a CUDA that is faked."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from orchestrator.config import TrainConfig
from orchestrator.host.gpus import fault_here, has_kernels_for, wait_until_free
from orchestrator.worker import run as worker

GB = 10**9
OLD_DRIVER = "CUDA initialization: The NVIDIA driver on your system is too old (found version 12040)."


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA sees two of the GPUs that the node says it has."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _place: "Tesla K80")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda place: [(8, 9), (3, 7)][place])
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80", "sm_90"])


@pytest.mark.usefixtures("two_gpus")
def test_a_gpu_that_can_be_used_is_no_fault() -> None:
    assert fault_here(["4"]) == ""


@pytest.mark.usefixtures("two_gpus")
def test_a_gpu_that_cuda_does_not_see_is_one() -> None:
    assert fault_here(["6"]) == "CUDA sees 2 of the GPUs 4,5,6,7, and not GPU 6"
    assert fault_here(["9"]) == "CUDA sees 2 of the GPUs 4,5,6,7, and not GPU 9"


@pytest.mark.usefixtures("two_gpus")
def test_a_gpu_that_pytorch_was_not_built_for_is_one() -> None:
    assert "has no kernels for this Tesla K80 (sm_37)" in fault_here(["5"])


@pytest.mark.usefixtures("two_gpus")
def test_a_gpu_that_answers_with_an_error_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_place: int) -> tuple[int, int]:
        raise torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered\nmore")

    monkeypatch.setattr(torch.cuda, "get_device_capability", broken)
    assert fault_here(["4"]).endswith("cannot use it: CUDA error: uncorrectable ECC error encountered")


def test_what_pytorch_warns_of_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(warnings.warn(OLD_DRIVER, stacklevel=1)))
    assert fault_here(["0"]) == f"PyTorch {torch.__version__} finds none: {OLD_DRIVER}"


def test_without_a_warning_pytorch_is_asked_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def init() -> None:
        raise AssertionError("Torch not compiled with CUDA enabled")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", init)
    assert fault_here(["0"]).endswith("finds none: Torch not compiled with CUDA enabled")


@pytest.mark.parametrize(
    ("capability", "runs"),
    [
        ((8, 0), True),
        ((8, 9), True),
        ((7, 0), False),
        ((9, 0), True),
        ((10, 3), True),
        ((12, 0), True),
        ((6, 1), False),
    ],
)
def test_machine_code_is_for_one_generation_and_the_rest_is_translated(capability: tuple[int, int], runs: bool) -> None:
    assert has_kernels_for(capability, ["sm_75", "sm_80", "sm_90a", "compute_90"]) == runs


def test_another_makers_architectures_are_not_judged() -> None:
    assert has_kernels_for((9, 4), ["gfx90a", "gfx942"])


def freed_after(seconds: float, monkeypatch: pytest.MonkeyPatch) -> tuple[Callable[[], float], Callable[[float], None]]:
    """Let a killed process hold 60 of 80 GB for so long; return a clock, and what waits by it."""
    now = [0.0]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: ((79 if now[0] >= seconds else 20) * GB, 80 * GB))

    def sleep(sleep_s: float) -> None:
        now[0] += sleep_s

    return lambda: now[0], sleep


def test_memory_that_is_free_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    clock, sleep = freed_after(0, monkeypatch)
    wait_until_free(torch.device("cuda", 1), clock=clock, sleep=sleep)
    assert clock() == 0
    assert not caplog.records


def test_the_memory_of_a_killed_process_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    clock, sleep = freed_after(3.05, monkeypatch)
    wait_until_free(torch.device("cuda", 1), clock=clock, sleep=sleep)
    assert 3.05 <= clock() < 3.3
    assert [record.getMessage() for record in caplog.records] == ["waited 3.1 s until the memory of cuda:1 was free"]


def test_on_a_small_gpu_the_workers_own_context_is_nobody_elses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (int(4.2 * GB), 5 * GB))
    wait_until_free(torch.device("cuda", 0), clock=lambda: 0.0, sleep=pytest.fail)


@pytest.mark.parametrize(("gpus", "waited_for"), [(1.0, ["cuda:1"]), (0.5, []), (None, [])])
def test_a_worker_waits_for_a_gpu_that_is_its_alone(
    monkeypatch: pytest.MonkeyPatch, tiny: TrainConfig, gpus: float | None, waited_for: list[str]
) -> None:
    place = SimpleNamespace(get_world_rank=lambda: 0, get_world_size=lambda: 1, get_local_rank=lambda: 1)
    given = SimpleNamespace(get_assigned_resources=lambda: {"CPU": 1.0} | ({"GPU": gpus} if gpus else {}))
    waited: list[str] = []
    monkeypatch.setattr(worker.ray.train, "get_context", lambda: place)
    monkeypatch.setattr(worker.ray, "get_runtime_context", lambda: given)
    monkeypatch.setattr(worker, "local_device", lambda _config, local_rank: torch.device("cuda", local_rank))
    monkeypatch.setattr(worker, "wait_until_free", lambda device: waited.append(str(device)))
    worker._world(tiny)
    assert waited == waited_for


def test_memory_that_stays_taken_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock, sleep = freed_after(1000, monkeypatch)
    wait_until_free(torch.device("cuda", 1), clock=clock, sleep=sleep)
    assert 20 <= clock() < 20.3
    [record] = caplog.records
    assert record.levelname == "WARNING"
    assert "cuda:1 has only 20.0 of 80.0 GB free after 20 s: another process uses it" in record.getMessage()
