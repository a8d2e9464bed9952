"""Which elements of saved slices are wanted by whom, and which rank reads them."""

from __future__ import annotations

import pytest
import torch

from orchestrator.checkpoint.restore.overlap import overlaps
from orchestrator.checkpoint.restore.read_plan import Source, plan_reads
from orchestrator.checkpoint.store import Checkpoint
from orchestrator.checkpoint.tensor_slice import by_tensor, replicate
from orchestrator.distributed.world import World
from tests.support.sharding import shard_moments

MOMENT = {"exp_avg.w": torch.arange(20.0).view(4, 5)}


@pytest.mark.parametrize("before", [1, 2, 3, 7])
@pytest.mark.parametrize("after", [1, 2, 3, 7])
def test_every_element_goes_to_its_place(before: int, after: int) -> None:
    saved = shard_moments(MOMENT, before)
    wanted = shard_moments({"exp_avg.w": torch.zeros(4, 5)}, after)
    found = list(overlaps(saved, by_tensor(wanted)))
    assert all(each.start < each.end for each in found)
    for each in found:
        each.live.copy_(each.within(each.saved.tensor).view_as(each.live))
    assert torch.equal(torch.cat([each.tensor for each in wanted]), torch.arange(20.0))
    assert sum(each.end - each.start for each in found) == 20, "none comes twice"


def test_a_slice_that_is_wanted_as_it_is_goes_straight_into_its_place() -> None:
    saved, wanted = shard_moments(MOMENT, 3), shard_moments({"exp_avg.w": torch.zeros(4, 5)}, 3)
    for each, slot in zip(overlaps(saved, by_tensor(wanted)), wanted, strict=True):
        assert each.live is slot.tensor
    (whole,) = overlaps(saved[:1], {"exp_avg.w": replicate({"exp_avg.w": torch.zeros(4, 5)}, 2)})
    assert whole.live.is_contiguous()
    assert whole.live.shape == (7,)


def test_who_wants_most_of_a_file_reads_it_from_the_nearest_source() -> None:
    files = {f"o-{i}": {"size_bytes": 9, "xxh3_128": ""} for i in range(3)}
    checkpoint = Checkpoint("c", {"files": files})
    storage = Source("storage", (0, 1, 2), checkpoint, dict.fromkeys(files, "folder"), is_storage=True)
    memory = Source("the memory of rank 0's node", (0, 1), checkpoint, {"o-2": "folder"}, is_storage=False)
    wanted = by_tensor(shard_moments(MOMENT, 3))
    parts = {f"o-{i}": list(overlaps([each], wanted)) for i, each in enumerate(reversed(shard_moments(MOMENT, 3)))}
    plan = plan_reads(checkpoint.files, parts, [storage], {}, World(size=3))
    assert plan == {"o-0": {2: storage}, "o-1": {1: storage}, "o-2": {0: storage}}
    plan = plan_reads(checkpoint.files, parts, [memory, storage], {"o-1": {"storage": "is damaged"}}, World(size=3))
    assert plan == {"o-0": {2: storage}, "o-2": {0: memory}}
    parts["o-2"] = list(overlaps([shard_moments(MOMENT, 3)[2]], wanted))
    plan = plan_reads(checkpoint.files, parts, [memory, storage], {}, World(size=3))
    assert plan["o-2"] == {0: memory}, "rank 2 wants it, and cannot reach that memory"
