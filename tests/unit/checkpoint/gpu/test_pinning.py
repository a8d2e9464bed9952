"""Node memory is pinned piece by piece, in the background, and unpinned at the end."""

from __future__ import annotations

import logging
import os
import threading

import pytest
import torch
from torch import Tensor

from orchestrator.checkpoint.save import pinning
from orchestrator.checkpoint.save.pinning import Pinned, address_of, between_borders
from tests.support.fake_cuda import FakeCuda
from tests.support.gpu_savers import DEVICE, Start, assert_kept, in_a_thread, iterate
from tests.support.savers import settle


def test_borders_lie_at_multiples_of_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pinning, "_BORDER_BYTES", 4096)
    content = memoryview(bytearray(os.urandom(3 * 4096 + 5)))[100:]
    pieces = list(between_borders(content))
    assert b"".join(pieces) == bytes(content)
    assert all(address_of(piece) % 4096 == 0 for piece in pieces[1:])
    assert all(address_of(p) // 4096 == (address_of(p) + len(p) - 1) // 4096 for p in pieces)


def test_no_copy_lies_in_two_registrations(start: Start, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
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
        address_of(content): len(content) for slot in saver._memory.pool.buffers for content in slot.contents.values()
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


def test_what_is_pinned_is_taken_back_when_the_saver_ends(start: Start, cuda: FakeCuda) -> None:
    saver = start()
    iterate(saver)
    assert cuda.registered
    saver.close(is_finished=False)
    settle(saver)
    assert cuda.registered == {}


def test_a_rescue_waits_for_no_pinning(start: Start, cuda: FakeCuda) -> None:
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
