"""Ranks on nodes of their own, as processes: what is kept in node memory is used after any loss, and never wrongly."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.local import LocalFileSystem

from orchestrator import loop
from orchestrator.checkpoint.restore import read_once as reading
from orchestrator.checkpoint.restore import read_plan
from orchestrator.checkpoint.save.node_memory import run_path, share_path, states_in
from orchestrator.checkpoint.snapshot import Snapshot, tensors_equal
from orchestrator.checkpoint.store import Checkpoint, CheckpointStore, newest_name_first, parse_state, state_text
from orchestrator.checkpoint.tensor_file import FileRecord, read_tensors
from orchestrator.config import TrainConfig
from orchestrator.distributed.device import resolve
from orchestrator.distributed.world import World
from orchestrator.errors import ConfigError, StorageUnavailableError
from orchestrator.telemetry.metrics import read_metrics
from orchestrator.training.attempt import Callbacks, Outcome
from tests.conftest import Undisturbed, final_state, in_steps
from tests.support import ranks
from tests.support.blackout import Standstill, blackout, struck
from tests.support.faults import Fault
from tests.support.ranks import Ended
from tests.support.tmpfs import small_tmpfs

Record = dict[str, Any]
GIVEN_UP = "a later attempt of this run writes here now, this one was given up"


@dataclass(frozen=True)
class Scene:
    """A run of which only files are left: its folder, and the memories of its nodes."""

    config: TrainConfig
    folder: Path

    def node(self, name: str) -> str:
        path = self.folder / name
        path.mkdir(parents=True, exist_ok=True)
        return str(path)

    def nodes(self, layout: str) -> list[str]:
        """Return every rank's memory_dir: "001" are two ranks on node 0 and one on node 1."""
        return [self.node(name) for name in layout]

    @property
    def store(self) -> CheckpointStore:
        return CheckpointStore(self.config.out_dir)

    def run_in(self, node: str) -> Path:
        return run_path(self.node(node), self.store.folder.run_id())

    def newest(self, node: str) -> str:
        return newest_name_first(states_in(self.run_in(node)))[0]

    def iter_num(self, node: str = "0") -> int:
        return iter_of(self.newest(node))

    def shares(self, node: str, name: str) -> list[Path]:
        shares = states_in(self.run_in(node))[name]
        return [share_path(self.run_in(node), name, share, len(shares)) for share in shares]

    def state(self, node: str) -> Snapshot:
        """Read the newest state in a node's memory."""
        name, state, tensors = self.newest(node), {}, {}
        for path in self.shares(node, name):
            state = parse_state((path / "state.json").read_bytes(), str(path))
            for file, record in Checkpoint(name, state).files.items():
                tensors |= read_tensors(LocalFileSystem(), str(path / file), record)
        return Checkpoint(name, state).snapshot(tensors)

    def lose(self, *nodes: str) -> None:
        for node in nodes:
            shutil.rmtree(self.node(node))

    def is_clean(self, nodes: str) -> bool:
        """Return whether nothing of any run is left in the memory of these nodes."""
        roots = [root for node in nodes for root in Path(self.node(node)).iterdir()]
        return all([path.name for path in root.iterdir()] == [".node"] for root in roots)

    def train(
        self, layout: str, name: str, faults: Sequence[Any] = (), prepare: Callable[[int], None] | None = None
    ) -> Ended:
        return ranks.train(self.config, len(layout), self.folder / f"{name}.log", faults, self.nodes(layout), prepare)

    def begin_record(self) -> Record:
        """Return what the newest attempt said of its beginning."""
        return max(self._records("begin"), key=lambda record: record["time"])

    def computed(self, attempt: str) -> list[int]:
        """Return the iterations that an attempt has computed."""
        return sorted(record["iter"] for record in self._records("step") if record["attempt"] == attempt)

    def _records(self, kind: str) -> list[Record]:
        return [record for record in read_metrics(self.config.out_dir) if record["kind"] == kind]

    def copy(self, config: TrainConfig, folder: Path) -> Scene:
        """Return the same with another out_dir; config says how it goes on."""
        shutil.copytree(self.folder, folder)
        copy = Scene(replace(config, out_dir=str(folder / "run")), folder)
        for path in folder.glob("?/*/*_*"):
            path.rename(path.with_name(copy.store.folder.run_id()))
        return copy


@pytest.fixture
def folder(memory_dir: str, tmp_path: Path) -> Iterator[Path]:
    """A folder in memory for nodes, logs and out_dir."""
    folder = Path(memory_dir, tmp_path.name)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


Left = Callable[[TrainConfig, str, str], Scene]


@pytest.fixture(scope="module")
def scenes(memory_dir: str) -> Iterator[Left]:
    """Runs that lost power, by layout. Where memory is `ahead` of storage, nodes have newer states; else the `same`."""
    known: dict[tuple[str, str], Scene] = {}

    def left_behind(config: TrainConfig, layout: str, kind: str) -> Scene:
        if (layout, kind) not in known:
            known[layout, kind] = _lost_power(config, layout, kind, Path(memory_dir, f"{kind}-{layout}"))
        return known[layout, kind]

    yield left_behind
    for scene in known.values():
        shutil.rmtree(scene.folder, ignore_errors=True)


def _lost_power(config: TrainConfig, layout: str, kind: str, folder: Path) -> Scene:
    interval, point = (1, ("sealed", 11)) if kind == "ahead" else (1000, ("forward", 14))
    config = replace(config, out_dir=str(folder / "run"), checkpoint_interval=8, snapshot_interval=interval)
    scene = Scene(config, folder)
    scene.nodes(layout)
    faults = blackout([point] * len(layout), folder / "blackout", f"{config.out_dir}/checkpoint_*/state.json")
    ended = scene.train(layout, "lost power", faults)
    assert struck(folder / "blackout", len(layout)), ended.said
    assert ended.codes == [-9] * len(layout), ended.said
    in_storage = scene.store.select("latest").iter_num
    in_memory = {scene.iter_num(node) for node in set(layout)}
    assert len(in_memory) == 1
    if kind == "ahead":
        assert min(in_memory) >= 11 > in_storage
    else:
        assert in_memory == {in_storage}
    return scene


@pytest.fixture
def left(scenes: Left, tiny: TrainConfig, folder: Path) -> Callable[[str, str], Scene]:
    """A copy for one test: `left(layout, kind)`."""

    def copy(layout: str, kind: str) -> Scene:
        scene = scenes(tiny, layout, kind)
        return scene.copy(replace(scene.config, snapshot_interval=0), folder)

    return copy


def iter_of(name: str) -> int:
    return int(name.split("_")[1])


def test_after_the_death_of_all_processes_memory_has_it(
    left: Callable[[str, str], Scene], tiny: TrainConfig, undisturbed: Undisturbed
) -> None:
    scene = left("001", "ahead")
    name = scene.newest("0")
    again = scene.train("001", "again")
    assert again.is_done, again.said
    begin = scene.begin_record()
    assert (begin["from"], begin["iter"]) == (name, iter_of(name))
    assert begin["from_storage_bytes"] == 0
    assert f"resuming {name} ({begin['size_bytes'] / 1e6:.1f} MB of node memory in " in again.said
    assert scene.computed(begin["attempt"]) == list(range(begin["iter"], 24)), "nothing before it is repeated"
    assert tensors_equal(final_state(scene.config.out_dir), undisturbed(tiny, 3))
    assert scene.is_clean("01"), "what ends well leaves nothing"


@pytest.mark.parametrize("node", ["0", "1"])
@pytest.mark.slow
def test_the_memory_of_one_node_is_lost(
    left: Callable[[str, str], Scene], tiny: TrainConfig, undisturbed: Undisturbed, node: str
) -> None:
    scene = left("001", "ahead")
    expected = scene.iter_num()
    scene.lose(node)
    again = scene.train("001", "again")
    assert again.is_done, again.said
    begin = scene.begin_record()
    assert (begin["iter"], begin["from_storage_bytes"]) == (expected, 0)
    assert tensors_equal(final_state(scene.config.out_dir), undisturbed(tiny, 3))


@pytest.mark.slow
def test_a_node_whose_last_share_was_not_finished_is_left_out(
    left: Callable[[str, str], Scene], tiny: TrainConfig, undisturbed: Undisturbed
) -> None:
    scene = left("001", "ahead")
    name = scene.newest("0")
    unfinished = scene.shares("0", name)[1]
    unfinished.rename(unfinished.with_name(".slot-0123abcd"))
    again = scene.train("001", "again")
    assert again.is_done, again.said
    begin = scene.begin_record()
    assert (begin["from"], begin["from_storage_bytes"]) == (name, 0)
    assert tensors_equal(final_state(scene.config.out_dir), undisturbed(tiny, 3))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.slow
def test_without_any_memory_storage_is_read_once(left: Callable[[str, str], Scene], world_size: int) -> None:
    scene = left("001", "same")
    scene.lose("0", "1")
    checkpoint = scene.store.select("latest")
    expected = scene.store.read(checkpoint)
    stopped = replace(scene, config=replace(scene.config, max_iters=checkpoint.iter_num))
    again = stopped.train("0123"[:world_size], "again")
    assert again.is_done, again.said
    begin = stopped.begin_record()
    assert begin["from"] == checkpoint.name
    assert begin["world_size"] == world_size
    assert begin["from_storage_bytes"] == checkpoint.size_bytes, "headers included"
    assert tensors_equal(final_state(scene.config.out_dir), expected)


def break_off_first_readings(rank: int) -> None:
    """Let a process read wrong numbers at first, from a storage that stops answering at the end of the file."""
    read, begun = reading.stream_tensors, set[str]()

    def breaking(fs: Any, path: str, *rest: Any) -> Any:
        is_first = path not in begun
        begun.add(path)
        for name, tensor in read(fs, path, *rest):
            if is_first:
                tensor.add_(1)
            yield name, tensor
        if is_first:
            os.write(1, f"\nrank {rank} is broken off in {path}\n".encode())
            raise StorageUnavailableError(f"{path} cannot be read: broken off")

    reading.stream_tensors = breaking


def test_what_was_sent_of_a_reading_that_broke_off_is_sent_again(
    left: Callable[[str, str], Scene], tiny: TrainConfig, undisturbed: Undisturbed
) -> None:
    scene = left("001", "same")
    scene.lose("0", "1")
    name = scene.store.select("latest").name
    again = scene.train("001", "again", prepare=break_off_first_readings)
    assert again.is_done, again.said
    assert {int(rank) for rank in re.findall(r"rank (\d) is broken off", again.said)} == {0, 1, 2}
    assert scene.begin_record()["from"] == name
    assert tensors_equal(final_state(scene.config.out_dir), undisturbed(tiny, 3))


def flip_a_bit(share: Path, file: str) -> None:
    path = share / file
    content = bytearray(path.read_bytes())
    content[-5] ^= 4
    path.write_bytes(content)


def truncate(share: Path, file: str) -> None:
    path = share / file
    os.truncate(path, path.stat().st_size - 1)


def remove(share: Path, file: str) -> None:
    (share / file).unlink()


def damage_description(share: Path, _file: str) -> None:
    flip_a_bit(share, "state.json")


WHY = {flip_a_bit: "is damaged: its checksum differs", truncate: "it was cut off", remove: "is missing"}


def damage(scene: Scene, node: str, how: Callable[[Path, str], None]) -> tuple[str, Path]:
    """Damage the largest file of the newest state in a node's memory, or its description; return file and path."""
    paths = [path for share in scene.shares(node, scene.newest(node)) for path in share.glob("*.safetensors")]
    path = max(paths, key=lambda path: path.stat().st_size)
    how(path.parent, path.name)
    return path.name, path


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


def tell_what_is_read_and_sent(rank: int) -> None:
    """Let a process say which files it reads at the beginning, and what it sends or receives."""
    read, send = reading.stream_tensors, World.broadcast

    def say(text: str) -> None:
        os.write(1, f"\n{text}\n".encode())  # at once, and on a line of its own: three processes write to one file

    def telling(fs: Any, path: str, *rest: Any) -> Any:
        say(f"rank {rank} reads {path}")
        return read(fs, path, *rest)

    def sending(world: World, tensors: list[Any], source: int) -> None:
        if tensors:
            say(f"rank {rank} hears of rank {source}: {sum(tensor.nbytes for tensor in tensors)} bytes")
        send(world, tensors, source)

    reading.stream_tensors, World.broadcast = telling, sending  # type: ignore[assignment,method-assign]


@pytest.mark.parametrize("what", ["both nodes have it", "one node has it", "one file is damaged on one node"])
def test_who_has_the_state_in_memory_reads_it_and_only_the_rest_is_sent(
    left: Callable[[str, str], Scene], tiny: TrainConfig, undisturbed: Undisturbed, what: str
) -> None:
    scene = left("001", "ahead")
    name = scene.newest("0")
    size_bytes = {file: record.size_bytes for path in scene.shares("0", name) for file, record in records(path).items()}
    file = ""
    if what == "one node has it":
        scene.lose("1")
    elif what == "one file is damaged on one node":
        file, _ = damage(scene, "0", flip_a_bit)
    again = scene.train("001", "again", prepare=tell_what_is_read_and_sent)
    assert again.is_done, again.said
    read = [(int(rank), file) for rank, file in re.findall(r"rank (\d) reads .*/(\S+)", again.said)]
    heard_bytes = dict.fromkeys(range(3), 0)
    for rank, count in re.findall(r"rank (\d) hears of rank \d: (\d+) bytes", again.said):
        heard_bytes[int(rank)] += int(count)
    everything = sorted((rank, each) for rank in range(3) for each in size_bytes)
    match what:
        case "both nodes have it":
            assert sorted(read) == everything, "each rank in its own node's memory"
            assert set(heard_bytes.values()) == {0}
        case "one node has it":
            assert sorted(each for _, each in read) == sorted(size_bytes), "once, by one of two ranks"
            assert {rank for rank, _ in read} == {0, 1}
            assert min(heard_bytes.values()) > 0.9 * sum(size_bytes.values()), "all but the headers"
        case _:
            assert sorted(read) == sorted([*everything, (2, file)]), "the good copy again, to be sent"
            assert 0.9 * size_bytes[file] < min(heard_bytes.values()) <= max(heard_bytes.values()) < size_bytes[file]
    begin = scene.begin_record()
    assert (begin["from"], begin["from_storage_bytes"]) == (name, 0)
    assert tensors_equal(final_state(scene.config.out_dir), undisturbed(tiny, 3))


def read_as_on_gpus(rank: int) -> None:
    """Let a process take what others send within its node to be faster than memory, and say what is read and sent."""
    read_plan._reads_for_itself = lambda _world: False
    tell_what_is_read_and_sent(rank)


@pytest.mark.parametrize(
    "what",
    [
        "both nodes have it",
        pytest.param("one file is damaged on one node", marks=pytest.mark.slow),
        pytest.param("readings break off", marks=pytest.mark.slow),
    ],
)
def test_on_gpus_one_rank_of_each_node_reads_for_its_node(
    left: Callable[[str, str], Scene], tiny: TrainConfig, undisturbed: Undisturbed, what: str
) -> None:
    scene = left("001", "ahead")
    name = scene.newest("0")
    size_bytes = {file: record.size_bytes for path in scene.shares("0", name) for file, record in records(path).items()}
    again_by: list[tuple[int, str]] = []
    if what == "one file is damaged on one node":
        again_by = [(2, damage(scene, "0", flip_a_bit)[0])]
    again = scene.train("001", "again", prepare=READ_AS_ON_GPUS[what])
    assert again.is_done, again.said
    read = [(int(rank), file) for rank, file in re.findall(r"rank (\d) reads .*/(\S+)", again.said)]
    heard = [tuple(map(int, found)) for found in re.findall(r"rank (\d) hears of rank (\d): (\d+) bytes", again.said)]
    if what != "readings break off":
        expected = [*again_by, *((2, file) for file in size_bytes)]
        assert sorted(file for rank, file in read if rank == 2) == sorted(file for _, file in expected)
        assert sorted(file for rank, file in read if rank != 2) == sorted(size_bytes), "once, by one of two ranks"
        assert {rank for rank, _ in read} == {0, 1, 2}
        crossed = {of for rank, of, _ in heard if rank == 2} - {2} | {of for rank, of, _ in heard if rank != 2} & {2}
        assert crossed == ({2} if again_by else set()), "nothing but what one node lacks"
    begin = scene.begin_record()
    assert (begin["from"], begin["from_storage_bytes"]) == (name, 0)
    assert tensors_equal(final_state(scene.config.out_dir), undisturbed(tiny, 3))


def break_off_as_on_gpus(rank: int) -> None:
    read_as_on_gpus(rank)
    break_off_first_readings(rank)


READ_AS_ON_GPUS = {
    "both nodes have it": read_as_on_gpus,
    "one file is damaged on one node": read_as_on_gpus,
    "readings break off": break_off_as_on_gpus,
}


def records(share: Path) -> dict[str, FileRecord]:
    return Checkpoint("", parse_state((share / "state.json").read_bytes(), str(share))).files


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
def test_the_loss_goes_on_where_it_was_with_fewer_ranks(
    left: Callable[[str, str], Scene], tiny: TrainConfig, undisturbed: Undisturbed
) -> None:
    scene = left("001", "ahead")
    assert scene.train("10", "again").is_done
    assert scene.begin_record()["from_storage_bytes"] == 0
    assert final_state(scene.config.out_dir).val_loss == pytest.approx(undisturbed(tiny, 3).val_loss, abs=1e-4)


def new(tiny: TrainConfig, folder: Path, **change: Any) -> Scene:
    folder.mkdir()
    return Scene(replace(tiny, out_dir=str(folder / "run"), **change), folder)


def saved_at(scene: Scene) -> list[int]:
    return [record["iter"] for record in scene._records("checkpoint")]


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


def stop_after_nine(_rank: int) -> None:
    calls = iter(range(10**6))
    original = loop.train

    def train(config: TrainConfig, world: World, hooks: Callbacks) -> Outcome:
        return original(config, world, replace(hooks, stop_request=in_steps(lambda: next(calls) >= 9)))

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


def whole(scene: Scene) -> set[str]:
    return {checkpoint.name for checkpoint in scene.store.newest_first()}


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
