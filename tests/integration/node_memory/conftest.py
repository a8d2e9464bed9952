"""Ranks on nodes of their own, as processes: runs that lost power, and a folder for new ones."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.config import TrainConfig
from tests.support.scenes import Left, Scene, lost_power


@pytest.fixture
def folder(memory_dir: str, tmp_path: Path) -> Iterator[Path]:
    """A folder in memory for nodes, logs and out_dir."""
    folder = Path(memory_dir, tmp_path.name)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="package")
def scenes(memory_dir: str) -> Iterator[Left]:
    """Runs that lost power, by layout. Where memory is `ahead` of storage, nodes have newer states; else the `same`."""
    known: dict[tuple[str, str], Scene] = {}

    def left_behind(config: TrainConfig, layout: str, kind: str) -> Scene:
        if (layout, kind) not in known:
            known[layout, kind] = lost_power(config, layout, kind, Path(memory_dir, f"{kind}-{layout}"))
        return known[layout, kind]

    yield left_behind
    for scene in known.values():
        shutil.rmtree(scene.folder, ignore_errors=True)


@pytest.fixture
def left(scenes: Left, tiny: TrainConfig, folder: Path) -> Callable[[str, str], Scene]:
    """A copy for one test: `left(layout, kind)`."""

    def copy(layout: str, kind: str) -> Scene:
        scene = scenes(tiny, layout, kind)
        return scene.copy(replace(scene.config, snapshot_interval=0), folder)

    return copy
