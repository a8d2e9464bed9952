"""Files in node memory are damaged: a run resumes from intact copies, or from the state before."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.checkpoint.snapshot import tensors_equal
from orchestrator.config import TrainConfig
from tests.conftest import Undisturbed, final_state
from tests.support.damage import WHY, damage, damage_description, flip_a_bit, remove, truncate
from tests.support.scenes import Scene, iter_of


@pytest.mark.parametrize("how", [flip_a_bit, truncate, remove, damage_description])
@pytest.mark.slow
def test_damage_in_the_memory_of_one_node(
    left: Callable[[str, str], Scene],
    tiny: TrainConfig,
    undisturbed: Undisturbed,
    how: Callable[[Path, str], None],
) -> None:
    """The two ranks of that node find it, and all take the file from the other node."""
    scene = left("001", "ahead")
    name = scene.newest("0")
    file, path = damage(scene, "0", how)
    again = scene.train("001", "again")
    assert again.is_done, again.said
    begin = scene.begin_record()
    assert (begin["from"], begin["from_storage_bytes"]) == (name, 0)
    assert tensors_equal(final_state(scene.config.out_dir), undisturbed(tiny, 3))
    if how is damage_description:
        assert f"a state in node memory is passed over: {path.parent}/state.json is damaged" in again.said
    else:
        expected = f"{name}: {file} was read from the memory of rank 2's node; passed over: the memory of rank 0's node"
        assert expected in again.said
        assert str(path) in again.said
        assert WHY[how] in again.said


@pytest.mark.parametrize("how", [flip_a_bit, remove, damage_description])
@pytest.mark.slow
def test_damage_everywhere_in_memory_and_storage_has_the_same_state(
    left: Callable[[str, str], Scene],
    tiny: TrainConfig,
    undisturbed: Undisturbed,
    how: Callable[[Path, str], None],
) -> None:
    scene = left("001", "same")
    name = scene.newest("0")
    (file, _), _ = damage(scene, "0", how), damage(scene, "1", how)
    again = scene.train("001", "again")
    assert again.is_done, again.said
    begin = scene.begin_record()
    assert begin["from"] == name
    assert tensors_equal(final_state(scene.config.out_dir), undisturbed(tiny, 3))
    if how is damage_description:
        assert again.said.count("a state in node memory is passed over: ") == 2
        assert begin["from_storage_bytes"] == begin["size_bytes"]
    else:
        assert 0 < begin["from_storage_bytes"] < begin["size_bytes"] / 2, "one file of six"
        assert f"{name}: {file} was read from storage; passed over: the memory of rank 0's node (" in again.said
        assert "), the memory of rank 2's node (" in again.said


@pytest.mark.parametrize("how", [truncate, damage_description])
@pytest.mark.slow
def test_damage_everywhere_falls_back_to_the_state_before(
    left: Callable[[str, str], Scene],
    tiny: TrainConfig,
    undisturbed: Undisturbed,
    how: Callable[[Path, str], None],
) -> None:
    scene = left("001", "ahead")
    name = scene.newest("0")
    (file, path), _ = damage(scene, "0", how), damage(scene, "1", how)
    again = scene.train("001", "again")
    assert again.is_done, again.said
    begin = scene.begin_record()
    assert scene.config.checkpoint_interval <= begin["iter"] < iter_of(name)
    assert tensors_equal(final_state(scene.config.out_dir), undisturbed(tiny, 3))
    if how is truncate:
        assert f"{name} in node memory is not whole, falling back to the one before: {file}" in again.said
        assert str(path) in again.said


@pytest.mark.slow
def test_a_first_state_that_is_damaged_is_as_good_as_none(left: Callable[[str, str], Scene]) -> None:
    """Nothing of the run is in storage: it begins again, and needs nobody for that."""
    scene = left("001", "same")
    for name in scene.store.names():
        shutil.rmtree(scene.store.folder.path(name))
    damage(scene, "0", flip_a_bit)
    damage(scene, "1", flip_a_bit)
    short = replace(scene, config=replace(scene.config, max_iters=2))
    again = short.train("001", "again")
    assert again.is_done, again.said
    assert short.begin_record()["from"] is None
    assert "falling back to the one before" in again.said
