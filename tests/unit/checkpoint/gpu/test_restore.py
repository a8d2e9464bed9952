"""Restoring a state to a GPU: through a stream of its own, read by one rank of each node."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import pytest
import torch

from orchestrator.checkpoint.restore import restore, staging
from orchestrator.checkpoint.restore.init_from import scratch_args
from orchestrator.checkpoint.restore.overlap import Overlap, overlaps
from orchestrator.checkpoint.restore.read_plan import Source, plan_reads
from orchestrator.checkpoint.restore.staging import Staging
from orchestrator.checkpoint.save.saver import Saver
from orchestrator.checkpoint.snapshot import tensors_equal
from orchestrator.checkpoint.state import TrainState, build_state, capture
from orchestrator.checkpoint.store import Checkpoint
from orchestrator.checkpoint.tensor_file import bytes_of
from orchestrator.checkpoint.tensor_slice import by_tensor, replicate
from orchestrator.config import TrainConfig
from orchestrator.distributed.world import World
from tests.support.fake_cuda import FakeCuda
from tests.support.gpu_savers import DEVICE, Start, in_a_thread
from tests.support.runs import checkpoints_in


def refill(saver: Saver, config: TrainConfig) -> TrainState:
    """Build another state and fill it with the newest in node memory."""
    world, store = saver.rescuer._world, checkpoints_in(config.out_dir)
    ((_, places),) = restore._in_memory(world, saver._memory._nodes).items()
    state = build_state(replace(config, seed=2), scratch_args(config, 64), World())
    assert restore.fill_from(state, places, world, store, model_only=False)
    return state


@pytest.mark.parametrize("piece_bytes", [16 * 2**20, 1000])
def test_what_is_restored_goes_through_a_stream_of_its_own(
    start: Start, cuda: FakeCuda, tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch, piece_bytes: int
) -> None:
    saver = start()
    assert in_a_thread(saver.rescue) == [7]
    monkeypatch.setattr(staging, "_PIECE_BYTES", piece_bytes)
    cuda.calls.clear()
    state = refill(saver, tiny)
    assert tensors_equal(capture(state), capture(saver.rescuer._state))
    by_reader = [call for call in cuda.calls if call.thread.startswith("restore")]
    assert (by_reader[0].name, by_reader[0].what) == ("set_device", 1)
    (stream,) = {call.what for call in cuda.of("Stream")}
    assert {call.what for call in by_reader if call.name in ("stream", "Stream.synchronize")} == {stream}
    names = [call.name for call in by_reader]
    assert names.index("Event.wait") < names.index("stream"), "not before the tensors are there"
    assert names[-1] == "Stream.synchronize", "nothing is sent on before it has arrived"
    assert cuda.of("pin_memory") == [replace(cuda.of("pin_memory")[0], what=piece_bytes)] * 2


def test_a_buffer_is_filled_again_when_it_has_been_sent(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "_PIECE_BYTES", 4)
    moving = Staging(DEVICE, cuda.current_stream(DEVICE).record_event())
    tensor = torch.zeros(5)
    cuda.calls.clear()
    for i, piece in enumerate(moving.pieces(tensor)):
        piece[:] = bytes_of(torch.tensor(float(i + 1)))
    assert tensor.tolist() == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert cuda.names() == ["Event.synchronize", "stream", "Event.record"] * 5
    waited = [call.what for call in cuda.of("Event.synchronize")]
    assert waited[:2] == [None, None], "nothing is on its way in them yet"
    assert None not in waited[2:]


def wanted_by_all(files: Iterable[str], world_size: int) -> dict[str, list[Overlap]]:
    slices = replicate({"w": torch.zeros(3)}, world_size)
    return {file: list(overlaps(slices, by_tensor(slices))) for file in files}


def places_of(layout: str) -> list[Source]:
    """Return a state's places, in the memory of every node: "001" are two ranks on node 0 and one on node 1."""
    records = {f"{kind}-{i}": {"size_bytes": size, "xxh3_128": ""} for kind, size in (("m", 1), ("o", 2)) for i in "01"}
    checkpoint = Checkpoint("c", {"files": records})
    ranks = {node: tuple(i for i, its in enumerate(layout) if its == node) for node in sorted(set(layout))}
    folders = dict.fromkeys(records, "folder")
    return [Source(f"node {node}", its, checkpoint, folders) for node, its in ranks.items()]


@pytest.mark.parametrize(
    ("layout", "readers"),
    [
        ("0011", [{0, 2}, {1, 3}, {0, 2}, {1, 3}]),
        ("01", [{0, 1}, {0, 1}, {0, 1}, {0, 1}]),
        ("00", [{0}, {1}, {0}, {1}]),
        ("001", [{0, 2}, {1, 2}, {0, 2}, {1, 2}]),
    ],
)
def test_where_every_node_has_the_state_one_rank_of_each_reads_it(layout: str, readers: list[set[int]]) -> None:
    places = places_of(layout)
    files = places[0].checkpoint.files
    wanted = wanted_by_all(files, len(layout))
    plan = plan_reads(files, wanted, places, {}, World(size=len(layout), device=DEVICE))
    assert [set(plan[file]) for file in sorted(files, key=lambda file: (-files[file].size_bytes, file))] == readers
    for its in plan.values():
        assert all(rank in place.ranks for rank, place in its.items())
    on_cpus = plan_reads(files, wanted, places, {}, World(size=len(layout)))
    assert all(set(its) == set(range(len(layout))) for its in on_cpus.values())


def test_a_file_that_one_node_lacks_is_read_by_one_for_all() -> None:
    places = places_of("001")
    refused = {"m-0": {"node 0": "is damaged"}}
    files = places[0].checkpoint.files
    plan = plan_reads(files, wanted_by_all(files, 3), places, refused, World(size=3, device=DEVICE))
    assert set(plan["m-0"]) == {2}
    assert all(len(plan[file]) == 2 for file in ("m-1", "o-0", "o-1"))
