"""What the acceptance asks of states in node memory: rescues behind a stuck stream, pinning, pauses, lost processes."""

from __future__ import annotations

import mmap
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

import orchestrator.loop as loop
from benchmarks._gpu_child import Report, Setting, leave
from benchmarks._gpu_kernels import hold
from benchmarks._gpu_runs import in_steps, settings
from orchestrator.checkpoint.saver import Saver
from orchestrator.checkpoint.state import TrainState, capture
from orchestrator.process import plain_world

_STUCK_AT, _STUCK_S, _RESCUE_S = 5, 20.0, 5.0
_MODEL = {"n_layer": 4, "n_head": 16, "n_embd": 1024, "gradient_accumulation_steps": 1, "batch_size": 4}
_SMALL = {"n_layer": 12, "n_head": 12, "n_embd": 768, "gradient_accumulation_steps": 1, "batch_size": 1}  # 124M
_EVERY, _STEPS = 20, 150  # iterations between states, and in all
_FREE_S = 20.0  # for which a new worker waits until its GPU is free
_TICK_S = 0.001


class StopError(Exception):
    """Ends a run from within."""


@dataclass
class Watched:
    """The state and the saver of the run that the loop trains in this process."""

    states: list[TrainState] = field(default_factory=list)
    savers: list[Saver] = field(default_factory=list)

    def tensors(self) -> dict[str, Tensor]:
        """Return copies of what the state consists of, in host memory."""
        snapshot = capture(self.states[-1])
        return {name: tensor.cpu().clone() for name, tensor in {**snapshot.model, **snapshot.optimizer}.items()}


@contextmanager
def watching() -> Iterator[Watched]:
    """Lend the state that the loop trains meanwhile: what is rescued is compared with it, bit by bit."""
    watched, module = Watched(), vars(loop)
    begin = module["begin"]

    def noted(*args: Any, **more: Any) -> TrainState:
        watched.states.append(begin(*args, **more))
        return watched.states[-1]

    module["begin"] = noted
    try:
        yield watched
    finally:
        module["begin"] = begin


def rescue_after_step(setting: Setting, report: Report) -> None:
    """A state is rescued while the loop waits for a stream that is stuck behind a lost peer."""
    _rescue(setting, report, {}, 0)


def rescue_before_first_step(setting: Setting, report: Report) -> None:
    """The same in the first iteration of an attempt, which has changed nothing of the state yet."""
    _rescue(setting, report, {}, _STUCK_AT)


def rescue_float16(setting: Setting, report: Report) -> None:
    """The same with float16, whose loss scale is a part of the state and lies on the device."""
    _rescue(setting, report, {"dtype": "float16"}, 0)


def _rescue(setting: Setting, report: Report, changes: dict[str, Any], begin_at: int) -> None:
    """Train, from iteration begin_at of an earlier attempt on, get stuck at iteration _STUCK_AT, rescue its state."""
    out_dir = setting.folder / "run" / "out"
    changes = {**_MODEL, **changes, "snapshot_interval": 1000, "lr_decay_iters": 1000, "dropout": 0.0}
    if begin_at:
        config = settings(setting, out_dir, {**changes, "max_iters": begin_at})
        loop.train(config, plain_world(config))
    config = settings(setting, out_dir, {**changes, "max_iters": 100})
    asked = iter(range(begin_at, 1000))
    with watching() as watched:

        def should_stop() -> int:
            if next(asked) == _STUCK_AT:
                expected = watched.tensors()
                _get_stuck(setting, lambda: _told_rescue(setting, report, watched.savers[-1], expected))
            return 0

        loop.train(config, plain_world(config), should_stop=in_steps(should_stop), began=watched.savers.append)


def _get_stuck(setting: Setting, rescue: Callable[[], None]) -> None:
    """Let the loop get stuck, which is on a GPU as soon as it asks for a number, and call rescue meanwhile."""

    def soon() -> None:
        time.sleep(0.5)
        rescue()
        leave(0)

    if setting.is_on_gpu:
        hold(_STUCK_S)
    threading.Thread(target=soon).start()
    if not setting.is_on_gpu:
        time.sleep(_STUCK_S)


def _told_rescue(setting: Setting, report: Report, saver: Saver, expected: dict[str, Tensor]) -> None:
    began_s = time.monotonic()
    iter_num = saver.rescue()
    seconds = time.monotonic() - began_s
    report.figure("size_gb", sum(tensor.nbytes for tensor in expected.values()) / 1e9)
    saw = f"iteration {iter_num} of {_STUCK_AT} in {seconds:.2f} s"
    text = f"the state is rescued in less than {_RESCUE_S:.0f} s while the loop is stuck"
    report.claim(text, iter_num == _STUCK_AT and seconds < _RESCUE_S, saw)
    found: dict[str, Tensor] = {}
    for file in Path(setting.memory_dir).rglob(f"checkpoint_{_STUCK_AT:08d}_*/*.safetensors"):
        found |= load_file(file)
    same = found.keys() == expected.keys() and all(torch.equal(found[name], x) for name, x in expected.items())
    report.claim("what was rescued has the state's bits", same, f"{len(found)} of {len(expected)} tensors")


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

        def should_stop() -> int:
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

        def tell(record: loop.Record) -> None:
            if record["kind"] == "step":
                marks.append((record["iter"], time.perf_counter(), watched.savers[-1].paused_s))
                copied.update(int(path.name.split("_")[1]) for path in memory.rglob("checkpoint_*"))
            if len(marks) == _EVERY:  # by then node memory is reserved
                report.figure("longest_stall_of_a_thread_ms", stall.longest_ms())

        with suppress(StopError):
            loop.train(
                config, plain_world(config), tell, should_stop=in_steps(should_stop), began=watched.savers.append
            )
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
    child = setting.start("benchmarks._gpu_state:hog", "hog")
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
