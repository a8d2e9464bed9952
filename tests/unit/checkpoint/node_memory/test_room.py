"""How much memory a node has for states, and whose states make room."""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path
from typing import Any

import pytest

from orchestrator.checkpoint.save import node_memory as memory_module
from orchestrator.checkpoint.save.node_memory import NodeMemory, spare_memory_bytes
from orchestrator.checkpoint.save.snapshot_buffer import SnapshotBuffer
from orchestrator.errors import CheckpointError
from tests.support.node_memories import held, kept, layouts, names, seal


def test_too_little_memory_is_told_with_a_remedy(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = NodeMemory(str(folder), "run")
    monkeypatch.setattr(memory_module, "spare_memory_bytes", lambda: 950_000_000)
    memory.check_room(900_000_000)
    with pytest.raises(CheckpointError) as told:
        memory.check_room(990_000_000)
    assert str(told.value) == (
        f"two states are 0.99 GB, and memory_dir={folder} has room for 0.95 GB: enlarge it (docker run --shm-size, "
        "an emptyDir with medium: Memory in Kubernetes), or give another --memory_dir"
    )


def test_the_room_that_this_run_has_already_counts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = NodeMemory(str(folder), "run")
    monkeypatch.setattr(memory_module, "spare_memory_bytes", lambda: 1_000_000)
    slot = SnapshotBuffer(memory, layouts(250_000))
    memory.check_room(1_900_000)
    slot.delete()
    with pytest.raises(CheckpointError):
        memory.check_room(1_900_000)


def test_room_is_counted_while_another_rank_deletes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ranks of a node clean up at the same time: what is gone takes no room, and is no error."""
    memory = NodeMemory(str(folder), "run")
    kept(memory, 4)
    stat = Path.stat

    def gone(self: Path, **options: Any) -> os.stat_result:
        if self.suffix == ".safetensors":
            raise FileNotFoundError(errno.ENOENT, "deleted by another rank", str(self))
        return stat(self, **options)

    monkeypatch.setattr(Path, "stat", gone)
    memory.check_room(1)


def test_the_memory_of_a_container_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "/proc/meminfo": "MemTotal:  8000 kB\nMemFree:  100 kB\nMemAvailable:   4000 kB\n",
        "/sys/fs/cgroup/memory.max": "3000000\n",
        "/sys/fs/cgroup/memory.current": "1000000\n",
    }

    def read_text(self: Path) -> str:
        if str(self) not in files:
            raise FileNotFoundError(self)
        return files[str(self)]

    monkeypatch.setattr(Path, "read_text", read_text)
    assert spare_memory_bytes() == 2_000_000 - 300_000, "a tenth of it stays free"
    files["/sys/fs/cgroup/memory.max"] = "max\n"
    assert spare_memory_bytes() == 4_096_000 - 819_200
    del files["/sys/fs/cgroup/memory.max"]
    assert spare_memory_bytes() == 4_096_000 - 819_200


def test_what_ended_runs_have_left_goes_where_room_is_needed(small: str, caplog: pytest.LogCaptureFixture) -> None:
    ended = NodeMemory(small, "ended")
    SnapshotBuffer(ended, layouts(300_000))
    ended.close(is_finished=False)
    memory = NodeMemory(small, "run")
    memory.check_room(500_000)
    assert ended.path.exists(), "there was room enough"
    with caplog.at_level(logging.WARNING):
        memory.check_room(1_500_000)
    assert not ended.path.exists()
    assert "node memory was needed: the states of the ended run ended were deleted there" in caplog.text


def test_the_states_of_a_living_process_are_not_deleted(small: str) -> None:
    living = NodeMemory(small, "living")
    SnapshotBuffer(living, layouts(300_000))
    living.close(is_finished=False)
    memory = NodeMemory(small, "run")
    with held(living.path / ".lock", memory_module.fcntl.LOCK_SH):
        with pytest.raises(CheckpointError, match=r"has room for 0\.00 GB"):
            memory.check_room(1_500_000)
        assert living.path.exists()
    memory.check_room(1_500_000)
    assert not living.path.exists()


def test_a_full_memory_is_known_before_anything_is_written(small: str) -> None:
    memory = NodeMemory(small, "run")
    first = SnapshotBuffer(memory, layouts(300_000))
    with pytest.raises(OSError, match="No space left on device") as told:
        SnapshotBuffer(memory, layouts(300_000))
    assert told.value.errno == errno.ENOSPC
    assert len(list(memory.path.glob(".slot-*"))) == 1, "nothing of the second is left"
    for place in first.open().values():
        place[:] = bytes(len(place))
    seal(first, 4)
    assert names(memory) == ["checkpoint_00000004_a"]
