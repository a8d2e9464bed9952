"""Saving and rescuing a state on a GPU: streams, devices, order, and what the host waits for."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import replace

import pytest
import torch

from orchestrator.checkpoint.save import gpu
from orchestrator.checkpoint.save.node_memory import states_in
from orchestrator.checkpoint.save.policy import SaveStatus
from orchestrator.checkpoint.store import checkpoint_name
from orchestrator.config import TrainConfig
from orchestrator.distributed.join import plain_world
from orchestrator.host.background import BackgroundQueue
from tests.support.fake_cuda import FakeCuda, fake_cuda
from tests.support.gpu_savers import DEVICE, Start, assert_kept, in_a_thread, iterate, kept
from tests.support.savers import settle, step


def test_a_saver_has_two_streams_whatever_it_copies(start: Start, cuda: FakeCuda) -> None:
    """PyTorch deals out the same 32 again and again, NCCL's among them: one of many would be behind a stuck one."""
    saver = start()
    for _ in range(40):
        iterate(saver)
    assert in_a_thread(saver.rescue) == [47]
    made = [call.what for call in cuda.of("Stream")]
    assert [(stream.index, stream.priority) for stream in made] == [(1, -1), (1, -1)]
    assert len(set(made)) == 2


@pytest.mark.parametrize("steps", [0, 1], ids=["before the first step", "after a step"])
def test_a_rescue_waits_for_nothing_of_the_loops_stream(start: Start, cuda: FakeCuda, steps: int) -> None:
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


def test_the_scale_of_float16_is_rescued_as_the_last_change_left_it(start: Start, cuda: FakeCuda) -> None:
    scaler = LoopsOwn()
    saver = start(scaler)
    with saver.state_changing():
        scaler.scale(torch.ones(()))  # its values are on the device from here on
        scaler.update(2.0**7)
        step(saver.rescuer._state)
        saver.rescuer._state.iter_num = 8
    cuda.current_stream(DEVICE).get_stuck()
    assert in_a_thread(saver.rescue) == [8]
    (checkpoint,) = states_in(saver._memory._nodes.memory.path)[checkpoint_name(8, "abc")].values()
    assert checkpoint.state["scaler"] == scaler.state_dict()
    assert checkpoint.state["scaler"]["scale"] == 2.0**7


def test_a_state_is_offered_without_a_wait_for_its_scale(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which `state_dict` would read off the device, behind all of the step."""
    scaler = LoopsOwn()
    saver = start(scaler)
    with saver.state_changing():
        scaler.scale(torch.ones(()))
        scaler.update(2.0**7)
    expected = scaler.state_dict()
    monkeypatch.setattr(scaler, "state_dict", lambda: pytest.fail("it was read"))
    saver._agreed = SaveStatus(is_copying=False, is_uploading=False)
    saver.offer(saver.rescuer._state, None)
    with saver.state_changing():
        scaler.update(2.0**3)
    settle(saver)
    (checkpoint,) = states_in(saver._memory._nodes.memory.path)[checkpoint_name(7, "abc")].values()
    assert checkpoint.state["scaler"] == expected


def test_a_scale_that_only_the_stuck_stream_has_made_is_not_read(start: Start, cuda: FakeCuda) -> None:
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
    start: Start, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    saver = start()
    monkeypatch.setattr(gpu, "_ANSWER_S", 0.05)
    saver._memory.gpu._for_rescues.get_stuck()
    with caplog.at_level(logging.WARNING):
        assert in_a_thread(saver.rescue) == [None]
    assert "the GPU has not answered" in caplog.text


def test_nothing_is_put_behind_a_change_that_does_not_come(
    start: Start, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver = start()
    monkeypatch.setattr(gpu, "_ANSWER_S", 0.05)
    with saver.state_changing():
        cuda.current_stream(DEVICE).get_stuck()
    cuda.calls.clear()
    assert in_a_thread(saver.rescue) == [None]
    assert cuda.of("stream") == []


def test_every_thread_chooses_its_device_before_anything_else(start: Start, cuda: FakeCuda) -> None:
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


def test_a_step_waits_on_the_host_for_the_copy_alone(start: Start, cuda: FakeCuda) -> None:
    """The loop has waited for the gradients already. And so the wait is seen, and counted."""
    saver = start()
    saver._agreed = SaveStatus(is_copying=False, is_uploading=False)
    saver.offer(saver.rescuer._state, None)
    settle(saver)
    saver._memory._copied.result().takes = lambda: time.sleep(0.03)
    cuda.set_device(0)  # whatever is current here, it is this state's device that counts
    cuda.calls.clear()
    paused_s = saver.paused_s
    with saver.state_changing():
        pass
    assert cuda.names() == ["Stream.query", "Event.synchronize", "Event.record"]
    assert [call.what.index for call in cuda.calls] == [1, 1, 1]
    assert saver.paused_s - paused_s >= 0.03
    assert saver._memory.cost.pause_s >= 0.03
    cuda.calls.clear()
    with saver.state_changing():
        pass
    assert cuda.syncs() == [], "no copy is under way"


def test_a_step_is_not_begun_while_gradients_are_on_their_way(start: Start, cuda: FakeCuda) -> None:
    saver = start()
    saver._agreed = SaveStatus(is_copying=False, is_uploading=False)
    saver.offer(saver.rescuer._state, None)
    settle(saver)
    cuda.current_stream(DEVICE).is_busy = True
    cuda.calls.clear()
    with saver.state_changing():
        assert cuda.names() == ["Stream.query", "Stream.synchronize", "Event.synchronize"]
        assert cuda.of("Stream.synchronize")[0].what is cuda.current_stream(DEVICE)


def test_a_snapshot_is_read_behind_the_last_change(start: Start, cuda: FakeCuda) -> None:
    saver = start()
    cuda.calls.clear()
    iterate(saver)
    behind = [call for call in cuda.calls if call.thread == "copy of the state"]
    assert [call.name for call in behind] == ["Event.wait", "stream", "Event.record", "Event.synchronize"]
    assert len({call.what for call in behind}) == 1
    assert saver._memory._copied is None
    assert kept(saver, 7)


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
