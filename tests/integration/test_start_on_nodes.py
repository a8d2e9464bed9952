"""Three ranks on two nodes start from weights on local disks: who reads, who sends to whom, always the same bits."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from orchestrator.checkpoint.formats.huggingface import write_huggingface
from orchestrator.checkpoint.formats.nanogpt import write_nanogpt
from orchestrator.checkpoint.restore import import_state
from orchestrator.checkpoint.restore.init_from import source_identity
from orchestrator.checkpoint.snapshot import Snapshot, tensors_equal
from orchestrator.config import TrainConfig
from orchestrator.distributed.world import World
from orchestrator.storage.run_folder import RunFolder
from tests.conftest import final_state
from tests.support import ranks
from tests.support.weights import random_weights

WEIGHTS = "weights"  # a relative path: every node has a folder of its own to find it in


def enter_node(folder: str, layout: str, rank: int) -> None:
    """Stand in the folder of this rank's node, and note down whether it reads, and from whom every rank has it."""
    os.chdir(Path(folder, layout[rank]))
    read, spread = import_state.read_initial_state, World.broadcast_from_each

    def noted_read(config: TrainConfig, folder_of_run: RunFolder) -> Any:
        Path(folder, f"read-{rank}").touch()
        return read(config, folder_of_run)

    def noted_spread(world: World, tensors: list[torch.Tensor], sources: list[int]) -> None:
        Path(folder, f"sources-{rank}").write_text(json.dumps(sources))
        spread(world, tensors, sources)

    import_state.read_initial_state, World.broadcast_from_each = noted_read, noted_spread  # type: ignore[method-assign]


@dataclass(frozen=True)
class Nodes:
    """Nodes in folders of this machine, each with a memory and a disk of its own."""

    config: TrainConfig
    folder: Path

    def disk(self, node: str) -> Path:
        path = self.folder / node
        path.mkdir(exist_ok=True)
        return path

    def start(self, layout: str) -> ranks.Ended:
        """Train with a rank per letter, which names its node."""
        for node in layout:
            (self.disk(node) / "memory").mkdir(exist_ok=True)
        memories = [str(self.disk(node) / "memory") for node in layout]
        prepare = partial(enter_node, str(self.folder), layout)
        return ranks.train(self.config, len(layout), self.folder / "log", memory_dirs=memories, prepare=prepare)

    def train(self, layout: str) -> str:
        """Train to the end; return what was said."""
        ended = self.start(layout)
        assert ended.is_done, ended.said
        return ended.said

    @property
    def readers(self) -> list[int]:
        return sorted(int(path.name.removeprefix("read-")) for path in self.folder.glob("read-*"))

    @property
    def sources(self) -> list[int]:
        """From whom every rank had its tensors, by rank; all ranks were of one mind."""
        (sources,) = {path.read_text() for path in self.folder.glob("sources-*")}
        return list(json.loads(sources))


@pytest.fixture
def nodes(tiny: TrainConfig, memory_dir: str, tmp_path: Path) -> Iterator[Nodes]:
    folder = Path(memory_dir, tmp_path.name)
    folder.mkdir()
    yield Nodes(replace(tiny, init_from=WEIGHTS, gradient_accumulation_steps=3, max_iters=3), folder)
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def known() -> dict[str, Snapshot]:
    """What `calm` has computed."""
    return {}


@pytest.fixture
def calm(nodes: Nodes, tmp_path: Path, known: dict[str, Snapshot]) -> Snapshot:
    """The end of the same run where one rank reads for all: on one node."""
    if not known:
        alone = Nodes(replace(nodes.config, out_dir=str(tmp_path / "calm")), tmp_path)
        write_huggingface(random_weights(), alone.disk("0") / WEIGHTS)
        alone.train("000")
        assert (alone.readers, alone.sources) == ([0], [0, 0, 0])
        known["end"] = final_state(alone.config.out_dir)
    return known["end"]


@pytest.mark.parametrize(
    ("layout", "readers", "sources"),
    [
        ("001", [0, 2], [0, 0, 2]),
        ("011", [0, 1], [0, 1, 1]),
        ("012", [0, 1, 2], [0, 1, 2]),
    ],
)
def test_one_rank_of_every_node_reads(
    nodes: Nodes, calm: Snapshot, layout: str, readers: list[int], sources: list[int]
) -> None:
    for node in layout:
        write_huggingface(random_weights(), nodes.disk(node) / WEIGHTS)
    nodes.train(layout)
    assert (nodes.readers, nodes.sources) == (readers, sources)
    assert tensors_equal(final_state(nodes.config.out_dir), calm)


@pytest.mark.parametrize(
    "kind",
    [
        "absent",
        "of other bits",
        "of another shape",
        "damaged",
    ],
)
def test_a_node_without_the_same_weights_receives_rank_0s(nodes: Nodes, calm: Snapshot, kind: str) -> None:
    write_huggingface(random_weights(), nodes.disk("0") / WEIGHTS)
    if kind != "absent":
        other = random_weights(seed=2 if kind == "of other bits" else 1)
        if kind == "of another shape":
            other.model["transformer.ln_f.bias"] = torch.zeros(32)
        write_huggingface(other, nodes.disk("1") / WEIGHTS)
    if kind == "damaged":
        (nodes.disk("1") / WEIGHTS / "model.safetensors").write_bytes(b"nothing")
    said = nodes.train("011")
    assert (nodes.readers, nodes.sources) == ([0] if kind == "absent" else [0, 1], [0, 0, 0])
    assert tensors_equal(final_state(nodes.config.out_dir), calm)
    is_refused = kind in ("damaged", "of another shape")  # than its own config.json says
    told = "rank 1: this node's copy is not used" if is_refused else "is another one on the nodes of ranks 1"
    assert (told in said) == (kind != "absent")


def test_nanogpts_optimizer_is_read_on_every_node(nodes: Nodes, tmp_path: Path) -> None:
    model = random_weights(activation="gelu")
    moments = {f"{slot}.{name}": x.abs() for slot in ("exp_avg", "exp_avg_sq") for name, x in model.model.items()}
    state = replace(model, optimizer={**moments, "step": torch.tensor(2.0)}, iter_num=2)
    ends = []
    for layout in ("000", "001"):
        part = Nodes(replace(nodes.config, out_dir=str(tmp_path / layout), init_from="ckpt.pt"), nodes.folder / layout)
        part.folder.mkdir()
        for node in layout:
            write_nanogpt(state, part.disk(node) / "ckpt.pt")
        part.train(layout)
        assert part.readers == sorted({layout.index(node) for node in layout})
        ends.append(final_state(part.config.out_dir))
    assert tensors_equal(*ends)
    assert ends[0].optimizer["step"] == 3  # one on top of the two that it came with


def test_evaluation_reads_on_every_node_too(nodes: Nodes) -> None:
    for node in "01":
        write_huggingface(random_weights(), nodes.disk(node) / WEIGHTS)
    replace(nodes, config=replace(nodes.config, eval_only=True)).train("011")
    assert (nodes.readers, nodes.sources) == ([0, 1], [0, 1, 1])


def test_any_one_node_will_do(nodes: Nodes, calm: Snapshot) -> None:
    write_huggingface(random_weights(), nodes.disk("1") / WEIGHTS)
    nodes.train("011")
    assert (nodes.readers, nodes.sources) == ([1], [1, 1, 1])
    assert tensors_equal(final_state(nodes.config.out_dir), calm)


def test_no_node_has_the_weights(nodes: Nodes) -> None:
    ended = nodes.start("011")
    assert not ended.is_done
    assert ended.said.count("CheckpointError: init_from=weights: no worker's node has it; copy it to one") == 3


def test_what_all_see_is_told_from_what_a_node_has(
    tiny: TrainConfig, memory_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path(memory_dir, "ckpt.pt").touch()
    config = replace(tiny, init_from=memory_dir)
    on_disk = source_identity(config)
    assert on_disk
    assert source_identity(replace(config, init_from=f"file://{memory_dir}")) == on_disk
    there, resumed = replace(config, init_from=f"{memory_dir}/ckpt.pt"), replace(config, init_from="resume")
    assert source_identity(there) == source_identity(replace(resumed, out_dir=f"{memory_dir}/")) != on_disk
    assert source_identity(replace(config, init_from=f"{memory_dir}/absent")) is None
    for shared in ("gpt2-xl", "s3://bucket/gpt2"):
        assert source_identity(replace(config, init_from=shared)) == shared
    mounts = psutil.disk_partitions(all=True)
    served = next(mount for mount in mounts if mount.mountpoint == "/")._replace(mountpoint=memory_dir, fstype="nfs4")
    monkeypatch.setattr(psutil, "disk_partitions", lambda **_: [*mounts, served])
    assert source_identity(config) == memory_dir
