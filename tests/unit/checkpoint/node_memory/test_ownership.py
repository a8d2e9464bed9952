"""States belong to attempts and runs, and are deleted when nobody needs them any more."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from orchestrator.checkpoint.save import node_memory as memory_module
from orchestrator.checkpoint.save.node_memory import NodeMemory
from orchestrator.checkpoint.save.node_topology import NodeTopology, open_node_memory
from orchestrator.checkpoint.save.snapshot_buffer import SnapshotBuffer
from orchestrator.distributed.world import World
from tests.support.node_memories import fill, held, kept, layouts, names, seal


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
    assert memory.shares_of_earlier("c")
    memory.forget_other_than("c", keep="checkpoint_00000005_a")
    assert names(memory) == ["checkpoint_00000005_a"]
    assert memory.shares_of_earlier("c")
    slots.append(kept(memory, 6, "c"))
    memory.forget_other_than("c")
    assert names(memory) == ["checkpoint_00000006_c"]
    assert not memory.shares_of_earlier("c")


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
