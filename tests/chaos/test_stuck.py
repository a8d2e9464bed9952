"""Losses where collectives get stuck, as on GPUs: nothing fails by itself, and no completed step is computed again."""

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from orchestrator.checkpoint.snapshot import tensors_equal
from orchestrator.config import TrainConfig
from orchestrator.driver.launch import launch
from tests.conftest import Undisturbed, final_state
from tests.support.faults import Fault, worker_with
from tests.support.runs import ledger_in
from tests.support.stuck import check_teardown

pytestmark = [
    pytest.mark.stuck_collectives,
    pytest.mark.filterwarnings("default"),  # Ray and its parts warn of themselves
]


def check(config: TrainConfig, faults: list[Fault], causes: list[str], undisturbed: Undisturbed) -> None:
    """Train with the faults; nothing of them shows in the end, and the group before was done away with quickly."""
    launch(config, worker_with(*faults, gets_stuck=True))
    assert [fault.marker.exists() for fault in faults] == [True] * len(faults), "a fault did not fire"
    check_that_nothing_shows(config, causes, undisturbed)


def check_that_nothing_shows(config: TrainConfig, causes: list[str], undisturbed: Undisturbed) -> None:
    found = ledger_in(config.out_dir).incidents
    assert [incident.cause for incident in found] == causes
    assert [incident.steps_repeated for incident in found] == [0] * len(causes)
    check_teardown(found)
    assert tensors_equal(final_state(config.out_dir), undisturbed(config, config.max_workers))


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize(
    ("world_size", "point", "rank", "iter_num"),
    [
        (3, "reduce", 0, 13),
        pytest.param(3, "exchanged", 1, 13, marks=pytest.mark.slow),
        pytest.param(3, "forward", 1, 10, marks=pytest.mark.slow),
        pytest.param(2, "optimizer", 1, 14, marks=pytest.mark.slow),
        pytest.param(3, "evaluate", 2, 16, marks=pytest.mark.slow),
    ],
)
def test_a_worker_is_killed(
    tiny: TrainConfig, tmp_path: Path, undisturbed: Undisturbed, world_size: int, point: str, rank: int, iter_num: int
) -> None:
    fault = Fault(point, iter_num, rank, tmp_path / "fired")
    check(replace(tiny, num_workers=world_size), [fault], ["worker_lost"], undisturbed)


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize(("point", "deterministic"), [("exchanged", True), ("forward", True), ("reduce", False)])
def test_a_worker_that_trains_adapters_is_killed(
    adapters: TrainConfig, tmp_path: Path, undisturbed: Undisturbed, point: str, deterministic: bool
) -> None:
    fault = Fault(point, 13, 1, tmp_path / "fired")
    check(replace(adapters, num_workers=3, deterministic=deterministic), [fault], ["worker_lost"], undisturbed)


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("rank", [0, 1])
def test_one_rank_raises_while_its_peers_wait(
    tiny: TrainConfig, tmp_path: Path, undisturbed: Undisturbed, rank: int
) -> None:
    fault = Fault("forward", 11, rank, tmp_path / "fired", kind=None)
    check(replace(tiny, num_workers=2), [fault], ["user_error"], undisturbed)


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_one_rank_runs_out_of_memory(tiny: TrainConfig, tmp_path: Path, undisturbed: Undisturbed) -> None:
    fault = Fault("forward", 11, 2, tmp_path / "fired", kind=None, error=torch.OutOfMemoryError)
    check(replace(tiny, num_workers=3), [fault], ["out_of_memory"], undisturbed)


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_a_worker_stands_still(tiny: TrainConfig, tmp_path: Path, undisturbed: Undisturbed) -> None:
    fault = Fault("forward", 13, 1, tmp_path / "fired", kind=signal.SIGSTOP)
    check(replace(tiny, num_workers=3, hang_timeout_s=6.0), [fault], ["hang"], undisturbed)


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("point", ["restore", "warm_up"])
def test_a_second_worker_is_killed_before_the_first_step_of_the_next_attempt(
    tiny: TrainConfig, tmp_path: Path, undisturbed: Undisturbed, point: str
) -> None:
    first = Fault("forward", 11, 1, tmp_path / "first")
    second = Fault(point, 0, 0, tmp_path / "second", after=first.marker)
    config = replace(tiny, num_workers=3, deterministic=point != "warm_up")  # which is DDP's
    check(config, [first, second], ["worker_lost", "worker_lost"], undisturbed)


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_a_second_worker_is_killed_during_the_rescue(
    tiny: TrainConfig, tmp_path: Path, undisturbed: Undisturbed
) -> None:
    first = Fault("forward", 11, 1, tmp_path / "first")
    second = Fault("seal", 11, 2, tmp_path / "second", after=first.marker)
    check(replace(tiny, num_workers=3, snapshot_interval=50), [first, second], ["worker_lost"], undisturbed)
