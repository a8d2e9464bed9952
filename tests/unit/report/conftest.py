"""A browser for all tests of pages."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.browser import Browser, BrowserMissingError


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    try:
        browser = Browser(tmp_path_factory.mktemp("browser") / "profile")
    except BrowserMissingError as missing:
        pytest.skip(str(missing))
    yield browser
    browser.close()


@pytest.fixture
def page_file(tmp_path: Path) -> Path:
    return tmp_path / "report.html"
