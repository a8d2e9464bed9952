"""What this process has: its device, and a compiler that works; where not, one line tells what it does instead."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from orchestrator.checkpoint.store import CheckpointStore
from orchestrator.config import TrainConfig
from orchestrator.errors import ConfigError
from orchestrator.process import device_here, resolve
from tests import ranks

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


@pytest.mark.parametrize("broken", [(0,), pytest.param((1,), marks=pytest.mark.slow)])
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
    assert not CheckpointStore(config.out_dir).select().state["environment"]["compile"]
