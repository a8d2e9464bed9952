"""Runs of which only files are left: their folder, and the memories of their nodes."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from orchestrator.checkpoint.save.node_memory import run_path, share_path, states_in
from orchestrator.checkpoint.snapshot import Snapshot
from orchestrator.checkpoint.store import Checkpoint, CheckpointStore, newest_name_first, parse_state
from orchestrator.checkpoint.tensor_file import FileRecord, read_tensors
from orchestrator.config import TrainConfig
from tests.support import ranks
from tests.support.blackout import blackout, struck
from tests.support.ranks import Ended
from tests.support.runs import checkpoints_in, metrics_in

Record = dict[str, Any]


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
        return checkpoints_in(self.config.out_dir)

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
        return [record for record in metrics_in(self.config.out_dir) if record["kind"] == kind]

    def copy(self, config: TrainConfig, folder: Path) -> Scene:
        """Return the same with another out_dir; config says how it goes on."""
        shutil.copytree(self.folder, folder)
        copy = Scene(replace(config, out_dir=str(folder / "run")), folder)
        for path in folder.glob("?/*/*_*"):
            path.rename(path.with_name(copy.store.folder.run_id()))
        return copy


Left = Callable[[TrainConfig, str, str], Scene]


def lost_power(config: TrainConfig, layout: str, kind: str, folder: Path) -> Scene:
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


def iter_of(name: str) -> int:
    return int(name.split("_")[1])


def records(share: Path) -> dict[str, FileRecord]:
    return Checkpoint("", parse_state((share / "state.json").read_bytes(), str(share))).files


def new(tiny: TrainConfig, folder: Path, **change: Any) -> Scene:
    folder.mkdir()
    return Scene(replace(tiny, out_dir=str(folder / "run"), **change), folder)


def saved_at(scene: Scene) -> list[int]:
    return [record["iter"] for record in scene._records("checkpoint")]


def whole(scene: Scene) -> set[str]:
    return {checkpoint.name for checkpoint in scene.store.newest_first()}
