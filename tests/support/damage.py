"""Damage to the files of a state in node memory, and the words in which a restore tells of it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from tests.support.scenes import Scene


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
