"""Several ranks of the plain loop as processes of this machine, without Ray or torchrun: a second instead of ten.

They are forked from a server that has imported everything already. Each may have a node memory of its own, as if it
were alone on its node, and faults.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from orchestrator.config import TrainConfig

_START = multiprocessing.get_context("forkserver")
_START.set_forkserver_preload(["orchestrator.loop", "tests.support.faults", "torch._dynamo"])
_GRACE_S = 3.0  # in which the others notice that one is gone; Ray would kill them sooner


@dataclass(frozen=True)
class Ended:
    """How the ranks ended: exit codes by rank, -9 for SIGKILL, and what all of them have said."""

    codes: list[int | None]
    said: str

    @property
    def is_done(self) -> bool:
        return all(code == 0 for code in self.codes)


def train(
    config: TrainConfig,
    world_size: int,
    log: Path,
    faults: Sequence[Any] = (),
    memory_dirs: Sequence[str] | None = None,
    prepare: Callable[[int], None] | None = None,
    timeout_s: float = 120.0,
) -> Ended:
    """Train with world_size processes until they end; once one is killed, the others have a few seconds to leave.

    memory_dirs: one per rank; ranks with the same one are on one node.
    prepare: called in every process with its rank, first of all.
    """
    meeting = log.with_suffix(".meeting")
    processes = []
    for rank in range(world_size):
        mine = replace(config, memory_dir=memory_dirs[rank]) if memory_dirs else config
        armed = [fault for fault in faults if fault.rank == rank]
        args = (mine, rank, world_size, meeting, armed, str(log), prepare)
        processes.append(_START.Process(target=_run, args=args, daemon=True))
    for process in processes:
        process.start()
    _wait(processes, time.monotonic() + timeout_s)
    return Ended([process.exitcode for process in processes], log.read_text())


def call(function: Callable[..., None], world_size: int, log: Path, *args: Any, timeout_s: float = 120.0) -> Ended:
    """Call a module's function with a World and these arguments, on world_size processes; wait until they end."""
    meeting = log.with_suffix(".meeting")
    processes = [
        _START.Process(target=_call, args=(function, rank, world_size, meeting, str(log), args), daemon=True)
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    _wait(processes, time.monotonic() + timeout_s)
    return Ended([process.exitcode for process in processes], log.read_text())


def _wait(processes: list[Any], deadline_s: float) -> None:
    while any(process.is_alive() for process in processes):
        if any(process.exitcode not in (None, 0) for process in processes):
            deadline_s = min(deadline_s, time.monotonic() + _GRACE_S)
        if time.monotonic() > deadline_s:
            for process in processes:
                process.kill()
        time.sleep(0.02)
    for process in processes:
        process.join()


def _run(
    config: TrainConfig,
    rank: int,
    world_size: int,
    meeting: Path,
    faults: list[Any],
    log: str,
    prepare: Callable[[int], None] | None,
) -> None:
    _write_to(log, rank)

    import torch.distributed as dist

    from orchestrator import loop
    from orchestrator.distributed.device import resolve
    from orchestrator.distributed.join import new_attempt
    from orchestrator.distributed.world import World
    from orchestrator.storage.run_folder import open_run_folder
    from orchestrator.telemetry.emit import open_telemetry
    from orchestrator.telemetry.format import print_record
    from orchestrator.training.attempt import Callbacks
    from tests.support.faults import arm

    if prepare:
        prepare(rank)
    for fault in faults:
        arm(fault)
    config = resolve(config)
    dist.init_process_group("gloo", init_method=meeting.as_uri(), rank=rank, world_size=world_size)
    world = World(rank, world_size)
    world = replace(world, attempt=world.on_main(new_attempt))
    folder = open_run_folder(config)
    with open_telemetry(config, world, folder, lambda stamped: print_record(stamped.record)) as emit:
        loop.train(config, world, Callbacks(emit), folder)
    dist.destroy_process_group()


def _call(
    function: Callable[..., None], rank: int, world_size: int, meeting: Path, log: str, args: tuple[Any, ...]
) -> None:
    _write_to(log, rank)

    import torch.distributed as dist

    from orchestrator.distributed.world import World

    dist.init_process_group("gloo", init_method=meeting.as_uri(), rank=rank, world_size=world_size)
    function(World(rank, world_size), *args)
    dist.destroy_process_group()


def _write_to(log: str, rank: int) -> None:
    """Let this process write to a file what it prints and logs."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    logging.basicConfig(level=logging.INFO, format=f"rank {rank}: %(message)s", stream=sys.stderr)
