"""A state in node memory is whole or not there, and written by this user alone."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import pytest
import torch

from orchestrator.checkpoint.save.node_memory import NodeMemory, run_path, share_path, states_in
from orchestrator.checkpoint.save.snapshot_buffer import SnapshotBuffer
from orchestrator.checkpoint.tensor_file import read_tensors
from orchestrator.errors import CheckpointError
from orchestrator.storage.run_folder import RunFolder
from tests.support.node_memories import FILES, fill, kept, layouts, names, seal, tensors_of


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
    (checkpoint,) = states_in(memory.path)["checkpoint_00000004_a"].values()
    assert checkpoint.files == slot.records
    path = share_path(memory.path, "checkpoint_00000004_a", 0, 1)
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
    inode = (share_path(memory.path, "checkpoint_00000005_a", 0, 1) / FILES[0]).stat().st_ino
    fill(slots[1], 6)
    seal(slots[1], 6)
    path = share_path(memory.path, "checkpoint_00000006_a", 0, 1) / FILES[0]
    assert path.stat().st_ino == inode, "the same pages are written over"


def test_the_same_state_taken_again_replaces_the_one_before(folder: Path) -> None:
    memory = NodeMemory(str(folder), "run")
    kept(memory, 4)
    second = kept(memory, 4)
    assert names(memory) == ["checkpoint_00000004_a"]
    assert states_in(memory.path)["checkpoint_00000004_a"][0].files == second.records


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
    assert sorted(states_in(memory.path)["checkpoint_00000004_a"]) == [0, 1, 2]
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
    path = share_path(memory.path, "checkpoint_00000005_a", 1, 2) / "state.json"
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
    for path in (memory.root, memory.path, share_path(memory.path, "checkpoint_00000004_a", 0, 1)):
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
