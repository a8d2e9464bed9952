"""Ranks for the checkpoint benchmark: processes of this machine that save and restore together when they are told to.

Nothing trains here, so what is measured is storage, checksums and the network between the ranks.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from benchmarks.checkpoint.state import Size, digest, model_args, new_state, settings, torch_load
from orchestrator.checkpoint.restore.restore import restore_or_initialize
from orchestrator.checkpoint.save.node_topology import open_node_memory
from orchestrator.checkpoint.save.policy import SaveIntervals
from orchestrator.checkpoint.save.saver import Saver
from orchestrator.checkpoint.state import TrainState
from orchestrator.checkpoint.store import CheckpointStore
from orchestrator.distributed.world import World
from orchestrator.storage.run_folder import RunFolder
from orchestrator.telemetry.records import CheckpointFailed, CheckpointSaved
from orchestrator.training.attempt import join_run

_LONGEST_S = 900.0
_POLL_S = 0.005


@dataclass
class Member:
    """One rank, in its process: its state, which is made when it is first needed, and what it has open."""

    world: World
    size: Size
    savers: dict[str, Saver] = field(default_factory=dict)

    @cached_property
    def state(self) -> TrainState:
        return new_state(self.size)


class Ranks:
    """Processes that do one thing after the other, all together.

    They are forked from a server that has imported the most already, which saves seconds, and none inherits memory that
    was in use, which is faster to fill than new memory is.
    """

    def __init__(self, count: int, size: Size, folder: Path, environment: dict[str, str]) -> None:
        start = multiprocessing.get_context("forkserver")
        # The last one cannot be found by every server: they do not look in the folder that Python was started in.
        start.set_forkserver_preload(["torch.distributed", "s3fs", "benchmarks.checkpoint.ranks"])
        meeting = folder / f"meeting-{count}-{time.monotonic_ns()}"
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(count):
            here, there = start.Pipe()
            args = (rank, count, size, meeting.as_uri(), there, environment)
            process = start.Process(target=_serve, args=args, daemon=True)
            process.start()
            there.close()
            self._pipes.append(here)
            self._processes.append(process)

    def do(self, call: Callable[..., Any], *args: Any) -> list[Any]:
        """Return what call(member, *args) returns on every rank.

        Raises:
            RuntimeError: it failed on one; the others may still be in it, so all are of no further use.
        """
        for pipe in self._pipes:
            pipe.send((call, args))
        answers = []
        for rank, pipe in enumerate(self._pipes):
            is_right, answer = pipe.recv() if pipe.poll(_LONGEST_S) else (False, "no answer")
            if not is_right:
                self.kill()
                raise RuntimeError(f"rank {rank}: {answer}")
            answers.append(answer)
        return answers

    def memory_bytes(self) -> int:
        """Return the memory that is the processes' own: without files that are mapped, those of tmpfs too."""
        return sum(_status_bytes(process.pid, "RssAnon") for process in self._processes if process.pid)

    def kill(self) -> None:
        """End the processes at once: what they have in node memory stays."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()


@contextmanager
def ranks(count: int, size: Size, folder: Path, environment: dict[str, str] | None = None) -> Iterator[Ranks]:
    """Lend new processes, with these variables in their environment besides."""
    lent = Ranks(count, size, folder, environment or {})
    try:
        yield lent
    finally:
        lent.kill()


def _serve(rank: int, count: int, size: Size, meeting: str, pipe: Connection, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=count)
    member = Member(World(rank, count), size)
    while True:
        call, args = pipe.recv()
        try:
            pipe.send((True, call(member, *args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))


def prepare(member: Member) -> str:
    """Make the state that is saved and return the checksum of its bits."""
    return digest(member.state)


def open_saver(member: Member, out_dir: str, memory_dir: str) -> None:
    """Begin to keep the state of a run in out_dir; with memory_dir "" straight from the live tensors."""
    attempt = member.world.on_main(lambda: os.urandom(4).hex())
    world = World(member.world.rank, member.world.size, attempt=attempt)
    config = settings(member.size, out_dir, memory_dir)
    store = CheckpointStore(RunFolder(out_dir))
    nodes = join_run(config, world, store)
    member.savers[out_dir] = Saver(member.state, world, store, nodes, {}, SaveIntervals(1, 1, 1))


def save(member: Member, out_dir: str, is_synced: bool = True) -> float:
    """Save and return the seconds until the checkpoint was announced.

    is_synced: as it is; else without waiting for the disk, as torch.save does, to compare what is done besides.
    """
    saver = member.savers[out_dir]
    _take_turns(member, saver)
    dist.barrier()
    began_s = time.perf_counter()
    with nullcontext() if is_synced else mock.patch("os.fsync"):
        is_announced = False
        while not is_announced:  # the very first is owed until node memory has its room: the next one pays
            member.state.iter_num += 1
            saver.offer(member.state, None)
            saver.join()
            is_announced = _take_turns(member, saver)
    return time.perf_counter() - began_s


def _take_turns(member: Member, saver: Saver) -> bool:
    """Vote as the loop does until nobody copies or uploads; return whether a checkpoint was announced meanwhile."""
    is_announced = False
    deadline_s = time.monotonic() + _LONGEST_S
    while time.monotonic() < deadline_s:
        _, *answers = member.world.agree([0, *saver.request()]).result()
        saver.apply(answers)
        for record in saver.take_events():
            if isinstance(record, CheckpointFailed):
                raise RuntimeError(f"the checkpoint failed: {record.why}")
            is_announced |= isinstance(record, CheckpointSaved)
        if not any(answers[:2]):
            return is_announced
        time.sleep(_POLL_S)
    raise RuntimeError(f"a checkpoint took more than {_LONGEST_S:g} s")


def restore(member: Member, out_dir: str, expected: str, memory_dir: str = "") -> dict[str, Any]:
    """Restore; return the seconds of reading, verifying and filling, those in all, and how many bytes it was.

    expected: the checksum of the bits, see `prepare`.
    memory_dir: where the states of processes that have ended lie, "" to leave them aside.
    """
    config = settings(member.size, out_dir, memory_dir)
    store = CheckpointStore(RunFolder(out_dir))
    # Who joins a run takes it over from those that write there.
    nodes = join_run(config, member.world, store) if memory_dir else open_node_memory(member.world, "", "")
    dist.barrier()
    began_s = time.perf_counter()
    found = restore_or_initialize(config, member.world, store, nodes, model_args(member.size))
    total_s = time.perf_counter() - began_s
    peak_bytes = _status_bytes(os.getpid(), "VmHWM")
    if not found.resumed_from or digest(found) != expected:
        raise RuntimeError(f"what was restored from {out_dir} has other bits than what was saved")
    return {
        "seconds": found.resumed_from.seconds,
        "total_s": total_s,
        "from_storage_bytes": found.resumed_from.from_storage_bytes,
        "size_bytes": found.resumed_from.checkpoint.size_bytes,
        "peak_bytes": peak_bytes,
    }


def load_as_nanogpt(member: Member, file: Path) -> tuple[float, float]:
    """Load a file on every rank, as nanoGPT does under torchrun; see `torch_load`."""
    state = member.state
    dist.barrier()
    return torch_load(state, file)


def peak_bytes(_member: Member) -> int:
    """Return the largest resident size that this process has had."""
    return _status_bytes(os.getpid(), "VmHWM")


@contextmanager
def watched_memory(processes: Ranks) -> Iterator[list[int]]:
    """Watch the processes' own memory; the list gets its growth at the highest point, in bytes, when the block ends."""
    before = peak = processes.memory_bytes()
    is_over = threading.Event()
    found: list[int] = []

    def watch() -> None:
        nonlocal peak
        while not is_over.wait(0.005):
            peak = max(peak, processes.memory_bytes())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield found
    finally:
        is_over.set()
        watcher.join()
        found.append(peak - before)


def _status_bytes(pid: int, key: str) -> int:
    """Return what the kernel tells of a process's memory, 0 where it has ended."""
    try:
        fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    except OSError:
        return 0
    return int(fields.get(key, "0 kB").split()[0]) * 1024
