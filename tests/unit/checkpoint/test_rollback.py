"""What a rollback leaves behind: nothing. A GPU that holds one state has no room for two."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch

from model import GPT
from orchestrator.checkpoint.restore import restore
from orchestrator.checkpoint.save.saver import Saver
from orchestrator.config import TrainConfig
from orchestrator.distributed import numerics as process
from orchestrator.distributed.device import resolve
from orchestrator.distributed.world import World
from orchestrator.loop import train
from orchestrator.telemetry.records import Record, RollingBack
from orchestrator.training import attempt
from orchestrator.training.attempt import Callbacks
from tests.support.fake_cuda import fake_cuda


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """The batches of iterations 6 and 7 make the loss bad."""
    drawn = [-1]
    data_iter, forward = attempt.data_iter, GPT.forward

    def noted(*args: Any) -> int:
        drawn[0] = data_iter(*args)
        return drawn[0]

    def poisonous(model: GPT, idx: torch.Tensor, targets: torch.Tensor | None = None) -> Any:
        logits, loss = forward(model, idx, targets)
        is_bad = loss is not None and model.training and drawn[0] in (6, 7)
        return logits, loss * float("nan") if is_bad else loss

    monkeypatch.setattr(attempt, "data_iter", noted)
    monkeypatch.setattr(GPT, "forward", poisonous)


@pytest.mark.usefixtures("poisoned")
def test_the_old_state_is_gone_before_the_new_one_is_built(tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    models: list[weakref.ref[GPT]] = []
    alive: list[bool] = []
    build = restore.build_state

    def noted(*args: Any, **options: Any) -> Any:
        alive.extend(model() is not None for model in models)
        state = build(*args, **options)
        object.__setattr__(state.model, "cycle", [state.model])  # as DDP and the compiler make them
        models.append(weakref.ref(state.model))
        return state

    monkeypatch.setattr(restore, "build_state", noted)
    savers: list[Saver] = []  # kept, as a worker keeps what can rescue its state
    config = resolve(replace(tiny, max_bad_steps=2, max_iters=12, lr_decay_iters=12, eval_interval=100))
    records: list[Record] = []
    train(config, World(attempt="a"), Callbacks(records.append, ready=savers.append))
    assert [record.to_iter for record in records if isinstance(record, RollingBack)] == [4]
    assert len(models) == len(savers) == 2
    assert alive == [False]
    assert savers[0]._memory.pool.buffers == []


def test_a_gpu_gives_back_what_its_allocator_keeps(tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = fake_cuda(monkeypatch)
    reset: list[bool] = []
    monkeypatch.setattr(torch._dynamo, "reset", lambda: reset.append(True))
    process.free_memory(replace(tiny, compile=True), torch.device("cuda", 1))
    assert cuda.names() == ["empty_cache"]
    assert reset == [True]
    process.free_memory(tiny, torch.device("cpu"))
    assert cuda.names() == ["empty_cache"]
    assert reset == [True]
