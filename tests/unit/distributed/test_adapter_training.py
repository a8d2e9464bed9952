"""Adapters on several ranks: one reads the base model, all hold the same bits of it, and no state has any of it."""

from __future__ import annotations

import signal
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest

from model.lora import is_adapter
from orchestrator.checkpoint.save.node_memory import run_path, states_in
from orchestrator.checkpoint.snapshot import MOMENTS, tensors_equal
from orchestrator.checkpoint.store import Checkpoint
from orchestrator.config import TrainConfig
from tests.conftest import final_state
from tests.support import ranks
from tests.support.bases import WatchBase, held, readers
from tests.support.faults import Fault
from tests.support.runs import checkpoints_in, metrics_in

KILLED_AT = 13
_HEADER_BYTES = 4096  # at most, of a file of so few tensors


@pytest.fixture
def lanes(adapters: TrainConfig) -> TrainConfig:
    return replace(adapters, lanes=3)


def computed(config: TrainConfig) -> list[int]:
    return [record["iter"] for record in metrics_in(config.out_dir) if record["kind"] == "step"]


def states_in_memory(config: TrainConfig) -> Iterable[Checkpoint]:
    path = run_path(config.memory_dir, checkpoints_in(config.out_dir).folder.run_id())
    return [share for shares in states_in(path).values() for share in shares.values()]


def check_holds_adapters_alone(states: Iterable[Checkpoint], trained_bytes: int) -> None:
    """Check names and bytes; trained_bytes: of all adapters."""
    for state in states:
        parameters = {name.split(".", 1)[1] if name.startswith(MOMENTS) else name for name in state.state["tensors"]}
        assert all(is_adapter(name) for name in parameters - {"step"})
        assert state.size_bytes <= (1 + len(MOMENTS)) * trained_bytes + _HEADER_BYTES * len(state.files)


def test_a_killed_rank_changes_no_bit_and_the_base_model_is_read_once(
    lanes: TrainConfig, base_run: str, tmp_path: Path
) -> None:
    watch = WatchBase(base_run)
    alone = ranks.train(replace(lanes, out_dir=str(tmp_path / "alone")), 1, tmp_path / "alone.log", prepare=watch)
    assert alone.is_done, alone.said
    expected = final_state(str(tmp_path / "alone"))
    trained_bytes = sum(tensor.nbytes for tensor in expected.model.values())
    base = checkpoints_in(base_run).select("latest")
    assert 4 * trained_bytes < sum(record.size_bytes for record in base.model_files.values())

    fault = Fault("exchanged", KILLED_AT, 1, tmp_path / "fired")
    killed = ranks.train(lanes, 3, tmp_path / "killed.log", [fault], prepare=watch)
    assert fault.marker.exists(), "the fault did not fire"
    assert killed.codes[1] == -signal.SIGKILL
    assert readers(killed) == {0}
    rescued = list(states_in_memory(lanes))
    assert max(state.iter_num for state in rescued) == KILLED_AT
    check_holds_adapters_alone(rescued, trained_bytes)

    again = ranks.train(lanes, 2, tmp_path / "again.log", prepare=watch)
    assert again.is_done, again.said
    assert readers(again) == {0}
    assert held(killed) + held(again) == held(alone) * 5, "all ranks hold the same bits"
    assert computed(lanes) == [*range(lanes.max_iters)], "each step once"
    assert tensors_equal(final_state(lanes.out_dir), expected)
    check_holds_adapters_alone(checkpoints_in(lanes.out_dir).newest_first(), trained_bytes)
