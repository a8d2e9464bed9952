"""What the acceptance times of states in node memory: pinning, pauses, and the memory of a killed process."""

from __future__ import annotations

import mmap
import os
import threading
import time
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

import orchestrator.loop as loop
from benchmarks.gpu.child import Report, Setting
from benchmarks.gpu.kernels import hold
from benchmarks.gpu.runs import settings
from benchmarks.gpu.watch import StopError, in_steps, watching
from orchestrator.distributed.join import plain_world
from orchestrator.telemetry.records import Record, Step
from orchestrator.training.attempt import Callbacks

_SMALL = {"n_layer": 12, "n_head": 12, "n_embd": 768, "gradient_accumulation_steps": 1, "batch_size": 1}  # 124M
_EVERY, _STEPS = 20, 150  # iterations between states, and in all
_FREE_S = 20.0  # for which a new worker waits until its GPU is free
_TICK_S = 0.001


def pauses(setting: Setting, report: Report) -> None:
    """What pinning costs, how fast a state is copied, and whether training tells how long it waits for a copy."""
    out_dir = setting.folder / "run" / "out"
    more = {"max_iters": 10**6, "lr_decay_iters": 10**6, "snapshot_interval": _EVERY, "dropout": 0.0}
    config = settings(setting, out_dir, {**_SMALL, **more})
    pinned = _count_pinning() if setting.is_on_gpu else []
    marks: list[tuple[int, float, float]] = []  # of every step: its number, when it ended, the pauses so far
    copied: set[int] = set()  # iterations whose state was taken
    asked = iter(range(_STEPS + 2))
    stall, memory = _Stall(), Path(setting.memory_dir)
    with watching() as watched:

        def stop_request() -> int:
            if next(asked) < _STEPS + 1:
                return 0
            time.sleep(1.0)  # until the newest copy is whole
            began_s = time.monotonic()
            if watched.savers[-1].rescue() is None:
                raise RuntimeError("the state could not be rescued")
            seconds = time.monotonic() - began_s
            size_gb = sum(tensor.nbytes for tensor in watched.tensors().values()) / 1e9
            _tell_copy(setting, report, pinned, size_gb, seconds)
            raise StopError

        def take(record: Record) -> None:
            if isinstance(record, Step):
                marks.append((record.iter, time.perf_counter(), watched.savers[-1].paused_s))
                copied.update(int(path.name.split("_")[1]) for path in memory.rglob("checkpoint_*"))
            if len(marks) == _EVERY:  # by then node memory is reserved
                report.figure("longest_stall_of_a_thread_ms", stall.longest_ms())

        with suppress(StopError):
            hooks = Callbacks(take, stop_request=in_steps(stop_request), ready=watched.savers.append)
            loop.train(config, plain_world(config), hooks)
    _tell_pauses(setting, report, marks, copied)


def _tell_copy(
    setting: Setting, report: Report, pinned: list[tuple[int, float]], size_gb: float, seconds: float
) -> None:
    report.figure("state_gb", size_gb)
    report.figure("copy_and_checksum_gb_s", size_gb / seconds)
    is_claimed = setting.is_on_gpu and not setting.is_tiny
    if is_claimed:
        report.claim(
            "a state is copied and checksummed at more than 8 GB/s", size_gb / seconds > 8, f"{size_gb / seconds:.1f}"
        )
    if pinned:
        pin_s_per_gb = sum(seconds for _, seconds in pinned) / (sum(size for size, _ in pinned) / 1e9)
        report.figure("pinned", {"calls": len(pinned), "gb": sum(size for size, _ in pinned) / 1e9})
        report.figure("longest_pin_call_s", max(seconds for _, seconds in pinned))
        if is_claimed:
            report.claim("pinning takes less than 0.2 s per GB", pin_s_per_gb < 0.2, f"{pin_s_per_gb:.3f}")
    elif is_claimed:
        report.claim("node memory is pinned", False, "no call of cudaHostRegister was seen")


def _tell_pauses(setting: Setting, report: Report, marks: list[tuple[int, float, float]], copied: set[int]) -> None:
    """Compare how much longer an iteration with a copy took with what the run counts as its pause."""
    steps = [(b[0], b[1] - a[1], b[2] - a[2]) for a, b in pairwise(marks) if a[0] > _EVERY]
    with_copy = [(step_s, paused_s) for it, step_s, paused_s in steps if it in copied]
    busy = {it + later for it in copied for later in range(_EVERY // 2)}  # checksums are still made
    alone_s = median(step_s for it, step_s, _ in steps if it not in busy)
    report.figure("states_taken", len(with_copy))
    waited_ms = 1e3 * median(step_s - alone_s for step_s, _ in with_copy)
    told_ms = 1e3 * median(paused_s for _, paused_s in with_copy)
    report.figure("step_ms", 1e3 * alone_s)
    report.figure("step_waits_ms", waited_ms)
    report.figure("paused_says_ms", told_ms)
    if setting.is_on_gpu and not setting.is_tiny:
        is_told = abs(waited_ms - told_ms) < max(3.0, 0.3 * waited_ms)
        saw = f"waits {waited_ms:.1f} ms, tells {told_ms:.1f} ms"
        report.claim("training tells how long it waits for a copy", is_told, saw)


def _count_pinning() -> list[tuple[int, float]]:
    """Return a list that gets the bytes and seconds of every cudaHostRegister from now on."""
    calls: list[tuple[int, float]] = []
    cuda: Any = torch.cuda
    runtime = cuda.cudart()
    register = runtime.cudaHostRegister

    def timed(pointer: int, size_bytes: int, flags: int) -> Any:
        began_s = time.perf_counter()
        code = register(pointer, size_bytes, flags)
        calls.append((size_bytes, time.perf_counter() - began_s))
        return code

    runtime.cudaHostRegister = timed
    return calls


class _Stall:
    """Measures for how long a thread that only ticks has stood still: somebody held Python's lock, or all cores."""

    def __init__(self) -> None:
        self._longest_s, self._is_over = 0.0, threading.Event()
        threading.Thread(target=self._tick, daemon=True).start()

    def longest_ms(self) -> float:
        """Stop, and return the longest time."""
        self._is_over.set()
        return 1e3 * self._longest_s

    def _tick(self) -> None:
        before_s = time.monotonic()
        while not self._is_over.wait(_TICK_S):
            self._longest_s = max(self._longest_s, time.monotonic() - before_s)
            before_s = time.monotonic()


def kill_memory(setting: Setting, report: Report) -> None:
    """How long after a process was killed its memory on the GPU is free, with pinned memory and a kernel that runs."""
    cuda: Any = torch.cuda
    torch.ones(1, device="cuda")
    free_bytes = cuda.mem_get_info()[0]
    child = setting.start("benchmarks.gpu.state:hog", "hog")
    while not (child.is_ready or child.is_over):
        time.sleep(0.01)
    held_bytes = free_bytes - cuda.mem_get_info()[0]
    began_s = time.monotonic()
    ended = child.end()
    gone_s = time.monotonic() - began_s
    if not ended.figures.get("ready"):
        raise RuntimeError(f"the process that takes memory has failed: {ended.failed}\n{ended.tail}")
    while cuda.mem_get_info()[0] < free_bytes - held_bytes * 0.02 and time.monotonic() - began_s < _FREE_S:
        time.sleep(0.005)
    free_s = time.monotonic() - began_s
    report.figure("held_gb", held_bytes / 1e9)
    report.figure("pinned_gb", ended.figures["pinned_gb"])
    report.figure("process_gone_s", round(gone_s, 3))
    report.figure("memory_free_s", round(free_s, 3))
    text = f"a killed process's memory is free within the {_FREE_S:.0f} s for which a new worker waits"
    report.claim(text, free_s < _FREE_S, f"{free_s:.2f} s")


def hog(setting: Setting, report: Report) -> None:
    """Take much memory on the GPU and pinned, compute, and wait to be killed."""
    cuda: Any = torch.cuda
    size_bytes = min(40 * 2**30, int(cuda.mem_get_info()[0] * 0.6))
    held = torch.empty(size_bytes, dtype=torch.uint8, device="cuda")
    room = os.statvfs(setting.memory_dir)
    pinned_bytes = min(8 * 2**30, room.f_bavail * room.f_frsize // 4) // 2**20 * 2**20
    with Path(setting.memory_dir, "hog").open("w+b") as file:
        os.posix_fallocate(file.fileno(), 0, pinned_bytes)
        content = mmap.mmap(file.fileno(), pinned_bytes)
    code = cuda.cudart().cudaHostRegister(np.frombuffer(content, np.uint8).ctypes.data, pinned_bytes, 0)
    report.figure("pinned_gb", 0 if int(code) else pinned_bytes / 1e9)
    hold(60.0)
    report.figure("ready", len(held))
    time.sleep(60)
