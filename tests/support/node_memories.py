"""States of a few numbers in node memory, and locks that another process holds."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from orchestrator.checkpoint.save.node_memory import NodeMemory, states_in
from orchestrator.checkpoint.save.snapshot_buffer import SnapshotBuffer
from orchestrator.checkpoint.store import FORMAT_VERSION
from orchestrator.checkpoint.tensor_file import Layout, bytes_of, layout_of

FILES = ("model-00000-of-00001.safetensors", "optimizer-00000-of-00001.safetensors")


def tensors_of(iter_num: int) -> dict[str, torch.Tensor]:
    return {"w": torch.full((5, 7), float(iter_num)), "b": torch.arange(3.0) + iter_num}


def layouts(count: int = 0) -> dict[str, Layout]:
    """Of the files above, or of one file with so many float32."""
    if count:
        return {FILES[0]: layout_of({"w": torch.empty(count, device="meta")})}
    return {FILES[0]: layout_of({"w": tensors_of(0)["w"]}), FILES[1]: layout_of({"b": tensors_of(0)["b"]})}


def fill(slot: SnapshotBuffer, iter_num: int) -> None:
    for name, place in slot.open().items():
        place[:] = bytes_of(tensors_of(iter_num)[name])


def seal(slot: SnapshotBuffer, iter_num: int, attempt: str = "a", share: int = 0, shares: int = 1) -> None:
    state = {"format_version": FORMAT_VERSION, "iter_num": iter_num, "tensors": {}}
    slot.publish(f"checkpoint_{iter_num:08d}_{attempt}", share, shares, state)


def kept(memory: NodeMemory, iter_num: int, attempt: str = "a", share: int = 0, shares: int = 1) -> SnapshotBuffer:
    slot = SnapshotBuffer(memory, layouts())
    fill(slot, iter_num)
    seal(slot, iter_num, attempt, share, shares)
    return slot


def names(memory: NodeMemory) -> list[str]:
    return sorted(states_in(memory.path))


_HOLD = """
import fcntl, os, sys, time
lock = os.open(sys.argv[1], os.O_RDWR)
fcntl.flock(lock, int(sys.argv[2]))
print("held", flush=True)
sys.stdin.read()
{then}
"""


@contextmanager
def held(lock: Path, how: int, then: str = "") -> Iterator[subprocess.Popen[bytes]]:
    """Let another process hold a lock, until its stdin is closed; then it does one thing more."""
    command = [sys.executable, "-c", _HOLD.format(then=then), str(lock), str(how)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stdout.readline() == b"held\n"
        yield process
        if process.stdin and not process.stdin.closed:
            process.stdin.close()
