"""A run resumes on other ranks, on other nodes, by other clocks, and with little node memory or none."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.checkpoint.save.node_memory import states_in
from orchestrator.checkpoint.snapshot import tensors_equal
from orchestrator.checkpoint.store import parse_state, state_text
from orchestrator.config import TrainConfig
from tests.conftest import Undisturbed, final_state
from tests.support import ranks
from tests.support.scenes import Scene, iter_of, new, saved_at
from tests.support.tmpfs import small_tmpfs


@pytest.mark.parametrize(
    ("before", "after"), [("001", "01"), ("001", "1"), ("001", "210"), ("01", "001"), ("0", "012")]
)
@pytest.mark.slow
def test_the_ranks_and_their_nodes_change(left: Callable[[str, str], Scene], before: str, after: str) -> None:
    scene = left(before, "ahead")
    expected = scene.state("0")
    stopped = replace(scene, config=replace(scene.config, max_iters=expected.iter_num))
    again = stopped.train(after, "again")
    assert again.is_done, again.said
    begin = stopped.begin_record()
    assert (begin["iter"], begin["from_storage_bytes"]) == (expected.iter_num, 0)
    last = final_state(scene.config.out_dir)
    assert last.iter_num == expected.iter_num
    assert tensors_equal(last, expected)
    assert scene.is_clean(after)


@pytest.mark.slow
def test_fewer_ranks_go_on_with_the_same_bits(
    left: Callable[[str, str], Scene], tiny: TrainConfig, undisturbed: Undisturbed
) -> None:
    scene = left("001", "ahead")
    assert scene.train("10", "again").is_done
    assert scene.begin_record()["from_storage_bytes"] == 0
    final, expected = final_state(scene.config.out_dir), undisturbed(tiny, 3)
    assert tensors_equal(final, expected)
    assert final.best_val_loss == expected.best_val_loss


@pytest.mark.slow
def test_a_full_memory_on_one_node(tiny: TrainConfig, folder: Path, tmp_path: Path, undisturbed: Undisturbed) -> None:
    scene = new(tiny, folder)
    with small_tmpfs(tmp_path / "small", "512k") as small:
        (folder / "1").symlink_to(small)
        ended = scene.train("001", "full")
        assert ended.is_done, ended.said
        assert ended.said.count("no more states are kept in node memory, training pauses for every checkpoint: ") == 1
        assert f"memory_dir={scene.node('1')} has room for 0.00 GB: enlarge it" in ended.said
        assert scene.is_clean("01")
    assert saved_at(scene)[-1] == 24
    assert len(saved_at(scene)) >= 5
    assert tensors_equal(final_state(scene.config.out_dir), undisturbed(tiny, 3))


@pytest.mark.parametrize("where", ["nowhere", "missing on one node"])
@pytest.mark.slow
def test_without_node_memory(tiny: TrainConfig, folder: Path, undisturbed: Undisturbed, where: str) -> None:
    scene = new(tiny, folder)
    missing = str(folder / "missing")
    dirs = ["", "", ""] if where == "nowhere" else [scene.node("0"), missing, scene.node("0")]
    ended = ranks.train(scene.config, 3, folder / "without.log", memory_dirs=dirs)
    assert ended.is_done, ended.said
    told = "no states are kept in node memory, training pauses for every checkpoint: "
    assert ended.said.count(told) == (where != "nowhere"), "who wants none need not be told"
    assert where == "nowhere" or f"memory_dir={missing} is no folder on this node" in ended.said
    assert saved_at(scene) == [4, 8, 12, 16, 20, 24]
    assert tensors_equal(final_state(scene.config.out_dir), undisturbed(tiny, 3))


def set_clock(path: Path, time_s: float) -> None:
    """Make a state say that it was saved at another time, and its files too."""
    file = path / "state.json"
    file.write_text(state_text({**parse_state(file.read_bytes(), ""), "saved_at_s": time_s}))
    for each in (*path.iterdir(), path):
        os.utime(each, (time_s, time_s))


@pytest.mark.parametrize("node", ["0", "1"])
@pytest.mark.slow
def test_clocks_do_not_decide(left: Callable[[str, str], Scene], node: str) -> None:
    """One node's clock is years behind, the other's and storage's are years ahead."""
    scene = left("001", "ahead")
    name, expected = scene.newest("0"), scene.state("0")
    scene.lose(node)
    for other in {"0", "1"} - {node}:
        for state in states_in(scene.run_in(other)):
            for path in scene.shares(other, state):
                set_clock(path, 1e8 if state == name else 4e9)
    for state in scene.store.names():
        set_clock(Path(scene.store.folder.path(state)), 4.1e9)
    stopped = replace(scene, config=replace(scene.config, max_iters=iter_of(name)))
    again = stopped.train("001", "again")
    assert again.is_done, again.said
    assert stopped.begin_record()["from"] == name
    assert tensors_equal(final_state(scene.config.out_dir), expected)
