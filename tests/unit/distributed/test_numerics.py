"""What this process has: its device, and a compiler that works; where not, one line tells what it does instead."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from orchestrator.config import TrainConfig
from orchestrator.distributed.device import agree_on_dtype, device_here, resolve
from orchestrator.distributed.numerics import NumericsFingerprint, make_deterministic
from orchestrator.distributed.world import World
from orchestrator.errors import ConfigError
from orchestrator.training.changes import warn_if_numerics_changed
from tests.support import ranks
from tests.support.runs import checkpoints_in

GPU_KINDS = ("cuda", "mps", "xpu")


@pytest.fixture
def no_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (torch.cuda, torch.xpu, torch.backends.mps):
        monkeypatch.setattr(module, "is_available", lambda: False)


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.mark.usefixtures("no_accelerator")
@pytest.mark.parametrize("wanted", ["cuda", "cuda:1", "mps", "xpu", "xpu:0"])
def test_a_device_that_is_not_there_is_the_cpu(
    tiny: TrainConfig, wanted: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    assert device_here(wanted, GPU_KINDS) == "cpu"
    resolved = resolve(replace(tiny, device=wanted, dtype="auto"))
    assert (resolved.device, resolved.backend, resolved.dtype) == ("cpu", "gloo", "float32")
    assert caplog.text.count(f"device={wanted} is not on this machine: device=cpu") == 2


@pytest.mark.usefixtures("two_gpus")
def test_one_gpu_of_several(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert device_here("cuda:1", GPU_KINDS) == "cuda:1"
    assert device_here("cpu", GPU_KINDS) == "cpu"
    with pytest.raises(ConfigError, match="device=cuda:2: this machine has cuda:0 to cuda:1"):
        device_here("cuda:2", GPU_KINDS)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert device_here("mps", GPU_KINDS) == "mps"
    assert device_here("mps", ("cuda",)) == "cpu"
    assert "device=mps is not for training: device=cpu" in caplog.text


def test_no_name_of_a_device() -> None:
    with pytest.raises(ConfigError, match="device='gpu' is no device: give cpu, cuda or cuda:<index>"):
        device_here("gpu", GPU_KINDS)


@dataclass(frozen=True)
class BreakCompiler:
    """Put C++ compilers that only fail in front of the others, for these ranks; their cache is empty."""

    folder: Path
    ranks: tuple[int, ...]

    def __call__(self, rank: int) -> None:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(self.folder / f"cache-{rank}")
        if rank in self.ranks:
            for name in ("g++", "clang++", "c++", "gcc", "cc"):
                (self.folder / name).write_text("#!/bin/sh\nexit 1\n")
                (self.folder / name).chmod(0o755)
            os.environ["PATH"] = f"{self.folder}:{os.environ['PATH']}"


@pytest.mark.slow
@pytest.mark.parametrize("broken", [(0,), (1,)])
def test_a_compiler_that_does_not_work_is_told_of_once_and_all_ranks_run_uncompiled(
    tiny: TrainConfig, tmp_path: Path, broken: tuple[int, ...]
) -> None:
    config, world_size = replace(tiny, compile=True, max_iters=2), 1 if broken == (0,) else 3
    ended = ranks.train(config, world_size, tmp_path / "log", prepare=BreakCompiler(tmp_path, broken))
    assert ended.is_done, ended.said
    where = f" on rank {broken[0]}'s node" if world_size > 1 else ""
    assert f"rank 0: compile=True, but the compiler does not work{where} (No working C++ compiler" in ended.said
    assert ended.said.count("runs uncompiled") == 1
    assert "Traceback" not in ended.said
    assert not checkpoints_in(config.out_dir).select().state["environment"]["compile"]


@pytest.fixture
def unpinned() -> Iterator[None]:
    """What `pin` changes for the whole process is put back."""
    from torch._inductor import config as compiler

    mode, was_deterministic = torch.get_deterministic_debug_mode(), compiler.deterministic
    yield
    torch.set_deterministic_debug_mode(mode)
    compiler.deterministic = was_deterministic


@pytest.mark.usefixtures("unpinned")
@pytest.mark.parametrize("device", ["cpu", "cuda", "cuda:1"])
def test_attention_on_a_gpu_is_deterministic_and_does_not_only_warn(tiny: TrainConfig, device: str) -> None:
    make_deterministic(replace(tiny, device=device))
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.is_deterministic_algorithms_warn_only_enabled() == (device == "cpu")
    make_deterministic(replace(tiny, device=device, deterministic=False))
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.usefixtures("unpinned")
@pytest.mark.parametrize(("given", "expected"), [(None, ":4096:8"), (":16:8", ":16:8"), (":4096:2", ":4096:8")])
def test_cublas_has_a_workspace_that_pytorch_takes_for_deterministic(
    tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, given: str, expected: str
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", given or "")
    if not given:
        monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    make_deterministic(replace(tiny, device="cuda"))
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == expected
    assert ("CUBLAS_WORKSPACE_CONFIG=:4096:2 allows other bits" in caplog.text) == (given == ":4096:2")


@pytest.mark.usefixtures("unpinned")
def test_the_compiler_chooses_no_kernel_by_measuring_it(tiny: TrainConfig) -> None:
    from torch._inductor import config as compiler

    for deterministic in (True, False):
        make_deterministic(replace(tiny, compile=True, deterministic=deterministic))
        assert compiler.deterministic == deterministic


@dataclass(frozen=True)
class Ranks(World):
    """A world whose other ranks answer what they are made to: (their node, their dtype)."""

    others: tuple[str, ...] = ()

    def gather_json(self, value: object) -> list[object]:
        return [value, *self.others]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers of a GPU to what the fingerprint asks it."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 27, 5))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91500)
    monkeypatch.setattr("orchestrator.distributed.numerics.platform.node", lambda: "node-a")


def fingerprint(config: TrainConfig, others: tuple[str, ...] = (), backend: str = "nccl") -> dict[str, Any]:
    config = replace(config, device="cuda", backend=backend, dtype="bfloat16")
    world = Ranks(size=1 + len(others), device=torch.device("cuda", 0), others=others)
    return NumericsFingerprint.of_this_rank(config, world, "d").to_json()


@pytest.mark.usefixtures("gpu")
def test_what_decides_bits_on_gpus_is_kept_with_the_state(tiny: TrainConfig) -> None:
    kept = fingerprint(tiny)
    assert (kept["cuda"], kept["cudnn"], kept["nccl"]) == ("13.0", 91500, "2.27.5")
    assert "nodes" not in fingerprint(tiny, ("node-b",)), "of two ranks: a + b is b + a"
    assert "nodes" not in fingerprint(tiny, ("node-a", "node-b"), backend="gloo")
    assert fingerprint(tiny, ("node-a", "node-b"))["nodes"] == "node-a x2, node-b x1"
    on_cpu = NumericsFingerprint.of_this_rank(tiny, World(size=3), "d").to_json()
    assert on_cpu.keys() == {"world_size", "data", "torch", "device_name", "dtype", "compile", "threads", "lanes"}


@pytest.mark.usefixtures("gpu")
def test_a_warning_tells_what_has_changed_and_not_what_was_never_noted(
    tiny: TrainConfig, caplog: pytest.LogCaptureFixture
) -> None:
    now = fingerprint(tiny, ("node-a", "node-b"))
    state: Any = SimpleNamespace(resumed_from=SimpleNamespace(checkpoint=SimpleNamespace(state={})))
    older = {key: value for key, value in now.items() if key not in ("cuda", "cudnn", "nccl", "triton", "nodes")}
    state.resumed_from.checkpoint.state["environment"] = older
    warn_if_numerics_changed(NumericsFingerprint.from_json(now), World(), state)
    assert not caplog.records
    state.resumed_from.checkpoint.state["environment"] = {**now, "nccl": "2.26.2", "nodes": "node-a x3"}
    warn_if_numerics_changed(NumericsFingerprint.from_json(now), World(), state)
    (record,) = caplog.records
    assert record.getMessage() == (
        "the last bits may differ from an undisturbed run's: nccl 2.26.2 -> 2.27.5, "
        "nodes node-a x3 -> node-a x2, node-b x1"
    )


def test_a_fingerprint_of_another_version_is_read(tiny: TrainConfig) -> None:
    now = NumericsFingerprint.of_this_rank(tiny, World(), "d", train_tokens=5, val_tokens=6)
    assert NumericsFingerprint.from_json({**now.to_json(), "of a newer version": 1}) == now
    older = NumericsFingerprint.from_json({"torch": "2.6.0", "threads": now.threads})
    assert now.changes(older) == [f"torch 2.6.0 -> {now.torch}"]
    assert now.change_of_data(older) == ""


def test_bfloat16_is_taken_only_where_the_card_has_it(tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    for major, expected in ((7, "float16"), (8, "bfloat16")):  # T4 is 7.5, A100 8.0
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, major=major: SimpleNamespace(major=major))
        monkeypatch.setattr(torch.cuda, "_check_bf16_tensor_supported", lambda _device: True)
        assert resolve(replace(tiny, device="cuda", dtype="auto")).dtype == expected


def test_workers_with_other_cards_take_one_dtype(tiny: TrainConfig, caplog: pytest.LogCaptureFixture) -> None:
    config = replace(tiny, dtype="bfloat16")
    assert agree_on_dtype(config, Ranks(others=("bfloat16",))).dtype == "bfloat16"
    assert not caplog.records
    assert agree_on_dtype(config, Ranks(others=("float16",))).dtype == "float16"
    assert "dtype=auto finds bfloat16 and float16: all workers take float16" in caplog.text
