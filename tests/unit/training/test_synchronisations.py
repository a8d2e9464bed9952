"""Where the loop waits for the device: once in an iteration, behind the next batch, and not after the step.

On a CPU nothing waits, but the loop reads numbers at the same places: what is read of float32 lies on a GPU there.
Votes and sums over ranks (integers and float64) go through host memory everywhere.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from orchestrator import loop
from orchestrator.config import TrainConfig
from orchestrator.data.dataset import Dataset
from orchestrator.distributed.device import resolve
from orchestrator.distributed.world import World
from orchestrator.loop import train
from orchestrator.training import attempt
from orchestrator.training.step import dropout_seed

ON_DEVICE = (torch.float32, torch.bfloat16, torch.float16)


class Reads(TorchDispatchMode):
    """Notes every number that is read off a tensor in this thread, by whatever operation."""

    def __init__(self, events: list[Any]) -> None:
        super().__init__()
        self._events = events

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].dtype in ON_DEVICE:
            self._events.append("read")
        return func(*args, **(kwargs or {}))


@contextmanager
def noted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Lend the list of what happens, in its order."""
    events: list[Any] = []
    draw, seed, evaluate = Dataset.batch, loop.seed_dropout, attempt.evaluate

    def batch(data: Dataset, split: Any, iter_num: int, micro_step: int, *, evaluation: bool = False) -> Any:
        events.append("evaluation's batch" if evaluation else ("draw", iter_num, micro_step))
        return draw(data, split, iter_num, micro_step, evaluation=evaluation)

    def seed_dropout(dropout: float, run_seed: int, iter_num: int, micro_step: int) -> None:
        events.append(("forward", iter_num, micro_step))
        seed(dropout, run_seed, iter_num, micro_step)

    def evaluated(*args: Any) -> Any:
        events.append("evaluate")
        result = evaluate(*args)
        events.append("evaluated")
        return result

    def read(name: str) -> Any:
        original = getattr(Tensor, name)

        def reading(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            if tensor.dtype in ON_DEVICE and threading.current_thread() is threading.main_thread():
                events.append("read")
            return original(tensor, *args, **kwargs)

        return reading

    monkeypatch.setattr(Dataset, "batch", batch)
    monkeypatch.setattr(loop, "seed_dropout", seed_dropout)
    monkeypatch.setattr(attempt, "evaluate", evaluated)
    for name in ("tolist", "cpu", "numpy"):
        monkeypatch.setattr(Tensor, name, read(name))
    hook = register_optimizer_step_pre_hook(lambda *_: events.append("step"))
    with Reads(events):
        yield events
    hook.remove()


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"dtype": "bfloat16", "loss_spike_z": 9.0, "snapshot_interval": 1},
        {"dtype": "float16"},
        {"grad_clip": 0.0, "dropout": 0.0},
    ],
    ids=str,
)
def test_an_iteration_reads_once_behind_the_next_batch_and_before_the_step(
    tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    config = replace(tiny, max_iters=6, eval_interval=4, gradient_accumulation_steps=2, **change)
    with noted(monkeypatch) as events:
        train(resolve(replace(config, checkpoint_interval=100)), World(attempt="a"))
    for iter_num in range(6):
        begins = events.index(("forward", iter_num, 0))
        assert events[begins + 1 : begins + 6] == [
            ("draw", iter_num, 1), ("forward", iter_num, 1), ("draw", iter_num + 1, 0), "read", "step",
        ]  # fmt: skip
        after = ["evaluate"] if iter_num in (3, 5) else [("forward", iter_num + 1, 0)]
        assert events[begins + 6 : begins + 7] == after


def test_an_evaluation_reads_once_per_split(tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    with noted(monkeypatch) as events:
        train(resolve(replace(tiny, max_iters=1, eval_iters=5)), World(attempt="a"))
    first = events[events.index("evaluate") + 1 : events.index("evaluated")]
    assert first == 2 * [*["evaluation's batch"] * 5, "read"]


def test_dropout_is_seeded_where_there_is_dropout(tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []
    original = torch.manual_seed
    monkeypatch.setattr(torch, "manual_seed", lambda seed: seeds.append(seed) or original(seed))
    train(resolve(replace(tiny, max_iters=2, dropout=0.0)), World(attempt="a"))
    without = list(seeds)
    train(resolve(replace(tiny, max_iters=2, out_dir=f"{tiny.out_dir}-b")), World(attempt="b"))
    in_steps = [dropout_seed(tiny.seed, it, micro_step) for it in range(2) for micro_step in range(4)]
    assert seeds[len(without) :] == [*without, *in_steps]
