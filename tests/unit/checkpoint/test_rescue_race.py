"""A rescue from another thread races the loop: while a snapshot begins, is published and uploaded, and in a step.

Every value of the state is its iteration, so a state that mixes two of them shows. The race is run without the lock,
too, where it has to be lost: else it would prove nothing.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from fsspec.implementations.local import LocalFileSystem

from model import GPT, GPTConfig
from orchestrator.checkpoint.save.buffers import BufferPool
from orchestrator.checkpoint.save.node_memory import NodeMemory, share_path, states_in
from orchestrator.checkpoint.save.node_topology import NodeTopology
from orchestrator.checkpoint.save.policy import SaveIntervals
from orchestrator.checkpoint.save.saver import Saver
from orchestrator.checkpoint.save.state_lock import StateLock
from orchestrator.checkpoint.state import TrainState, allocate_moments
from orchestrator.checkpoint.store import Checkpoint, CheckpointStore
from orchestrator.checkpoint.tensor_file import read_tensors
from orchestrator.distributed.world import World
from orchestrator.telemetry.records import CheckpointFailed
from tests.support.runs import checkpoints_in

SHAPE = GPTConfig(block_size=2, vocab_size=3, n_layer=1, n_head=1, n_embd=2)
ROUNDS = 15
Race = Callable[[int], tuple[int, int]]


def training(folder: Path) -> tuple[Saver, TrainState, NodeMemory, CheckpointStore]:
    """Return a rank that is alone: a snapshot is due at every iteration, a checkpoint at every third."""
    folder.mkdir()
    model = GPT(SHAPE)
    optimizer = model.configure_optimizers(0.1, 1e-2, (0.9, 0.95), "cpu")
    state = TrainState(model, optimizer, torch.amp.GradScaler("cpu", enabled=False), config={})
    allocate_moments(state, World())
    step(state)
    memory, store = NodeMemory(str(folder), "run"), checkpoints_in(str(folder / "out"))
    nodes = NodeTopology(memory, ("here",), 0)
    saver = Saver(state, World(attempt="a"), store, nodes, {}, SaveIntervals(3, 1, keep=99))
    saver._memory.settle()
    return saver, state, memory, store


def step(state: TrainState) -> None:
    """Set one tensor after the other to the number of the next iteration."""
    state.iter_num += 1
    with torch.no_grad():
        for parameter in state.model.parameters():
            parameter.fill_(state.iter_num)
            for moment in state.optimizer.state[parameter].values():
                moment.fill_(state.iter_num)
            time.sleep(0)  # now the other thread


def iterate(saver: Saver, state: TrainState, is_over: threading.Event, errors: list[Exception]) -> None:
    """Train as the loop does, until it is over."""
    try:
        while not is_over.is_set():
            saver.apply(saver.request())
            saver.offer(state, None)
            with saver.state_changing():
                if not is_over.is_set():
                    step(state)
    except Exception as error:
        errors.append(error)


def values_in(folder: str, checkpoint: Checkpoint) -> set[float]:
    """Return the values of a state's tensors; the checksums are verified."""
    found: set[float] = set()
    for file, record in checkpoint.files.items():
        for tensor in read_tensors(LocalFileSystem(), f"{folder}/{file}", record).values():
            found.update(tensor.reshape(-1).tolist())
    return found


@pytest.fixture
def race(tmp_path: Path) -> Race:
    """Run a round with its own seed; check every state; return the iteration rescued, and how many were uploaded."""

    def race(seed: int) -> tuple[int, int]:
        saver, state, memory, store = training(tmp_path / str(seed))
        is_over = threading.Event()
        errors: list[Exception] = []
        loop = threading.Thread(target=iterate, args=(saver, state, is_over, errors), daemon=True)
        loop.start()
        while (
            seed % 2 and loop.is_alive() and not saver._storage.uploader.last
        ):  # every other time, an upload has begun
            time.sleep(0)
        time.sleep(random.Random(seed).uniform(0.0, 0.01))
        rescued = saver.rescue()
        is_over.set()
        try:
            in_memory = {checkpoint.iter_num: (name, checkpoint) for name, (checkpoint,) in shares_of(memory)}
            assert rescued in in_memory
            assert rescued == max(in_memory)
            for iter_num, (name, checkpoint) in in_memory.items():
                assert values_in(str(share_path(memory.path, name, 0, 1)), checkpoint) == {iter_num}
        finally:
            if saver._lock._lock.locked():  # for good: let the thread end
                saver._lock._lock.release()
            loop.join(10)
        assert not errors
        saver._storage.wait()
        uploaded = list(store.newest_first())
        for checkpoint in uploaded:
            assert values_in(store.folder.path(checkpoint.name), checkpoint) == {checkpoint.iter_num}
        assert not store.damaged
        assert not [event for event in saver.take_events() if isinstance(event, CheckpointFailed)]
        saver.close(is_finished=True)
        return rescued, len(uploaded)

    return race


def shares_of(memory: NodeMemory) -> Iterator[tuple[str, Any]]:
    for name, shares in states_in(memory.path).items():
        yield name, shares.values()


def test_whenever_a_rescue_comes_every_state_is_of_one_iteration(race: Race) -> None:
    rescued, uploads = zip(*(race(seed) for seed in range(ROUNDS)), strict=True)
    assert len(set(rescued)) > 1, "at different moments"
    assert max(uploads) > 0


@contextmanager
def unlocked(_lock: StateLock) -> Iterator[None]:
    yield


def test_without_the_lock_a_step_tears_the_state(race: Race, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StateLock, "changing", unlocked)
    assert any(is_lost(race, seed) for seed in range(20 * ROUNDS))


def test_without_the_lock_a_rescue_takes_the_buffer_of_a_copy(race: Race, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StateLock, "choosing_buffer", unlocked)
    choose = BufferPool.free_buffer

    def hesitate(pool: BufferPool) -> Any:
        buffer = choose(pool)
        time.sleep(0.001)
        return buffer

    monkeypatch.setattr(BufferPool, "free_buffer", hesitate)
    assert any(is_lost(race, seed) for seed in range(20 * ROUNDS))


def is_lost(race: Race, seed: int) -> bool:
    try:
        race(seed)
    except Exception:
        return True
    return False
