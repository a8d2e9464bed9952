"""A run in lanes ends with the same bits on any number of ranks. Real gloo ranks, three and more of them."""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from orchestrator.checkpoint.snapshot import Snapshot, tensors_equal
from orchestrator.commands.inspect_run import InspectConfig, inspect
from orchestrator.config import TrainConfig
from orchestrator.distributed import flat_gradient
from orchestrator.distributed.flat_gradient import FlatGradient
from orchestrator.distributed.lane_training import LaneTraining
from orchestrator.distributed.lanes import Lanes
from orchestrator.distributed.world import World
from orchestrator.worker.failure import Cause
from tests.conftest import final_state
from tests.support import lost_peer, ranks
from tests.support.faults import Fault
from tests.support.runs import metrics_in

SETTINGS: dict[str, Mapping[str, Any]] = {
    "bfloat16": {"dtype": "bfloat16"},
    "float16": {"dtype": "float16"},
    "activation_checkpointing": {"activation_checkpointing": True, "loss_chunk": 16},
    "epoch": {"sampling": "epoch", "grad_clip": 0.0},
}


@dataclass(frozen=True)
class SmallPieces:
    """Send gradients in many pieces, though the model is tiny."""

    size_bytes: int = 2**14

    def __call__(self, _rank: int) -> None:
        from orchestrator.distributed import flat_gradient

        flat_gradient.PIECE_BYTES = self.size_bytes


def train(
    config: TrainConfig,
    size: int,
    folder: Path,
    name: str = "",
    prepare: Callable[[int], None] | None = None,
    timeout_s: float = 120.0,
) -> Snapshot:
    """Train on so many ranks, in pieces of 16 kB, and return the end of it."""
    name = name or f"run-{size}"
    config = replace(config, out_dir=str(folder / name))
    log, prepare = folder / f"{name}-{size}.log", prepare or SmallPieces()
    ended = ranks.train(config, size, log, prepare=prepare, timeout_s=timeout_s)
    assert ended.is_done, ended.said
    return final_state(config.out_dir)


def same(one: Snapshot, other: Snapshot) -> bool:
    return tensors_equal(one, other) and one.best_val_loss == other.best_val_loss


@pytest.fixture
def lanes(tiny: TrainConfig) -> TrainConfig:
    return replace(tiny, gradient_accumulation_steps=12, lanes=8, max_iters=7, lr_decay_iters=7)


@pytest.mark.parametrize("micro_steps", [12, *(pytest.param(n, marks=pytest.mark.slow) for n in (8, 40))])
def test_any_number_of_ranks_ends_with_the_same_bits(lanes: TrainConfig, tmp_path: Path, micro_steps: int) -> None:
    config = replace(lanes, gradient_accumulation_steps=micro_steps)
    alone = train(config, 1, tmp_path)
    assert all(same(train(config, size, tmp_path), alone) for size in (2, 3, 4))
    losses = [[r["loss"] for r in metrics_in(str(tmp_path / f"run-{n}")) if r["kind"] == "step"] for n in (1, 2, 3, 4)]
    assert losses == [losses[0]] * 4  # what is logged is the global batch's
    assert len(losses[0]) == 7


@pytest.mark.slow
@pytest.mark.parametrize("micro_steps", [8, 12, 40])
def test_many_ranks_end_with_the_same_bits(lanes: TrainConfig, tmp_path: Path, micro_steps: int) -> None:
    config = replace(lanes, gradient_accumulation_steps=micro_steps)
    alone = train(config, 1, tmp_path)
    assert all(same(train(config, size, tmp_path), alone) for size in (5, 6, 7, 8))


def test_ddp_ends_with_other_bits(lanes: TrainConfig, tmp_path: Path) -> None:
    """What the tests above compare can differ."""
    config = replace(lanes, lanes=0, deterministic=False, max_iters=3)
    assert not tensors_equal(train(config, 3, tmp_path), train(config, 1, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("name", [*SETTINGS])
def test_with_every_setting(lanes: TrainConfig, tmp_path: Path, name: str) -> None:
    config = replace(lanes, max_iters=4, **SETTINGS[name])
    assert same(train(config, 3, tmp_path), train(config, 1, tmp_path))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_compiled(lanes: TrainConfig, tmp_path: Path) -> None:
    config = replace(lanes, max_iters=4, compile=True)
    alone = train(config, 1, tmp_path, timeout_s=400)
    assert same(train(config, 3, tmp_path, timeout_s=400), alone)


def test_a_run_goes_on_with_its_lanes_on_other_numbers_of_ranks(lanes: TrainConfig, tmp_path: Path) -> None:
    whole = train(replace(lanes, max_iters=12, eval_interval=4), 2, tmp_path)
    for until, size in ((4, 4), (8, 1), (12, 3)):
        given = lanes.lanes if until == 4 else 0  # once is enough: the state remembers it
        config = replace(lanes, lanes=given, max_iters=until, eval_interval=4)
        parts = train(config, size, tmp_path, "parts")
    assert same(parts, whole)
    assert "gradients summed in 8 lanes" in inspect(InspectConfig(str(tmp_path / "parts")))
    said = "".join((tmp_path / f"parts-{size}.log").read_text() for size in (1, 3))
    assert "last bits" not in said
    assert "instead of" not in said


@pytest.mark.parametrize("given", [0, pytest.param(4, marks=pytest.mark.slow)])
def test_more_lanes_than_a_run_had_are_told(lanes: TrainConfig, tmp_path: Path, given: int) -> None:
    """More workers than lanes, and the user's own number: from there on the bits are others."""
    train(replace(lanes, lanes=2, max_iters=4), 2, tmp_path, "run")
    train(replace(lanes, lanes=given), 3, tmp_path, "run")
    (changed,) = [record for record in metrics_in(str(tmp_path / "run")) if record["kind"] == "lanes_changed"]
    assert (changed["iter"], changed["before"], changed["lanes"]) == (4, 2, given or 3)
    assert f"iter 4: gradients are summed in {given or 3} lanes instead of in 2" in (tmp_path / "run-3.log").read_text()


def test_fewer_lanes_than_ranks_are_refused(lanes: TrainConfig, tmp_path: Path) -> None:
    ended = ranks.train(replace(lanes, lanes=2), 3, tmp_path / "log")
    assert not ended.is_done
    assert "lanes=2 are too few for 3 workers" in ended.said


@dataclass(frozen=True)
class BadLosses:
    """Multiply the loss of micro-steps by a factor, once each, on whichever rank computes them.

    at: (iteration, micro-step).
    """

    at: tuple[tuple[int, int], ...]
    factor: float = float("nan")

    def __call__(self, rank: int) -> None:
        from orchestrator import loop

        SmallPieces()(rank)
        left, now = set(self.at), dict[str, tuple[int, int]]()
        original_seed, original_call = loop.seed_dropout, LaneTraining.__call__

        def seed_dropout(dropout: float, seed: int, iter_num: int, micro_step: int) -> None:
            now["at"] = (iter_num, micro_step)
            original_seed(dropout, seed, iter_num, micro_step)

        def call(self: LaneTraining, idx: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
            logits, loss = original_call(self, idx, targets)
            if now["at"] not in left:
                return logits, loss
            left.remove(now["at"])
            return logits, loss * bad.factor

        bad = self
        loop.seed_dropout = seed_dropout
        LaneTraining.__call__ = call  # type: ignore[method-assign]


def kinds(run: Path, kind: str) -> list[dict[str, Any]]:
    return [record for record in metrics_in(str(run)) if record["kind"] == kind]


def test_bad_steps_of_one_rank_are_skipped_and_rolled_back_alike(lanes: TrainConfig, tmp_path: Path) -> None:
    config, bad = replace(lanes, max_bad_steps=2, checkpoint_interval=2), BadLosses(((3, 7), (5, 1), (6, 11)))
    alone = train(config, 1, tmp_path, prepare=bad)
    assert same(train(config, 3, tmp_path, prepare=bad), alone)
    for size in (1, 3):
        run = tmp_path / f"run-{size}"
        assert [record["iter"] for record in kinds(run, "step_skipped")] == [3, 5, 6]
        assert [(record["to_iter"], record["skipped_iters"]) for record in kinds(run, "rollback")] == [(4, 3)]


@pytest.mark.slow
def test_a_spike_is_seen_alike(lanes: TrainConfig, tmp_path: Path) -> None:
    config = replace(lanes, loss_spike_z=20.0, max_iters=36, lr_decay_iters=36, checkpoint_interval=36)
    bad = BadLosses(((33, 5),), factor=40.0)
    alone = train(config, 1, tmp_path, prepare=bad)
    assert same(train(config, 3, tmp_path, prepare=bad), alone)
    assert [[r["iter"] for r in kinds(tmp_path / f"run-{size}", "step_skipped")] for size in (1, 3)] == [[33], [33]]


def test_a_rank_is_killed_between_the_exchange_and_the_step(lanes: TrainConfig, tmp_path: Path) -> None:
    whole = train(lanes, 2, tmp_path)
    config = replace(lanes, out_dir=str(tmp_path / "killed"))
    fault = Fault("exchanged", 5, 1, tmp_path / "fired")
    ended = ranks.train(config, 3, tmp_path / "log", [fault])
    assert fault.marker.exists()
    assert ended.codes[1] == -signal.SIGKILL
    assert same(train(config, 4, tmp_path, "killed"), whole)


def step_in_lanes(world: World) -> Callable[[], object]:
    """Return one iteration of a model that each rank computes one micro-step of."""
    config = TrainConfig(device="cpu", compile=False, gradient_accumulation_steps=3, backend="gloo")
    linear, x = nn.Linear(500, 500), torch.ones(1, 500)
    model = LaneTraining(linear, config, world, Lanes(3, 3))
    model.net = lambda idx, _: (idx, linear(idx).sum())  # type: ignore[assignment]

    def step() -> None:
        with model.accumulate(world.rank):
            model(x, x)[1].backward()

    return step


class Moved(TorchFunctionMode):
    """Notes the largest tensor that `Tensor.to` is asked for."""

    most = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.to:
            self.most = max(self.most, args[0].nbytes)
        return func(*args, **(kwargs or {}))


def test_sums_in_host_memory_come_back_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole one is 6.2 GB for GPT-2 XL, for which a GPU that has sums wait elsewhere has no room."""
    monkeypatch.setattr(flat_gradient, "PIECE_BYTES", 1024)
    config = TrainConfig(device="cpu", compile=False, gradient_accumulation_steps=4)
    linear, x = nn.Linear(50, 50, bias=False), torch.ones(1, 50)
    model = LaneTraining(linear, config, World(), Lanes(4, 4))
    moved = Moved()
    for micro_step in model.micro_steps:
        with moved, model.accumulate(micro_step):
            linear(x * (micro_step + 1)).sum().backward()
    assert 0 < moved.most <= 1024
    assert linear.weight.grad is not None
    assert torch.equal(linear.weight.grad, torch.full((50, 50), 10.0))


def test_an_exchange_that_a_peer_has_left_is_a_lost_peer(tmp_path: Path) -> None:
    assert lost_peer.causes_of(step_in_lanes, tmp_path) == {Cause.PEER_LOST}


def test_gradients_exist_once() -> None:
    model = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 20))
    gradient = FlatGradient(model, multiple_of=3)
    model(torch.randn(5, 40)).square().sum().backward()
    storages = {p.grad.untyped_storage().data_ptr() for p in model.parameters() if p.grad is not None}
    assert storages == {gradient.flat.untyped_storage().data_ptr()}
    assert sum(p.numel() for p in model.parameters()) <= len(gradient.flat) < 64 * 5 + 30 * 41 + 20 * 31
    assert [piece.stop - piece.start for piece in gradient.pieces] == [len(gradient.flat)]
    assert len(gradient.flat) % 3 == 0
