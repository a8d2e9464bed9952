from __future__ import annotations

import threading
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from orchestrator.worker.watchdog import Watchdog, be_outlasted, stacks


def test_silence_is_noticed_once() -> None:
    calls: list[float] = []
    rang = threading.Event()

    def on_hang(silence_s: float) -> bool:
        calls.append(silence_s)
        rang.set()
        return True

    watchdog = Watchdog(0.3, on_hang)
    for mark in range(6):
        time.sleep(0.1)
        watchdog.beat(mark)
    assert not calls
    assert rang.wait(5)
    time.sleep(0.5)
    assert len(calls) == 1
    assert calls[0] > 0.3


def test_slow_steps_have_more_time() -> None:
    watchdog = Watchdog(0.1, lambda _silence_s: False)
    assert watchdog.limit_s() >= 300, "the start is no hang"
    watchdog.close()
    watchdog.beat(0)
    assert watchdog.limit_s() == 0.1, "once it has begun"
    for mark in (1, 2, 3):
        time.sleep(0.05)
        watchdog.beat(mark)
    assert watchdog.limit_s() >= 20 * 0.05
    for _ in range(60):  # the batches of an evaluation are no steps
        watchdog.beat(3)
    assert watchdog.limit_s() >= 20 * 0.05


def test_what_is_waited_for_rightly_is_no_hang() -> None:
    calls: list[float] = []
    watchdog = Watchdog(0.1, lambda silence_s: bool(calls.append(silence_s)))
    watchdog.beat(0)
    time.sleep(0.7)
    watchdog.close()
    assert len(calls) > 1


def test_collectives_wait_for_longer_than_it_does(tmp_path: Path) -> None:
    meeting = (tmp_path / "meeting").as_uri()
    dist.init_process_group("gloo", init_method=meeting, rank=0, world_size=1, timeout=timedelta(seconds=9))
    try:
        be_outlasted()
        backend = dist.distributed_c10d._get_default_group()._get_backend(torch.device("cpu"))
        assert backend.options._timeout >= timedelta(days=7)
    finally:
        dist.destroy_process_group()
    be_outlasted()  # where there is none, nothing waits


def test_stacks_name_the_function_of_every_thread() -> None:
    released = threading.Event()

    def stands_still() -> None:
        released.wait()

    thread = threading.Thread(target=stands_still)
    thread.start()
    found = stacks()
    released.set()
    thread.join()
    assert "stands_still" in found
    assert "test_stacks_name" in found
