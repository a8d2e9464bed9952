"""Who holds, writes and keeps what, with a second placement: weights on every rank, moments in flat ranges."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from fsspec.implementations.local import LocalFileSystem

from model import GPT, GPTConfig
from orchestrator.checkpoint.save.node_topology import NodeTopology
from orchestrator.checkpoint.save.plan import SavePlan, owners, plan_save, rank_of
from orchestrator.checkpoint.snapshot import tensors_equal
from orchestrator.checkpoint.state import TrainState, capture
from orchestrator.checkpoint.tensor_file import tensor_pieces, write_file
from orchestrator.checkpoint.tensor_slice import TensorSlice, assemble, replicate
from orchestrator.distributed.world import World
from orchestrator.errors import CheckpointError
from tests.support.runs import checkpoints_in
from tests.support.sharding import shard_moments

RANKS = 3
SHAPE = GPTConfig(block_size=4, vocab_size=7, n_layer=1, n_head=1, n_embd=4)


def as_rank_sees_it(rank: int) -> TrainState:
    """Return a state of which this rank holds its slices only: it has other values in the place of the others'."""
    torch.manual_seed(1)
    model = GPT(SHAPE)
    optimizer = model.configure_optimizers(0.1, 1e-2, (0.9, 0.95), "cpu")
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    state = TrainState(model, optimizer, torch.amp.GradScaler("cpu", enabled=False), {}, iter_num=5)
    if rank >= 0:
        state.placement = shard_moments
        for each in shard_moments(capture(state).optimizer, RANKS):
            if rank not in each.holders:
                each.tensor.fill_(torch.nan)
    return state


def plan_of(rank: int) -> SavePlan:
    return plan_save(as_rank_sees_it(rank), World(rank, RANKS, attempt="a"), {}, None)


def test_every_slice_is_written_once_by_a_rank_that_holds_it() -> None:
    plans = [plan_of(rank) for rank in range(RANKS)]
    assert [list(plan.files) for plan in plans[1:]] == [list(plans[0].files)] * 2, "all plan alike"
    slices = [(file, each) for file, slices in plans[0].files.items() for each in slices.values()]
    assert len({each.key for _, each in slices}) == len(slices)
    assert all(rank_of(file) in each.holders for file, each in slices)
    load = [sum(each.tensor.nbytes for file, each in slices if rank_of(file) == rank) for rank in range(RANKS)]
    largest = max(each.tensor.nbytes for _, each in slices)
    assert max(load) - min(load) <= largest


def test_a_checkpoint_of_slices_is_read_as_whole_tensors(tmp_path: Path) -> None:
    store, plan = checkpoints_in(str(tmp_path)), plan_of(0)
    (tmp_path / plan.name).mkdir()
    records = {}
    for rank in range(RANKS):
        for file, tensors in plan_of(rank).files_of(rank).items():
            record = write_file(LocalFileSystem(), store.folder.path(plan.name, file), tensor_pieces(tensors))
            records[file] = asdict(record)
    store.commit(plan.name, {**plan.description, "files": records}, "local")
    whole = capture(as_rank_sees_it(-1))
    assert tensors_equal(store.read(store.select()), whole)
    assert tensors_equal(store.read(store.select(), model_only=True), replace(whole, optimizer={}))


def test_a_node_keeps_the_slices_that_its_ranks_hold() -> None:
    files = plan_of(0).files
    ids = ("x", "x", "y")
    kept = [NodeTopology(None, ids, rank).share_of(files) for rank in range(RANKS)]
    assert all(
        rank in each.holders for rank in range(RANKS) for slices in kept[rank].values() for each in slices.values()
    )
    optimizer_of_2 = next(file for file in files if file.startswith("optimizer-00002"))
    assert optimizer_of_2 in kept[2]
    assert optimizer_of_2 not in {**kept[0], **kept[1]}
    model_of_2 = next(file for file in files if file.startswith("model-00002"))
    assert model_of_2 in {**kept[0], **kept[1]}, "weights lie on every node"


def test_a_survivor_writes_no_share_of_which_it_lacks_a_slice() -> None:
    ids = ("x", "x", "x")
    survivor = NodeTopology(None, ids, 0)
    assert [survivor.can_write(plan_of(0).files, share) for share in range(RANKS)] == [True, False, False]
    replicated = plan_save(as_rank_sees_it(-1), World(0, RANKS, attempt="a"), {}, None).files
    assert all(survivor.can_write(replicated, share) for share in range(RANKS))


def test_slices_are_put_together_in_any_order() -> None:
    tensors = {"exp_avg.w": torch.arange(20.0).view(4, 5), "step": torch.tensor(3.0)}
    for world_size in (1, 3, 7):
        slices = shard_moments(tensors, world_size)
        found = assemble(reversed(slices))
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert assemble(replicate(tensors, 4))["step"] is tensors["step"], "nothing is copied"


@pytest.mark.parametrize("damage", ["lacks one", "has one twice", "lacks the last", "is of two shapes"])
def test_what_is_no_whole_tensor_is_refused(damage: str) -> None:
    first, second, third = shard_moments({"exp_avg.w": torch.arange(20.0).view(4, 5)}, 3)
    slices = {
        "lacks one": [first, third],
        "has one twice": [first, second, second, third],
        "lacks the last": [first, second],
        "is of two shapes": [first, second, TensorSlice("exp_avg.w", (5, 4), third.offset, third.tensor, ())],
    }[damage]
    with pytest.raises(CheckpointError, match=r"exp_avg\.w lacks elements"):
        assemble(slices)


def test_a_replicated_tensor_is_owned_as_a_whole() -> None:
    tensors = {"a": torch.zeros(8), "b": torch.zeros(4), "c": torch.zeros(4)}
    assert owners(replicate(tensors, 2), 2) == {"a": 0, "b": 1, "c": 1}
