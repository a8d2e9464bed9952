"""Each state in node memory belongs to one run and one attempt; nobody else uses, damages or keeps it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator import loop
from orchestrator.checkpoint.save.node_memory import states_in
from orchestrator.checkpoint.snapshot import tensors_equal
from orchestrator.config import TrainConfig
from orchestrator.distributed.device import resolve
from orchestrator.distributed.world import World
from orchestrator.errors import ConfigError
from orchestrator.storage.run_folder import RunFolder
from orchestrator.training.attempt import Callbacks, Outcome
from tests.conftest import Undisturbed, final_state, in_steps
from tests.support import ranks
from tests.support.blackout import Standstill, blackout, struck
from tests.support.faults import Fault
from tests.support.scenes import Scene, new, whole

GIVEN_UP = "a later attempt of this run writes here now, this one was given up"


def stop_after_nine(_rank: int) -> None:
    calls = iter(range(10**6))
    original = loop.train

    def train(config: TrainConfig, world: World, hooks: Callbacks, folder: RunFolder) -> Outcome:
        return original(config, world, replace(hooks, stop_request=in_steps(lambda: next(calls) >= 9)), folder)

    loop.train = train  # type: ignore[assignment]


@pytest.mark.slow
def test_a_stopped_run_leaves_nothing_in_memory(tiny: TrainConfig, folder: Path, undisturbed: Undisturbed) -> None:
    scene = new(tiny, folder, snapshot_interval=1)
    stopped = scene.train("001", "stopped", prepare=stop_after_nine)
    assert stopped.is_done, stopped.said
    assert final_state(scene.config.out_dir).iter_num == 10
    assert scene.is_clean("01")
    again = scene.train("001", "again")
    assert again.is_done, again.said
    assert scene.begin_record()["iter"] == 10
    assert tensors_equal(final_state(scene.config.out_dir), undisturbed(tiny, 3))


@pytest.mark.slow
def test_a_run_begun_anew_does_not_find_the_states_of_the_old_one(left: Callable[[str, str], Scene]) -> None:
    scene = left("001", "ahead")
    shutil.rmtree(scene.config.out_dir)
    short = replace(scene, config=replace(scene.config, max_iters=2))
    again = short.train("001", "anew")
    assert again.is_done, again.said
    assert short.begin_record()["from"] is None
    assert short.computed(short.begin_record()["attempt"]) == [0, 1]


@pytest.mark.slow
def test_a_state_of_another_model_is_refused(left: Callable[[str, str], Scene]) -> None:
    """Before the first checkpoint in storage, memory alone knows what the run was."""
    scene = left("001", "ahead")
    for name in scene.store.names():
        shutil.rmtree(scene.store.folder.path(name))
    config = resolve(replace(scene.config, n_layer=3, memory_dir=scene.node("1")))
    with pytest.raises(ConfigError, match=r"holds another model \(n_layer=2, asked for 3\)"):
        loop.train(config, World(attempt="other"))
    assert scene.newest("1") == scene.newest("0"), "it is still there for the right settings"


@pytest.mark.slow
def test_two_runs_on_one_node_do_not_disturb_each_other(tiny: TrainConfig, folder: Path) -> None:
    """One loses power while the other runs and ends; then it goes on from memory. Both are the same run by settings."""
    first, second = new(tiny, folder, snapshot_interval=1), new(tiny, folder / "second", snapshot_interval=1)
    faults = blackout([("sealed", 11)] * 2, folder / "blackout")
    with ThreadPoolExecutor() as pool:
        cut = pool.submit(first.train, "00", "cut", faults)
        whole = pool.submit(ranks.train, second.config, 2, folder / "second.log", (), first.nodes("00"))
    assert cut.result().codes == [-9, -9], cut.result().said
    assert whole.result().is_done, whole.result().said
    assert [path.name for path in first.run_in("0").parent.iterdir() if path.is_dir()] == [first.store.folder.run_id()]
    name = first.newest("0")
    again = first.train("00", "again")
    assert again.is_done, again.said
    assert (first.begin_record()["from"], first.begin_record()["from_storage_bytes"]) == (name, 0)
    assert "node memory, training pauses" not in again.said + whole.result().said
    assert tensors_equal(final_state(first.config.out_dir), final_state(second.config.out_dir))
    assert first.is_clean("0")


def contents(scene: Scene, attempt: str) -> dict[str, bytes]:
    """Return every file that an attempt has in node memory."""
    paths = [path for path in scene.folder.glob(f"?/*/*/*_{attempt}.*/*") if path.is_file()]
    return {str(path): path.read_bytes() for path in paths}


@pytest.mark.parametrize(
    ("point", "iter_num", "rank"),
    [("during", 8, 1), ("during", 8, 0), ("seal", 11, 2), ("seal", 11, 0), ("sealed", 9, 1)],
)
@pytest.mark.slow
def test_an_attempt_that_was_given_up_and_comes_back_does_no_harm(
    tiny: TrainConfig, folder: Path, undisturbed: Undisturbed, point: str, iter_num: int, rank: int
) -> None:
    scene = new(tiny, folder, checkpoint_interval=8, snapshot_interval=1)
    still = Standstill(point, iter_num, rank, folder / "still")
    announced = f"{scene.config.out_dir}/checkpoint_0000001[6-9]_*/state.json"
    faults = blackout([("sealed", 20)] * 3, folder / "blackout", announced)
    with ThreadPoolExecutor() as pool:
        late = pool.submit(scene.train, "001", "late", [still])
        try:
            still.wait()
            newer = scene.train("001", "newer", faults)
            assert newer.codes == [-9] * 3, newer.said
            attempt = scene.begin_record()["attempt"]
            in_memory, in_storage = contents(scene, attempt), whole(scene)
            name = scene.newest("0")
            assert name.endswith(f"_{attempt}")
        finally:
            still.wake()
    assert 0 not in late.result().codes, late.result().said
    assert GIVEN_UP in late.result().said
    assert whole(scene) == in_storage, "it announces nothing, and deletes nothing"
    assert contents(scene, attempt) == in_memory
    again = scene.train("001", "again")
    assert again.is_done, again.said
    assert (scene.begin_record()["from"], scene.begin_record()["from_storage_bytes"]) == (name, 0)
    assert tensors_equal(final_state(scene.config.out_dir), undisturbed(tiny, 3))
    assert scene.is_clean("01")


@pytest.mark.slow
def test_what_killed_attempts_have_begun_in_storage_is_removed(tiny: TrainConfig, folder: Path) -> None:
    scene = new(tiny, folder)
    fault = Fault("during", 7, 0, folder / "fired")
    killed = scene.train("0", "killed", [fault])
    assert fault.marker.exists(), killed.said
    (begun,) = set(scene.store.names()) - whole(scene)
    again = scene.train("0", "again")
    assert again.is_done, again.said
    assert begun not in scene.store.names()
    assert set(scene.store.names()) == whole(scene)


def test_one_state_is_whole_at_every_moment(tiny: TrainConfig, folder: Path) -> None:
    """One rank of a node is late with its share of a state; training goes on for a while, and power fails."""
    scene = new(tiny, folder, checkpoint_interval=100, snapshot_interval=1)
    ended = scene.train("00", "cut", blackout([("forward", 16), ("seal", 11)], folder / "blackout"))
    assert struck(folder / "blackout", 2), ended.said
    assert states_in(scene.run_in("0")), "no rank overwrites the state before until all have sealed this one"
