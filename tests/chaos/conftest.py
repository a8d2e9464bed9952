"""One small cluster for the tests of a module; a module that needs another kind has a fixture of the same name."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.clusters import small_cluster


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with small_cluster():
        yield
