"""A state of which every rank holds a part is restored by other ranks, whole or in other parts, and back."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

import pytest

from orchestrator.checkpoint.formats.nanogpt import write_nanogpt
from orchestrator.config import TrainConfig
from tests.support import ranks
from tests.support.damage import flip_a_bit
from tests.support.readings import break_off_first_readings
from tests.support.runs import checkpoints_in
from tests.support.sharding import Case, known_state, restore_all, save, stand_on_node

LAYOUT = "001"  # three ranks on two nodes save
Saved = Callable[[bool], Case]


@pytest.fixture(scope="module")
def known() -> dict[bool, Case]:
    return {}


@pytest.fixture(scope="module")
def shared(memory_dir: str) -> Iterator[Path]:
    folder = Path(memory_dir, "sharded")
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def saved(tiny: TrainConfig, shared: Path, known: dict[bool, Case]) -> Saved:
    """Return a state that lies in storage and in the memories of two nodes: `saved(is_sharded)`."""

    def once(is_sharded: bool) -> Case:
        if is_sharded not in known:
            folder = shared / ("sharded" if is_sharded else "replicated")
            folder.mkdir()
            config = replace(tiny, out_dir=str(folder / "run"), n_embd=2, n_head=1)  # a rank's range may be empty
            case = Case(config, LAYOUT, is_sharded, str(folder))
            ended = ranks.call(save, len(LAYOUT), folder / "save.log", case)
            assert ended.is_done, ended.said
            known[is_sharded] = case
        return known[is_sharded]

    return once


@pytest.fixture
def mine(saved: Saved, folder: Path) -> Saved:
    """Return a copy for one test, which may damage it."""

    def copy(is_sharded: bool) -> Case:
        case = saved(is_sharded)
        shutil.copytree(case.memory, folder)
        case = replace(case, config=replace(case.config, out_dir=str(folder / "run")), memory=str(folder))
        for path in folder.glob("?/*/*_*"):
            path.rename(path.with_name(checkpoints_in(case.config.out_dir).folder.run_id()))
        return case

    return copy


def restored(cases: list[Case], log: Path, *prepare: Callable[[int], None]) -> tuple[list[list[dict[str, int]]], str]:
    """Restore states one after the other on as many ranks; return what each rank told of each, and all that was said.

    Every rank compares every bit of what it holds with the known state.
    """
    ended = ranks.call(restore_all, len(cases[0].layout), log, cases, *prepare)
    assert ended.is_done, ended.said
    return [json.loads(found) for found in re.findall("restored (.*)", ended.said)], ended.said


def size_bytes(case: Case, names: str = "*") -> int:
    checkpoint = checkpoints_in(case.config.out_dir).select()
    return sum(record.size_bytes for file, record in checkpoint.files.items() if fnmatch(file, names))


@pytest.mark.parametrize(
    ("was_sharded", "layout"),
    [
        (True, "001"),
        *(pytest.param(True, layout, marks=pytest.mark.slow) for layout in ("000", "10", "0", "0123")),
        *(pytest.param(False, layout, marks=pytest.mark.slow) for layout in ("001", "10", "0", "0123")),
    ],
)
def test_a_state_is_restored_in_other_slices(saved: Saved, tmp_path: Path, was_sharded: bool, layout: str) -> None:
    case = saved(was_sharded)
    in_memory = [replace(case, layout=layout, is_sharded=to_sharded) for to_sharded in (True, False)]
    found, said = restored([*in_memory, *(replace(each, memory="") for each in in_memory)], tmp_path / "log")
    is_missing = was_sharded and "1" not in layout
    in_no_memory_bytes = size_bytes(case, "optimizer-00002-*") if is_missing else 0
    read_bytes = [told[0]["storage_bytes"] for told in found]
    assert read_bytes == 2 * [in_no_memory_bytes] + 2 * [size_bytes(case)], f"once, by all ranks together: {said}"
    assert {told[0]["size_bytes"] for told in found} == {size_bytes(case)}
    for told in (found[0], found[2]):  # to sharded states
        for each in told:
            assert each["alone"] <= each["moment_bytes"], "its own moments"
            assert each["with_all"] <= each["other_bytes"], "weights and the step count"
            assert each["alone"] == 0 or not was_sharded or len(layout) != len(LAYOUT), "each has read its own moments"


@pytest.mark.slow
def test_a_reading_that_broke_off_is_sent_again(saved: Saved, tmp_path: Path) -> None:
    case = replace(saved(True), layout="00", memory="")
    _, said = restored([case], tmp_path / "log", break_off_first_readings)
    assert {int(rank) for rank in re.findall(r"rank (\d) is broken off", said)} == {0, 1}


@pytest.mark.slow
def test_slices_that_no_memory_has_come_from_storage(mine: Saved, tmp_path: Path) -> None:
    case = mine(True)
    (path,) = Path(case.memory).glob("1/*/*/*/optimizer-00002-*")
    flip_a_bit(path.parent, path.name)
    ((told, *_),), said = restored([case], tmp_path / "log")
    assert told["storage_bytes"] == size_bytes(case, path.name)
    assert f"{path.name} was read from storage; passed over: the memory of rank 2's node ({path} is damaged" in said


@pytest.mark.slow
def test_a_state_is_whole_if_the_memories_of_all_nodes_have_it_together(mine: Saved, tmp_path: Path) -> None:
    case = mine(True)
    for name in checkpoints_in(case.config.out_dir).names():
        shutil.rmtree(Path(case.config.out_dir, name))
    ((told, *_),), _ = restored([case], tmp_path / "both")
    assert told["storage_bytes"] == 0
    ((alone,),), said = restored([replace(case, layout="0")], tmp_path / "one")
    assert alone == {"is_new": True}
    file = "optimizer-00002-of-00003.safetensors"
    assert f"in node memory is not whole, falling back to the one before: {file} in the memory of no node" in said


@pytest.mark.slow
def test_a_sharded_state_begins_with_nanogpts(tiny: TrainConfig, folder: Path) -> None:
    """It lies on every node's own disk: one rank of each node reads it."""
    folder.mkdir()
    case = Case(replace(tiny, out_dir=str(folder / "run"), init_from="ckpt.pt"), LAYOUT)
    for node in set(LAYOUT):
        (folder / node).mkdir()
        write_nanogpt(known_state(case.config), folder / node / "ckpt.pt")
    (told,), _ = restored([case], folder / "log", partial(stand_on_node, str(folder), LAYOUT))
    assert [each["alone"] for each in told] == [0, told[1]["moment_bytes"], 0], "rank 1 receives its own moments"
    assert [each["with_all"] for each in told] == [0, told[1]["other_bytes"], 0]
