"""A folder with a tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.tokenizer_folders import folder_of


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return folder_of(tmp_path / "theirs")
