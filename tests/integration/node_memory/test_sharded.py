"""A state of which every rank holds a part is restored by other ranks, whole or in other parts, and back."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator.config import TrainConfig
from tests.support import ranks
from tests.support.runs import checkpoints_in
from tests.support.sharding import Case, restore_all, save

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
            case = Case(replace(tiny, out_dir=str(folder / "run")), LAYOUT, is_sharded, str(folder))
            ended = ranks.call(save, len(LAYOUT), folder / "save.log", case)
            assert ended.is_done, ended.said
            known[is_sharded] = case
        return known[is_sharded]

    return once


def restored(cases: list[Case], log: Path, **args: Any) -> tuple[list[list[dict[str, Any]]], str]:
    """Restore states one after the other on as many ranks; return what each rank told of each, and all that was said.

    Every rank compares all bits of what it holds.
    """
    ended = ranks.call(restore_all, len(cases[0].layout), log, cases, *args.values())
    assert ended.is_done, ended.said
    return [json.loads(found) for found in re.findall("restored (.*)", ended.said)], ended.said


def size_bytes(case: Case, files: str) -> int:
    checkpoint = checkpoints_in(case.config.out_dir).select()
    return sum(record.size_bytes for file, record in checkpoint.files.items() if re.match(files, file))


@pytest.mark.parametrize(
    ("was_sharded", "layout"),
    [
        (True, "001"),
        *(pytest.param(True, layout, marks=pytest.mark.slow) for layout in ("000", "10", "0", "0123")),
        *(pytest.param(False, layout, marks=pytest.mark.slow) for layout in ("001", "10", "0", "0123")),
    ],
)
def test_a_state_is_restored_in_other_slices(saved: Saved, tmp_path: Path, was_sharded: bool, layout: str) -> None:
    before = saved(was_sharded)
    to_sharded, to_replicated = (replace(before, layout=layout, is_sharded=each) for each in (True, False))
    cases = [to_sharded, to_replicated]
    without_memory = [replace(case, memory="") for case in cases]
    found, said = restored([*cases, *without_memory], tmp_path / "log")
    missing = "optimizer-00002" if was_sharded and "1" not in layout else "nothing"
    for (first, *_), expected_bytes in zip(
        found, [size_bytes(before, missing)] * 2 + [size_bytes(before, "")] * 2, strict=True
    ):
        assert first["storage_bytes"] == expected_bytes, said
        assert first["size_bytes"] == size_bytes(before, "")
    for ranks_told in (found[0], found[2]):  # sharded
        moment_bytes = sum(rank["moment_bytes"] for rank in ranks_told)
        assert moment_bytes < first["size_bytes"]
        for rank in ranks_told:
            assert rank["alone"] <= rank["moment_bytes"], "no more than it wants"
            assert rank["with_all"] <= size_bytes(before, "") - moment_bytes, "weights and the step count alone"
            assert rank["alone"] == 0 or not was_sharded or len(layout) != len(LAYOUT), "each reads its own"
