from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator.config import TrainConfig
from orchestrator.distributed.world import World
from orchestrator.storage.run_folder import RunFolder
from orchestrator.worker import torchrun as peer_loss
from orchestrator.worker.torchrun import PeerLossGuard


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Set when this process would end; SIGTERM is heard, and does nothing."""
    event = threading.Event()
    monkeypatch.setattr(peer_loss, "_ITERATION_S", 0.2)
    monkeypatch.setattr(peer_loss, "os", SimpleNamespace(_exit=lambda _code: event.set()))
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    yield event
    signal.signal(signal.SIGTERM, before)


def saver(**values: Any) -> Any:
    return SimpleNamespace(**{"changed_at_s": 1.0, "is_finishing": False, "rescue": lambda **_: 13, **values})


def test_who_is_asked_to_stop_and_is_stuck_keeps_its_state_and_ends(
    tiny: TrainConfig, ended: threading.Event, capsys: pytest.CaptureFixture[str]
) -> None:
    with PeerLossGuard(tiny, World(1, 2), RunFolder(tiny.out_dir)) as watching:
        watching.guard(saver())
        watching.beat()
        os.kill(os.getpid(), signal.SIGTERM)
        assert ended.wait(10)
    said = capsys.readouterr().err
    assert "error: rank 1: asked to stop, and this iteration did not end within 0 s" in said
    assert "iteration 13 is safe in node memory; the same command goes on" in said


def test_who_comes_to_the_end_of_its_iteration_stops_by_itself(tiny: TrainConfig, ended: threading.Event) -> None:
    with PeerLossGuard(tiny, World(1, 2), RunFolder(tiny.out_dir)) as watching:
        os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(8):
            watching.beat()
            assert not ended.wait(0.05)


def test_who_waits_for_its_last_upload_is_not_stuck(tiny: TrainConfig, ended: threading.Event) -> None:
    with PeerLossGuard(tiny, World(1, 2), RunFolder(tiny.out_dir)) as watching:
        watching.guard(saver(is_finishing=True))
        os.kill(os.getpid(), signal.SIGTERM)
        assert not ended.wait(0.5)


def test_who_is_alone_waits_for_nobody(tiny: TrainConfig, ended: threading.Event) -> None:
    with PeerLossGuard(tiny, World(), RunFolder(tiny.out_dir)) as watching:
        assert signal.set_wakeup_fd(-1) == -1, "signals are not listened to"
        assert watching._watchdog is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert not ended.wait(0.3)
