"""A Saver on a GPU that is not there: its loop's step, its rescue in a thread, and what it kept."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from fsspec.implementations.local import LocalFileSystem
from torch import Tensor

from orchestrator.checkpoint.save.node_memory import share_path, states_in
from orchestrator.checkpoint.save.policy import SaveStatus
from orchestrator.checkpoint.save.saver import Saver
from orchestrator.checkpoint.state import capture
from orchestrator.checkpoint.store import checkpoint_name
from orchestrator.checkpoint.tensor_file import read_tensors
from tests.support.savers import settle, step

DEVICE = torch.device("cuda", 1)
Start = Callable[..., Saver]


def iterate(saver: Saver) -> None:
    """Offer the state, and change it."""
    assert saver.rescuer._state
    saver._agreed = SaveStatus(is_copying=False, is_uploading=False)
    saver.offer(saver.rescuer._state, None)
    with saver.state_changing():
        step(saver.rescuer._state)
        saver.rescuer._state.iter_num += 1
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
    folder = share_path(saver._memory._nodes.memory.path, name, 0, 1)
    found = {}
    for file, record in checkpoint.files.items():
        found |= read_tensors(LocalFileSystem(), f"{folder}/{file}", record)
    return found


def assert_kept(saver: Saver, iter_num: int) -> None:
    assert saver.rescuer._state
    live = capture(saver.rescuer._state, scaler={})
    expected = {**live.model, **live.optimizer}
    found = kept(saver, iter_num)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
