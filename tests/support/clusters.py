"""A Ray cluster of one small node in this process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import ray


@contextmanager
def small_cluster(**options: Any) -> Iterator[None]:
    """Start one with two CPUs, and end it; options: more of ray.init's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:9")  # no dashboard runs: Ray need not wait for one
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            object_store_memory=80 * 2**20,
            logging_level="ERROR",
            **options,
        )
        yield
        ray.shutdown()
