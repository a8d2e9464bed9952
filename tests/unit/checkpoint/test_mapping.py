"""Mapped files: their pages are there, and to make them keeps no other thread of Python waiting."""

from __future__ import annotations

import mmap
import os
import resource
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
import torch

from orchestrator.checkpoint.save import mapping
from orchestrator.checkpoint.save.node_memory import NodeMemory
from orchestrator.checkpoint.save.snapshot_buffer import SnapshotBuffer
from orchestrator.checkpoint.tensor_file import layout_of

SIZE_BYTES = 512 * 2**20


@pytest.fixture
def folder(memory_dir: str, tmp_path: Path) -> Path:
    """A memory_dir of this test's own."""
    folder = Path(memory_dir, tmp_path.name)
    folder.mkdir()
    return folder


@contextmanager
def longest_gap_s() -> Iterator[list[float]]:
    """Put into a list for how long at most another thread of this process stood still."""
    gaps, ended = [0.0], threading.Event()

    def tick() -> None:
        last_s = time.perf_counter()
        while not ended.wait(0.001):
            now_s = time.perf_counter()
            gaps[0] = max(gaps[0], now_s - last_s)
            last_s = now_s

    thread = threading.Thread(target=tick)
    thread.start()
    yield gaps
    ended.set()
    thread.join()


def populated_by_python(path: Path) -> mmap.mmap:
    """Map a file as it was done once."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    os.posix_fallocate(descriptor, 0, SIZE_BYTES)
    content = mmap.mmap(descriptor, SIZE_BYTES, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
    os.close(descriptor)
    return content


def faults_of(call: Callable[[], object]) -> int:
    """Return how many pages this thread had to touch first."""
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    call()
    return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before


def test_a_slot_is_made_without_pythons_lock(folder: Path) -> None:
    """Else nothing is launched and nobody is answered meanwhile, and the process is taken for one that is stuck."""
    layouts = {"model-00000-of-00001.safetensors": layout_of({"w": torch.empty(SIZE_BYTES // 4, device="meta")})}
    memory = NodeMemory(str(folder), "run")
    with longest_gap_s() as before:
        populated_by_python(folder / "before")
    (folder / "before").unlink()
    tries = []
    for _ in range(3):  # what else this machine does may keep a thread waiting too
        with longest_gap_s() as gaps:
            slot = SnapshotBuffer(memory, layouts)
        slot.delete()
        tries.append(gaps[0])
        if gaps[0] < before[0] / 5:
            return
    pytest.fail(f"another thread stood still for {tries} s, with MAP_POPULATE for {before[0]:.3f} s")


@pytest.mark.parametrize("is_old", [False, True], ids=["", "a kernel before 5.14"])
def test_every_page_has_been_touched(folder: Path, monkeypatch: pytest.MonkeyPatch, is_old: bool) -> None:
    if is_old:
        monkeypatch.setattr(mapping, "_POPULATE_WRITE", 9999)
    monkeypatch.setattr(mapping, "_PIECE_BYTES", 1000 * mmap.PAGESIZE)
    size_bytes = 3500 * mmap.PAGESIZE + 5
    content = mapping.mapped(folder / "file", size_bytes)
    assert (folder / "file").stat().st_size == size_bytes
    found = np.frombuffer(content, np.uint8)
    assert faults_of(lambda: np.copyto(found[:: mmap.PAGESIZE], 0)) < 350, "a tenth of them"
    assert not found.any()
    assert not (is_old and _is_known(mapping._POPULATE_WRITE))


def _is_known(advice: int) -> bool:
    """Return whether this kernel, or the sandbox that it is in, knows an advice."""
    with suppress(OSError):
        mmap.mmap(-1, mmap.PAGESIZE).madvise(advice)
        return True
    return False
