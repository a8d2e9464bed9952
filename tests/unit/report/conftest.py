"""What tests of pages share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def page_file(tmp_path: Path) -> Path:
    return tmp_path / "report.html"
