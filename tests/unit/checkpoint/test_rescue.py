"""Rescue of the state by the survivors of a node, each of which knows only what lies in the node's memory."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fsspec.implementations.local import LocalFileSystem

from orchestrator.checkpoint.restore.init_from import scratch_args
from orchestrator.checkpoint.save import rescue, to_storage
from orchestrator.checkpoint.save.node_memory import NodeMemory, share_path, states_in
from orchestrator.checkpoint.save.node_topology import NodeTopology
from orchestrator.checkpoint.save.policy import SaveIntervals, SaveStatus
from orchestrator.checkpoint.save.saver import Saver
from orchestrator.checkpoint.state import build_state, capture
from orchestrator.checkpoint.store import checkpoint_name
from orchestrator.checkpoint.tensor_file import read_tensors
from orchestrator.config import TrainConfig
from orchestrator.distributed.world import World
from tests.support.runs import checkpoints_in
from tests.support.savers import settle, step

ATTEMPT = "abc"
Start = Callable[[int, int], Saver]


@pytest.fixture
def start(tiny: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    """Start a rank of a node of `shares` ranks: its state is at the iteration that is given."""
    monkeypatch.setattr(World, "side_group", lambda self: self)  # nothing is sent in a rescue

    def start(rank: int, iter_num: int, shares: int = 2) -> Saver:
        world = World(rank, shares, attempt=ATTEMPT)
        state = build_state(tiny, scratch_args(tiny, 64), world)
        step(state)
        state.iter_num = iter_num
        nodes = NodeTopology(NodeMemory(str(tmp_path), "run"), ("here",) * shares, rank)
        saver = Saver(state, world, checkpoints_in(tiny.out_dir), nodes, {}, SaveIntervals(100))
        settle(saver)  # room for states is there
        return saver

    return start


def whole(saver: Saver) -> list[str]:
    """Return the states that are whole on this node."""
    assert saver._memory._nodes.memory
    return sorted(states_in(saver._memory._nodes.memory.path))


def end(saver: Saver) -> None:
    """The process is gone: the kernel takes its locks."""
    assert saver._memory._nodes.memory
    saver._memory._nodes.memory.release_liveness_lock()


def test_ranks_of_one_iteration_write_a_share_each(start: Start) -> None:
    savers = [start(0, 7), start(1, 7)]
    threads = [threading.Thread(target=saver.rescue) for saver in savers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert whole(savers[0]) == [checkpoint_name(7, ATTEMPT)]
    assert not any(saver._memory._nodes.memory._stood_in for saver in savers if saver._memory._nodes.memory)


def test_a_survivor_writes_the_share_of_one_that_is_gone_at_once(start: Start) -> None:
    gone, survivor = start(0, 7), start(1, 7)
    end(gone)
    began_s = time.monotonic()
    assert survivor.rescue(stand_in_s=60) == 7
    assert time.monotonic() - began_s < 30, "it waited"
    assert whole(survivor) == [checkpoint_name(7, ATTEMPT)]


def test_a_survivor_waits_a_moment_for_one_that_stands_still(start: Start) -> None:
    start(0, 7)
    survivor = start(1, 7)
    assert survivor.rescue() == 7
    assert whole(survivor) == [checkpoint_name(7, ATTEMPT)]


def test_of_two_iterations_the_later_one_becomes_whole(start: Start) -> None:
    behind, ahead = start(0, 7), start(1, 8)
    threads = [threading.Thread(target=saver.rescue) for saver in (behind, ahead)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert whole(ahead)[-1] == checkpoint_name(8, ATTEMPT)


def test_what_was_rescued_are_the_bits_of_the_state(start: Start) -> None:
    gone, survivor = start(0, 7), start(1, 7)
    end(gone)
    survivor.rescue()
    assert survivor._memory._nodes.memory
    expected = capture(survivor.rescuer._state)
    shares = states_in(survivor._memory._nodes.memory.path)[checkpoint_name(7, ATTEMPT)]
    found = {}
    for share, checkpoint in shares.items():
        folder = str(share_path(survivor._memory._nodes.memory.path, checkpoint.name, share, 2))
        for file, record in checkpoint.files.items():
            found |= read_tensors(LocalFileSystem(), f"{folder}/{file}", record)
    assert found.keys() == {**expected.model, **expected.optimizer}.keys()
    assert all(torch.equal(found[name], x) for name, x in {**expected.model, **expected.optimizer}.items())


def test_a_share_that_has_no_room_is_not_written(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    gone, survivor = start(0, 7), start(1, 7)
    end(gone)
    monkeypatch.setattr(rescue, "spare_memory_bytes", lambda: 1000)
    assert survivor.rescue() is None
    assert whole(survivor) == []


def test_a_rescue_does_not_wait_for_shares_that_never_come(start: Start) -> None:
    """The copier does, before it deletes the state that this attempt began with; a peer that is gone adds none."""
    survivor = start(0, 7)
    del survivor._memory.pool.buffers[1:]  # as where an older state is here still
    waiting = survivor._memory.copier.submit(
        lambda: survivor._memory.pool.replace_older_attempts(checkpoint_name(6, ATTEMPT))
    )
    with pytest.raises(TimeoutError):
        waiting.result(0.1)
    began_s = time.monotonic()
    assert survivor.rescue(stand_in_s=0) == 7
    assert time.monotonic() - began_s < 5, "it waited"
    assert waiting.done()
    assert len(survivor._memory.pool.buffers) == 1
    assert whole(survivor) == [checkpoint_name(7, ATTEMPT)]


def test_inside_a_step_nothing_is_rescued(start: Start) -> None:
    rank = start(0, 7)
    with pytest.raises(ZeroDivisionError), rank.state_changing():
        raise ZeroDivisionError
    assert rank.rescue() is None


def test_after_a_rescue_the_state_changes_no_more(start: Start) -> None:
    gone, survivor = start(0, 7), start(1, 7)
    end(gone)
    survivor.rescue()
    changed = threading.Event()

    def change() -> None:
        with survivor.state_changing():
            changed.set()

    threading.Thread(target=change, daemon=True).start()
    assert not changed.wait(0.3)
    assert survivor.rescue() == 7, "asked again, it answers the same"


def test_an_upload_that_hangs_keeps_no_live_tensor(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that goes back to an earlier state builds it while the upload of a later one is still on its way."""
    rank = start(0, 100, 1)
    is_over = threading.Event()
    monkeypatch.setattr(to_storage, "commit", lambda *_: is_over.wait(20))
    state = rank.rescuer._state
    assert state
    rank._agreed = SaveStatus(is_copying=False, is_uploading=False)
    rank.offer(state, None)
    rank.join()
    settle(rank)
    rank.close(is_finished=False)
    moment = weakref.ref(state.optimizer.state[state.model.lm_head.weight]["exp_avg"])
    del state
    gc.collect()
    assert moment() is None
    is_over.set()
