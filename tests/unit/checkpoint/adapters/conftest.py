"""The folder of the base model that tests of adapters' formats share; each file has its own `base`."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.checkpoint.formats.huggingface import write_huggingface
from orchestrator.checkpoint.snapshot import Snapshot
from orchestrator.data.tokenizers import CharTokenizer
from tests.support.bases import CHARS


@pytest.fixture
def base_dir(base: Snapshot, tmp_path: Path) -> Path:
    write_huggingface(base, tmp_path / "base", CharTokenizer(CHARS))
    return tmp_path / "base"
