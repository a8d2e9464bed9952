"""What a node keeps in its memory: whole or not at all, of this user alone, and gone when nobody needs it."""

from __future__ import annotations

import errno
import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.checkpoint.save import node_memory as memory_module
from orchestrator.checkpoint.save.node_memory import NodeMemory, run_path, spare_memory_bytes
from orchestrator.checkpoint.save.node_topology import NodeTopology, open_node_memory
from orchestrator.checkpoint.save.snapshot_buffer import SnapshotBuffer
from orchestrator.checkpoint.store import FORMAT_VERSION
from orchestrator.checkpoint.tensor_file import Layout, bytes_of, layout_of, read_tensors
from orchestrator.distributed.world import World
from orchestrator.errors import CheckpointError
from orchestrator.storage.run_folder import RunFolder
from tests.support.tmpfs import small_tmpfs

FILES = ("model-00000-of-00001.safetensors", "optimizer-00000-of-00001.safetensors")


@pytest.fixture
def folder(memory_dir: str, tmp_path: Path) -> Path:
    """A memory_dir of this test's own."""
    folder = Path(memory_dir, tmp_path.name)
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def small(tmp_path: Path) -> Iterator[str]:
    with small_tmpfs(tmp_path / "small", "2m") as folder:
        yield folder


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
    return sorted(memory.generations())


def test_a_state_is_visible_when_it_is_whole_and_not_before(folder: Path) -> None:
    memory = NodeMemory(str(folder), "run")
    slot = SnapshotBuffer(memory, layouts())
    assert slot.iter_num == -1
    fill(slot, 4)
    assert [path.name[:6] for path in memory.path.iterdir() if path.name != ".lock"] == [".slot-"]
    assert names(memory) == []
    assert not memory.is_whole("checkpoint_00000004_a", 1)
    seal(slot, 4)
    assert slot.iter_num == 4
    assert memory.is_whole("checkpoint_00000004_a", 1)
    (checkpoint,) = memory.generations()["checkpoint_00000004_a"].values()
    assert checkpoint.files == slot.records
    path = memory.share_path("checkpoint_00000004_a", 0, 1)
    assert sorted(file.name for file in path.iterdir()) == sorted([*FILES, "state.json"])
    fs = RunFolder(str(folder)).fs
    for file, record in checkpoint.files.items():
        for name, tensor in read_tensors(fs, str(path / file), record).items():
            assert torch.equal(tensor, tensors_of(4)[name])


def test_two_generations_take_turns(folder: Path) -> None:
    memory = NodeMemory(str(folder), "run")
    slots = [SnapshotBuffer(memory, layouts()), SnapshotBuffer(memory, layouts())]
    for iter_num in range(1, 6):
        slot = slots[iter_num % 2]
        fill(slot, iter_num)
        assert names(memory) == [f"checkpoint_{iter_num - 1:08d}_a"] * (iter_num > 1), "one is withdrawn, one is here"
        seal(slot, iter_num)
    assert names(memory) == ["checkpoint_00000004_a", "checkpoint_00000005_a"]
    inode = (memory.share_path("checkpoint_00000005_a", 0, 1) / FILES[0]).stat().st_ino
    fill(slots[1], 6)
    seal(slots[1], 6)
    path = memory.share_path("checkpoint_00000006_a", 0, 1) / FILES[0]
    assert path.stat().st_ino == inode, "the same pages are written over"


def test_the_same_state_taken_again_replaces_the_one_before(folder: Path) -> None:
    memory = NodeMemory(str(folder), "run")
    kept(memory, 4)
    second = kept(memory, 4)
    assert names(memory) == ["checkpoint_00000004_a"]
    assert memory.generations()["checkpoint_00000004_a"][0].files == second.records


def test_what_a_killed_process_has_half_written_is_cleaned_up(folder: Path) -> None:
    before = NodeMemory(str(folder), "run")
    kept(before, 4)
    fill(kept(before, 5), 6)
    assert len(list(before.path.glob(".slot-*"))) == 1
    memory = NodeMemory(str(folder), "run")
    assert list(memory.path.glob(".slot-*")) == []
    assert names(memory) == ["checkpoint_00000004_a"]


def test_a_generation_without_one_of_its_shares_is_not_whole(folder: Path) -> None:
    memory = NodeMemory(str(folder), "run")
    slots = [kept(memory, 4, share=share, shares=3) for share in (0, 2)]
    assert names(memory) == []
    assert not memory.is_whole("checkpoint_00000004_a", 3)
    kept(memory, 4, share=1, shares=3)
    assert sorted(memory.generations()["checkpoint_00000004_a"]) == [0, 1, 2]
    slots[0].open()
    assert names(memory) == []


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "missing", "newer"])
def test_a_share_with_a_damaged_description_is_left_out(
    folder: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    memory = NodeMemory(str(folder), "run")
    for iter_num in (4, 5):
        for share in (0, 1):
            kept(memory, iter_num, share=share, shares=2)
    path = memory.share_path("checkpoint_00000005_a", 1, 2) / "state.json"
    text = path.read_text()
    match damage:
        case "flip":
            path.write_text(text.replace('"iter_num": 5', '"iter_num": 7'))
        case "truncate":
            path.write_text(text[: len(text) // 2])
        case "empty":
            path.write_text("")
        case "missing":
            path.unlink()
        case "newer":
            path.write_text(json.dumps({**json.loads(text), "format_version": 99}))
    with caplog.at_level(logging.WARNING):
        assert names(memory) == ["checkpoint_00000004_a"]
    assert f"a state in node memory is passed over: {'' if damage != 'missing' else '[Errno 2]'}" in caplog.text
    assert str(path) in caplog.text


def test_what_else_lies_there_is_no_state(folder: Path) -> None:
    memory = NodeMemory(str(folder), "run")
    kept(memory, 4)
    for name in ("checkpoint_00000009_a", "checkpoint_9_a.0-of-1", "notes", ".checkpoint_00000009_a.0-of-1"):
        (memory.path / name).mkdir()
    assert names(memory) == ["checkpoint_00000004_a"]


def test_only_this_user_can_look_inside(folder: Path) -> None:
    memory = NodeMemory(str(folder), "run")
    slot = kept(memory, 4)
    for path in (memory.root, memory.path, memory.share_path("checkpoint_00000004_a", 0, 1)):
        assert path.stat().st_mode & 0o077 == 0
    assert all(file.stat().st_mode & 0o077 == 0 for file in memory.path.rglob("*.safetensors"))
    del slot


@pytest.mark.parametrize("where", ["root", "run"])
@pytest.mark.parametrize("kind", ["another user's", "group-writable", "a link"])
def test_a_folder_that_others_can_write_to_is_refused(
    folder: Path, tmp_path: Path, where: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = folder / f"nanogpt-orchestrator-{os.getuid()}"
    root.mkdir(mode=0o700)
    path = root if where == "root" else root / "run"
    path.mkdir(mode=0o700, exist_ok=True)
    match kind:
        case "another user's":
            lstat = Path.lstat

            def of_another(self: Path) -> os.stat_result:
                found = lstat(self)
                return os.stat_result((*found[:4], found.st_uid + 1, *found[5:])) if self == path else found

            monkeypatch.setattr(Path, "lstat", of_another)
        case "group-writable":
            path.chmod(0o770)
        case "a link":
            (tmp_path / "elsewhere").mkdir(mode=0o700)
            path.rmdir()
            path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"belongs to another user, or others may write to it: delete it") as told:
        NodeMemory(str(folder), "run")
    assert str(path) in str(told.value)


@pytest.mark.parametrize("run_id", ["..", "a/b", "", "x" * 65, "run\n", "run id", "."])
def test_an_id_that_is_none_is_refused(folder: Path, run_id: str) -> None:
    """It comes from storage, and becomes part of a path that may be deleted."""
    with pytest.raises(CheckpointError, match=r"in run\.json is no id of a run"):
        NodeMemory(str(folder), run_id)
    with pytest.raises(CheckpointError):
        run_path(str(folder), run_id)


def test_a_missing_folder_is_refused(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"missing is no folder on this node"):
        NodeMemory(str(folder / "missing"), "run")


def test_all_processes_know_their_node_by_one_name(folder: Path) -> None:
    (folder / "other").mkdir()
    first, second = NodeMemory(str(folder), "run"), NodeMemory(str(folder), "another")
    other = NodeMemory(str(folder / "other"), "run")
    assert first.node_id == second.node_id != other.node_id


def test_where_a_node_has_no_memory_its_leftovers_are_nobodys(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two nodes one has none: the other lets go, so that runs that need the room can have it."""
    monkeypatch.setattr(World, "gather_json", lambda _world, value: [value, None if value else "no such folder"])
    nodes = open_node_memory(World(size=2), str(folder), "run")
    assert nodes.memory is None
    assert nodes.ids == ("0", "1")
    NodeMemory(str(folder), "next")._delete_ended_runs()
    assert not (folder / f"nanogpt-orchestrator-{os.getuid()}" / "run").exists()


def test_ranks_of_a_node_share_the_files_between_them() -> None:
    files = {f"{kind}-{rank:05d}-of-00005.safetensors": {} for kind in ("model", "optimizer") for rank in range(5)}
    ids = ("x", "y", "x", "z", "y")
    for node in set(ids):
        held = [set(NodeTopology(None, ids, rank).share_of(files)) for rank in range(5) if ids[rank] == node]
        assert set().union(*held) == files.keys()
        assert sum(map(len, held)) == len(files)
    for rank in range(5):
        mine = {f"{kind}-{rank:05d}-of-00005.safetensors" for kind in ("model", "optimizer")}
        assert mine <= NodeTopology(None, ids, rank).share_of(files).keys(), "it uploads its own from there"


def test_states_of_other_attempts_are_forgotten_but_for_one(folder: Path) -> None:
    earlier = NodeMemory(str(folder), "run")
    slots = [kept(earlier, 4, "a"), kept(earlier, 5, "a"), kept(earlier, 5, "b")]
    memory = NodeMemory(str(folder), "run")
    assert memory.holds_other_than("c")
    memory.forget_other_than("c", keep="checkpoint_00000005_a")
    assert names(memory) == ["checkpoint_00000005_a"]
    assert memory.holds_other_than("c")
    slots.append(kept(memory, 6, "c"))
    memory.forget_other_than("c")
    assert names(memory) == ["checkpoint_00000006_c"]
    assert not memory.holds_other_than("c")


def test_an_attempt_that_was_given_up_forgets_nothing_of_a_newer_one(folder: Path) -> None:
    late = NodeMemory(str(folder), "run")
    slot = kept(late, 4, "late")
    newer = NodeMemory(str(folder), "run")
    kept(newer, 5, "newer")
    late.forget_other_than("late")
    assert names(newer) == ["checkpoint_00000004_late", "checkpoint_00000005_newer"]
    newer.forget_other_than("newer")
    assert names(newer) == ["checkpoint_00000005_newer"]
    with pytest.raises(FileNotFoundError):
        slot.open()


def test_a_slot_that_a_newer_attempt_has_cleaned_up_cannot_be_sealed(folder: Path) -> None:
    slot = SnapshotBuffer(NodeMemory(str(folder), "run"), layouts())
    fill(slot, 4)
    newer = NodeMemory(str(folder), "run")
    with pytest.raises(FileNotFoundError):
        seal(slot, 4, "late")
    assert names(newer) == []


def test_the_last_one_to_leave_a_finished_run_deletes_it(folder: Path) -> None:
    first, second = NodeMemory(str(folder), "run"), NodeMemory(str(folder), "run")
    kept(first, 4)
    first.close(is_finished=True)
    assert names(second) == ["checkpoint_00000004_a"]
    second.close(is_finished=True)
    assert not second.path.exists()
    assert [path.name for path in second.root.iterdir()] == [".node"]


def test_a_run_that_is_not_finished_stays(folder: Path) -> None:
    memory = NodeMemory(str(folder), "run")
    kept(memory, 4)
    memory.close(is_finished=False)
    assert names(NodeMemory(str(folder), "run")) == ["checkpoint_00000004_a"]


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


def test_a_finished_run_stays_while_another_process_uses_it(folder: Path) -> None:
    memory = NodeMemory(str(folder), "run")
    kept(memory, 4)
    with held(memory.path / ".lock", memory_module.fcntl.LOCK_SH):
        memory.close(is_finished=True)
        assert memory.path.exists()


def test_a_folder_that_is_deleted_while_it_is_opened_is_made_anew(folder: Path) -> None:
    """Another run needs room and deletes what looks ended, at the moment at which it begins again."""
    before = NodeMemory(str(folder), "run")
    kept(before, 4)
    before.close(is_finished=False)
    opened: list[NodeMemory] = []
    opening = threading.Thread(target=lambda: opened.append(NodeMemory(str(folder), "run")))
    deleting = "import shutil; time.sleep(0.2); shutil.rmtree(os.path.dirname(sys.argv[1]))"
    with held(before.path / ".lock", memory_module.fcntl.LOCK_EX, deleting) as process:
        opening.start()
        opening.join(0.3)
        assert not opened, "it waits for the one who deletes"
        assert process.stdin
        process.stdin.close()
    opening.join(10)
    (memory,) = opened
    assert names(memory) == []
    kept(memory, 5)
    NodeMemory(str(folder), "next")._delete_ended_runs()
    assert names(memory) == ["checkpoint_00000005_a"], "its lock is the one that others see"


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
