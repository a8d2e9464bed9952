"""What is done on a GPU, without one: which streams and devices, in which order, and what the host waits for."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fsspec.implementations.local import LocalFileSystem
from torch import Tensor

from orchestrator.checkpoint.restore import restore, staging
from orchestrator.checkpoint.restore.init_from import scratch_args
from orchestrator.checkpoint.restore.read_plan import Source, plan_reads
from orchestrator.checkpoint.restore.staging import Staging
from orchestrator.checkpoint.save import gpu, pinning
from orchestrator.checkpoint.save.background import BackgroundQueue
from orchestrator.checkpoint.save.node_memory import NodeMemory, states_in
from orchestrator.checkpoint.save.node_topology import NodeTopology
from orchestrator.checkpoint.save.pinning import Pinned, address_of, between_borders
from orchestrator.checkpoint.save.policy import SaveIntervals, SaveStatus
from orchestrator.checkpoint.save.saver import Saver
from orchestrator.checkpoint.snapshot import tensors_equal
from orchestrator.checkpoint.state import TrainState, build_state, capture
from orchestrator.checkpoint.store import Checkpoint, checkpoint_name
from orchestrator.checkpoint.tensor_file import bytes_of, read_tensors
from orchestrator.config import TrainConfig
from orchestrator.distributed.join import plain_world
from orchestrator.distributed.world import World
from tests.support.fake_cuda import FakeCuda, fake_cuda
from tests.support.runs import checkpoints_in
from tests.unit.checkpoint.test_rescue import settle, step

DEVICE = torch.device("cuda", 1)
StartingPoint = Callable[..., Saver]


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """Two GPUs, of which this process has the second, as its loop's thread knows."""
    cuda = fake_cuda(monkeypatch)
    cuda.set_device(DEVICE)
    return cuda


@pytest.fixture
def start(cuda: FakeCuda, tiny: TrainConfig, memory_dir: str, tmp_path: Path) -> StartingPoint:  # noqa: ARG001
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


def iterate(saver: Saver) -> None:
    """Offer the state, and change it."""
    assert saver._rescuer._state
    saver._agreed = SaveStatus(is_copying=False, is_uploading=False)
    saver.offer(saver._rescuer._state, None)
    with saver.state_changing():
        step(saver._rescuer._state)
        saver._rescuer._state.iter_num += 1
    settle(saver)


def in_a_thread(call: Callable[[], object], name: str = "rescue") -> list[object]:
    """Call it as the controller's wish does; return what it returned."""
    answers: list[object] = []
    thread = threading.Thread(target=lambda: answers.append(call()), name=name, daemon=True)
    thread.start()
    thread.join(20)
    return answers


def kept(saver: Saver, iter_num: int) -> dict[str, Tensor]:
    """Read a state from node memory."""
    assert saver._memory._nodes.memory
    name = checkpoint_name(iter_num, "abc")
    (checkpoint,) = states_in(saver._memory._nodes.memory.path)[name].values()
    folder = saver._memory._nodes.memory.share_path(name, 0, 1)
    found = {}
    for file, record in checkpoint.files.items():
        found |= read_tensors(LocalFileSystem(), f"{folder}/{file}", record)
    return found


def assert_kept(saver: Saver, iter_num: int) -> None:
    assert saver._rescuer._state
    live = capture(saver._rescuer._state, scaler={})
    expected = {**live.model, **live.optimizer}
    found = kept(saver, iter_num)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_saver_has_two_streams_whatever_it_copies(start: StartingPoint, cuda: FakeCuda) -> None:
    """PyTorch deals out the same 32 again and again, NCCL's among them: one of many would be behind a stuck one."""
    saver = start()
    for _ in range(40):
        iterate(saver)
    assert in_a_thread(saver.rescue) == [47]
    made = [call.what for call in cuda.of("Stream")]
    assert [(stream.index, stream.priority) for stream in made] == [(1, -1), (1, -1)]
    assert len(set(made)) == 2


@pytest.mark.parametrize("steps", [0, 1], ids=["before the first step", "after a step"])
def test_a_rescue_waits_for_nothing_of_the_loops_stream(start: StartingPoint, cuda: FakeCuda, steps: int) -> None:
    saver = start()
    for _ in range(steps):
        iterate(saver)
    cuda.current_stream(DEVICE).get_stuck()
    cuda.calls.clear()
    assert in_a_thread(saver.rescue) == [7 + steps]
    assert_kept(saver, 7 + steps)
    assert cuda.syncs("rescue") == []
    assert {call.what.priority for call in cuda.of("stream")} == {-1}


class LoopsOwn(torch.amp.GradScaler):
    """One whose values can be asked for by the thread that made it alone: on a GPU others would wait for its stream."""

    def __init__(self) -> None:
        super().__init__("cpu", init_scale=2.0**10)
        self.thread = threading.current_thread()

    def state_dict(self) -> dict[str, object]:
        assert threading.current_thread() is self.thread
        return super().state_dict()


def test_the_scale_of_float16_is_rescued_as_the_last_change_left_it(start: StartingPoint, cuda: FakeCuda) -> None:
    scaler = LoopsOwn()
    saver = start(scaler)
    with saver.state_changing():
        scaler.scale(torch.ones(()))  # its values are on the device from here on
        scaler.update(2.0**7)
        step(saver._rescuer._state)
        saver._rescuer._state.iter_num = 8
    cuda.current_stream(DEVICE).get_stuck()
    assert in_a_thread(saver.rescue) == [8]
    (checkpoint,) = states_in(saver._memory._nodes.memory.path)[checkpoint_name(8, "abc")].values()
    assert checkpoint.state["scaler"] == scaler.state_dict()
    assert checkpoint.state["scaler"]["scale"] == 2.0**7


def test_a_state_is_offered_without_a_wait_for_its_scale(start: StartingPoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which `state_dict` would read off the device, behind all of the step."""
    scaler = LoopsOwn()
    saver = start(scaler)
    with saver.state_changing():
        scaler.scale(torch.ones(()))
        scaler.update(2.0**7)
    expected = scaler.state_dict()
    monkeypatch.setattr(scaler, "state_dict", lambda: pytest.fail("it was read"))
    saver._agreed = SaveStatus(is_copying=False, is_uploading=False)
    saver.offer(saver._rescuer._state, None)
    with saver.state_changing():
        scaler.update(2.0**3)
    settle(saver)
    (checkpoint,) = states_in(saver._memory._nodes.memory.path)[checkpoint_name(7, "abc")].values()
    assert checkpoint.state["scaler"] == expected


def test_a_scale_that_only_the_stuck_stream_has_made_is_not_read(start: StartingPoint, cuda: FakeCuda) -> None:
    """It is made with the first loss that is scaled, behind what is stuck: until then the host knows it."""
    scaler = LoopsOwn()
    saver = start(scaler)
    before = scaler.state_dict()
    cuda.current_stream(DEVICE).get_stuck()
    scaler.scale(torch.ones(()))
    scaler._scale.fill_(-1.0)
    assert in_a_thread(saver.rescue) == [7]
    (checkpoint,) = states_in(saver._memory._nodes.memory.path)[checkpoint_name(7, "abc")].values()
    assert checkpoint.state["scaler"] == before


def test_a_gpu_that_does_not_answer_ends_the_rescue(
    start: StartingPoint, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    saver = start()
    monkeypatch.setattr(gpu, "_ANSWER_S", 0.05)
    saver._memory.gpu._for_rescues.get_stuck()
    with caplog.at_level(logging.WARNING):
        assert in_a_thread(saver.rescue) == [None]
    assert "the GPU has not answered" in caplog.text


def test_nothing_is_put_behind_a_change_that_does_not_come(
    start: StartingPoint, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver = start()
    monkeypatch.setattr(gpu, "_ANSWER_S", 0.05)
    with saver.state_changing():
        cuda.current_stream(DEVICE).get_stuck()
    cuda.calls.clear()
    assert in_a_thread(saver.rescue) == [None]
    assert cuda.of("stream") == []


def test_every_thread_chooses_its_device_before_anything_else(start: StartingPoint, cuda: FakeCuda) -> None:
    """A new thread is on the first GPU, where most calls would take memory for a context of this process."""
    saver = start()
    saver._agreed = SaveStatus(is_copying=False, is_uploading=False)
    saver._scheduler.owed = 7
    iterate(saver)
    in_a_thread(saver.rescue, "watchdog")
    saver.close(is_finished=False)
    threads = {call.thread for call in cuda.calls} - {threading.current_thread().name}
    assert threads >= {"copy of the state", "upload of a checkpoint", "pinning", "watchdog"}
    for thread in threads:
        first = next(call for call in cuda.calls if call.thread == thread)
        assert (first.name, first.what) == ("set_device", 1), thread
    assert {call.device for call in cuda.calls} == {1}


def test_a_step_waits_on_the_host_for_the_copy_alone(start: StartingPoint, cuda: FakeCuda) -> None:
    """The loop has waited for the gradients already. And so the wait is seen, and counted."""
    saver = start()
    saver._agreed = SaveStatus(is_copying=False, is_uploading=False)
    saver.offer(saver._rescuer._state, None)
    settle(saver)
    saver._memory._copy._done.takes = lambda: time.sleep(0.03)
    cuda.set_device(0)  # whatever is current here, it is this state's device that counts
    cuda.calls.clear()
    paused_s = saver.paused_s
    with saver.state_changing():
        pass
    assert cuda.names() == ["Stream.query", "Event.synchronize", "Event.record"]
    assert [call.what.index for call in cuda.calls] == [1, 1, 1]
    assert saver.paused_s - paused_s >= 0.03
    assert saver._memory.cost._pause_s >= 0.03
    cuda.calls.clear()
    with saver.state_changing():
        pass
    assert cuda.syncs() == [], "no copy is under way"


def test_a_step_is_not_begun_while_gradients_are_on_their_way(start: StartingPoint, cuda: FakeCuda) -> None:
    saver = start()
    saver._agreed = SaveStatus(is_copying=False, is_uploading=False)
    saver.offer(saver._rescuer._state, None)
    settle(saver)
    cuda.current_stream(DEVICE).is_busy = True
    cuda.calls.clear()
    with saver.state_changing():
        assert cuda.names() == ["Stream.query", "Stream.synchronize", "Event.synchronize"]
        assert cuda.of("Stream.synchronize")[0].what is cuda.current_stream(DEVICE)


def test_a_snapshot_is_read_behind_the_last_change(start: StartingPoint, cuda: FakeCuda) -> None:
    saver = start()
    cuda.calls.clear()
    iterate(saver)
    behind = [call for call in cuda.calls if call.thread == "copy of the state"]
    assert [call.name for call in behind] == ["Event.wait", "stream", "Event.record", "Event.synchronize"]
    assert len({call.what for call in behind}) == 1
    assert saver._memory._copy is None
    assert kept(saver, 7)


def test_borders_lie_at_multiples_of_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pinning, "_BORDER_BYTES", 4096)
    content = memoryview(bytearray(os.urandom(3 * 4096 + 5)))[100:]
    pieces = list(between_borders(content))
    assert b"".join(pieces) == bytes(content)
    assert all(address_of(piece) % 4096 == 0 for piece in pieces[1:])
    assert all(address_of(p) // 4096 == (address_of(p) + len(p) - 1) // 4096 for p in pieces)


def test_no_copy_lies_in_two_registrations(
    start: StartingPoint, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pinning, "_BORDER_BYTES", 8192)
    targets: list[tuple[int, int]] = []
    put = torch.frombuffer

    def noted(buffer: memoryview, **options: object) -> Tensor:
        targets.append((address_of(buffer), len(buffer)))
        return put(buffer, **options)

    saver = start()
    pinned = dict(cuda.registered)
    monkeypatch.setattr(torch, "frombuffer", noted)
    iterate(saver)
    monkeypatch.undo()
    whole = {
        address_of(content): len(content) for slot in saver._memory.pool.buffers for content in slot.contents().values()
    }
    assert sum(pinned.values()) == sum(whole.values())
    assert len(pinned) > 2 * len(whole) > 0
    assert targets
    for address, size in targets:
        assert any(at <= address and address + size <= at + its for at, its in pinned.items())


def test_a_piece_that_cannot_be_pinned_is_told_of_once(
    cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(pinning, "_BORDER_BYTES", 2**20)
    content = torch.empty(4 * 2**20, dtype=torch.uint8)
    content = content[-address_of(content.numpy().data) % 2**20 :][: 3 * 2**20].numpy().data
    cuda.refused = {1: 801, 3: 801}
    pinned = Pinned(DEVICE)
    with caplog.at_level(logging.WARNING):
        pinned.pin([content])
        pinned.pin([memoryview(bytearray(2**20))])
    assert [record.getMessage() for record in caplog.records] == [
        "0.00 of 0.00 GB of node memory cannot be pinned (CUDA error 801): copies of the state are slower"
    ]
    assert {address_of(content), address_of(content) + 2 * 2**20} <= cuda.registered.keys(), "the others are"
    assert {call.thread for call in cuda.of("cudaHostRegister")} == {"pinning"}, "whose pending error ends with it"
    pinned.unpin()
    assert cuda.registered == {}


def test_what_is_pinned_is_taken_back_when_the_saver_ends(start: StartingPoint, cuda: FakeCuda) -> None:
    saver = start()
    iterate(saver)
    assert cuda.registered
    saver.close(is_finished=False)
    settle(saver)
    assert cuda.registered == {}


def test_a_rescue_waits_for_no_pinning(start: StartingPoint, cuda: FakeCuda) -> None:
    """Which takes seconds for a large state, and may be stuck itself where a collective is."""
    is_stuck = threading.Event()
    cuda.registering = lambda: is_stuck.wait(20)
    saver = start(is_settled=False)
    assert in_a_thread(saver.rescue) == [7]
    assert_kept(saver, 7)
    assert len(saver._memory.pool.buffers) == 1, "one is enough"
    is_stuck.set()


def test_no_more_is_pinned_than_is_wanted(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pinning, "_BORDER_BYTES", 4096)
    cuda.registering = lambda: wanted.pop()
    wanted = [True, True]
    Pinned(DEVICE).pin([memoryview(bytearray(10 * 4096))], lambda: bool(wanted))
    assert 1 <= len(cuda.registered) <= 2


def refill(saver: Saver, config: TrainConfig) -> TrainState:
    """Build another state and fill it with the newest in node memory."""
    world, store = saver._rescuer._world, checkpoints_in(config.out_dir)
    ((_, places),) = restore._in_memory(world, saver._memory._nodes).items()
    state = build_state(replace(config, seed=2), scratch_args(config, 64), World())
    assert restore.fill_from(state, places, world, store, model_only=False)
    return state


@pytest.mark.parametrize("piece_bytes", [16 * 2**20, 1000])
def test_what_is_restored_goes_through_a_stream_of_its_own(
    start: StartingPoint, cuda: FakeCuda, tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch, piece_bytes: int
) -> None:
    saver = start()
    assert in_a_thread(saver.rescue) == [7]
    monkeypatch.setattr(staging, "_PIECE_BYTES", piece_bytes)
    cuda.calls.clear()
    state = refill(saver, tiny)
    assert tensors_equal(capture(state), capture(saver._rescuer._state))
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
    plan = plan_reads(files, places, {}, World(size=len(layout), device=DEVICE))
    assert [set(plan[file]) for file in sorted(files, key=lambda file: (-files[file].size_bytes, file))] == readers
    for its in plan.values():
        assert all(rank in place.ranks for rank, place in its.items())
    on_cpus = plan_reads(files, places, {}, World(size=len(layout)))
    assert all(set(its) == set(range(len(layout))) for its in on_cpus.values())


def test_a_file_that_one_node_lacks_is_read_by_one_for_all() -> None:
    places = places_of("001")
    refused = {"m-0": {"node 0": "is damaged"}}
    plan = plan_reads(places[0].checkpoint.files, places, refused, World(size=3, device=DEVICE))
    assert set(plan["m-0"]) == {2}
    assert all(len(plan[file]) == 2 for file in ("m-1", "o-0", "o-1"))


@pytest.mark.parametrize(("device", "index"), [("cuda:1", 1), ("cuda", 0)])
def test_a_plain_process_makes_its_device_the_current_one(
    tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch, device: str, index: int
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    cuda = fake_cuda(monkeypatch)
    assert plain_world(replace(tiny, device=device)).device == torch.device("cuda", index)
    assert cuda.current_device() == index


def test_a_thread_that_cannot_begin_still_answers() -> None:
    """Else who waits for what it has submitted would wait for ever."""
    thread = BackgroundQueue("broken", lambda: 1 // 0)
    assert thread.submit(lambda: 7).result(10) == 7
    thread.close()
