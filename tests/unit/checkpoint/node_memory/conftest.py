"""Folders for node memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.tmpfs import small_tmpfs


@pytest.fixture
def folder(memory_dir: str, tmp_path: Path) -> Path:
    """A memory_dir of this test's own."""
    folder = Path(memory_dir, tmp_path.name)
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def small(tmp_path: Path) -> Iterator[str]:
    with small_tmpfs(tmp_path / "small", "2m") as folder:
        yield folder
