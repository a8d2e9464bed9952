"""Two GPUs that are not there, and a rank on the second one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from orchestrator.checkpoint.restore.init_from import scratch_args
from orchestrator.checkpoint.save.node_memory import NodeMemory
from orchestrator.checkpoint.save.node_topology import NodeTopology
from orchestrator.checkpoint.save.policy import SaveIntervals
from orchestrator.checkpoint.save.saver import Saver
from orchestrator.checkpoint.state import build_state
from orchestrator.config import TrainConfig
from orchestrator.distributed.world import World
from tests.support.fake_cuda import FakeCuda, fake_cuda
from tests.support.gpu_savers import DEVICE, Start
from tests.support.runs import checkpoints_in
from tests.support.savers import settle, step


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """Two GPUs, of which this process has the second, as its loop's thread knows."""
    cuda = fake_cuda(monkeypatch)
    cuda.set_device(DEVICE)
    return cuda


@pytest.fixture
def start(cuda: FakeCuda, tiny: TrainConfig, memory_dir: str, tmp_path: Path) -> Start:  # noqa: ARG001
    """Start a rank that is alone on its node; its state has been through a step, and is at iteration 7."""
    folder = Path(memory_dir, tmp_path.name)
    folder.mkdir()

    def start(scaler: torch.amp.GradScaler | None = None, is_settled: bool = True) -> Saver:
        state = build_state(tiny, scratch_args(tiny, 64), World())
        state.scaler = scaler or state.scaler
        step(state)
        state.iter_num = 7
        nodes = NodeTopology(NodeMemory(str(folder), "run"), ("here",), 0)
        world = World(device=DEVICE, attempt="abc")
        saver = Saver(state, world, checkpoints_in(tiny.out_dir), nodes, {}, SaveIntervals(100))
        if is_settled:
            settle(saver)
        return saver

    return start
