from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from orchestrator.checkpoint.restore.init_from import scratch_args
from orchestrator.checkpoint.rollbacks import Rollback, data_iter, is_undone
from orchestrator.checkpoint.snapshot import tensors_equal
from orchestrator.checkpoint.state import build_state
from orchestrator.checkpoint.tensor_slice import TensorSlice, replicate
from orchestrator.config import TrainConfig
from orchestrator.distributed.world import World
from orchestrator.training.guard import Guard, difference, digest_of, spike_of
from tests.conftest import Undisturbed, final_state
from tests.support import ranks
from tests.support.faults import Fault
from tests.support.poison import FlippedBit, Poison
from tests.support.runs import checkpoints_in, metrics_in


def test_spike_of() -> None:
    before = [2.0 + 0.01 * (i % 5) for i in range(50)]
    assert abs(spike_of(2.02, before)) < 1
    assert spike_of(3.0, before) > 20
    assert spike_of(1.0, before) < -20  # a loss that falls is no spike
    assert spike_of(3.0, before[:10]) == 0
    assert spike_of(math.nan, before) == math.inf
    assert spike_of(2.001, [2.0] * 50) == pytest.approx(0.5)  # that never scattered: a thousandth counts as sigma


def test_a_majority_tells_who_is_wrong() -> None:
    assert difference([("a", "n0"), ("a", "n1")]) == ""
    assert difference([("a", "n0"), ("b", "n1"), ("a", "n2")]) == "the weights of rank 1 on n1 differ from the others'"
    assert difference([("a", "n0"), ("b", "n1")]) == "the weights of rank 0 on n0, rank 1 on n1 differ"


def test_a_digest_sees_every_bit() -> None:
    model = nn.Linear(40, 30)
    before = digest_of(model.parameters())
    assert before == digest_of(model.parameters())
    for bit in range(32):
        model.weight.data.view(torch.int32)[3, 7] ^= 1 << bit if bit < 31 else -(1 << 31)
        assert digest_of(model.parameters()) != before
        model.weight.data.view(torch.int32)[3, 7] ^= 1 << bit if bit < 31 else -(1 << 31)
    assert digest_of(model.parameters()) == before


def test_only_weights_that_all_ranks_hold_are_compared(tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank has other numbers in a tensor of which it holds half, and then another number in one that all hold."""
    states = [build_state(tiny, scratch_args(tiny, 11), World()) for _ in range(2)]
    digests: list[str] = []

    def compare(rank: int) -> Rollback | None:
        def gather_json(_world: World, value: list[str]) -> list[list[str]]:
            digests.append(value[0])
            return [[digest, "node"] for digest in digests[-2:]]

        monkeypatch.setattr(World, "gather_json", gather_json)
        return Guard(replace(tiny, replica_check_interval=1), World(rank, 2), states[rank], []).compare_replicas()

    for rank, state in enumerate(states):
        state.placement = shard_positions
        state.model.transformer.wpe.weight.data.add_(rank)
    assert [compare(0), compare(1)] == [None, None]
    states[1].model.transformer.wte.weight.data[3, 4] += 1
    assert compare(0) is None
    assert compare(1) is not None


def shard_positions(tensors: Mapping[str, torch.Tensor], world_size: int) -> list[TensorSlice]:
    """Each rank holds a part of the position embeddings, and all the rest."""
    slices = replicate(tensors, world_size)
    (whole,) = [each for each in slices if each.name == "transformer.wpe.weight"]
    parts = whole.tensor.reshape(-1).chunk(world_size)
    shards = [replace(whole, offset=i * len(part), tensor=part, holders=(i,)) for i, part in enumerate(parts)]
    return [each for each in slices if each is not whole] + shards


def test_what_a_rollback_undoes_and_skips() -> None:
    rollbacks = [Rollback(8, 5, ""), Rollback(16, 0, ""), Rollback(8, 3, "")]
    assert [data_iter(i, rollbacks) for i in (7, 8, 16)] == [7, 16, 24]
    assert not is_undone({"iter_num": 8}, rollbacks)
    assert is_undone({"iter_num": 9}, rollbacks)
    assert is_undone({"iter_num": 12, "guard": {"rollbacks": 2}}, rollbacks)
    assert not is_undone({"iter_num": 12, "guard": {"rollbacks": 3}}, rollbacks)


def records(config: TrainConfig, kind: str) -> list[dict[str, object]]:
    return [record for record in metrics_in(config.out_dir) if record["kind"] == kind]


def guard_of(config: TrainConfig) -> dict[str, object]:
    store = checkpoints_in(config.out_dir)
    return dict(store.select("latest").state["guard"])


def test_a_bad_step_is_skipped_by_all_ranks_and_again_after_a_kill(tiny: TrainConfig, tmp_path: Path) -> None:
    poison = Poison(1, frozenset({5, 9, 10, 11}))
    calm, shaken = (replace(tiny, out_dir=str(tmp_path / name)) for name in ("calm", "shaken"))
    assert ranks.train(calm, 3, tmp_path / "log", prepare=poison).is_done
    assert [record["iter"] for record in records(calm, "step_skipped")] == [5, 9, 10, 11]
    assert guard_of(calm) == {"skipped": 4, "in_a_row": 0, "losses": [], "rollbacks": 0}
    fault = Fault("forward", 11, 2, tmp_path / "fired")
    assert not ranks.train(shaken, 3, tmp_path / "log1", [fault], prepare=poison).is_done
    assert ranks.train(shaken, 3, tmp_path / "log2", prepare=poison).is_done
    assert guard_of(shaken) == guard_of(calm)
    assert tensors_equal(final_state(shaken.out_dir), final_state(calm.out_dir))


def test_many_bad_steps_go_back_to_a_checkpoint_and_skip_their_data(tiny: TrainConfig, tmp_path: Path) -> None:
    poison = Poison(1, frozenset(range(10, 16)))
    calm, shaken = (replace(tiny, out_dir=str(tmp_path / name), max_bad_steps=3) for name in ("calm", "shaken"))
    assert ranks.train(calm, 3, tmp_path / "log", prepare=poison).is_done
    # iteration 8 uses the data of 13 then: those of 13 to 15 are bad as well
    entries = json.loads(Path(calm.out_dir, "rollbacks.json").read_text())["rollbacks"]
    assert [(entry["to_iter"], entry["skipped_iters"]) for entry in entries] == [(8, 5), (8, 3)]
    assert len(records(calm, "rollback")) == 2
    assert [record["iter"] for record in records(calm, "step_skipped")] == [8, 9, 10, 10, 11, 12]
    fault = Fault("forward", 11, 2, tmp_path / "fired")
    assert not ranks.train(shaken, 3, tmp_path / "log1", [fault], prepare=poison).is_done
    assert ranks.train(shaken, 3, tmp_path / "log2", prepare=poison).is_done
    assert tensors_equal(final_state(shaken.out_dir), final_state(calm.out_dir))


def test_a_run_that_goes_wrong_on_any_data_is_stopped(tiny: TrainConfig, tmp_path: Path) -> None:
    config = replace(tiny, max_bad_steps=2)
    ended = ranks.train(config, 2, tmp_path / "log", prepare=Poison(0, frozenset(range(10, 1000))))
    assert not ended.is_done
    assert "after training went back to iteration 8 3 times already" in ended.said


def test_a_loss_spike_is_skipped(tiny: TrainConfig, tmp_path: Path) -> None:
    config = replace(tiny, max_iters=60, lr_decay_iters=60, loss_spike_z=20.0)
    assert ranks.train(config, 3, tmp_path / "log", prepare=Poison(2, frozenset({50}), value=100.0)).is_done
    assert [record["iter"] for record in records(config, "step_skipped")] == [50]


@pytest.mark.slow
def test_a_flipped_bit_is_found_and_undone(tiny: TrainConfig, tmp_path: Path, undisturbed: Undisturbed) -> None:
    config = replace(tiny, replica_check_interval=6)
    flip = FlippedBit(1, 15, str(tmp_path / "flipped"))
    ended = ranks.train(config, 3, tmp_path / "log", prepare=flip)
    assert ended.is_done, ended.said
    assert Path(flip.marker).exists()
    (rollback,) = records(config, "rollback")
    assert "rank 1 on" in str(rollback["why"])
    assert (rollback["to_iter"], rollback["skipped_iters"]) == (12, 0)
    assert tensors_equal(final_state(config.out_dir), undisturbed(tiny, 3))
