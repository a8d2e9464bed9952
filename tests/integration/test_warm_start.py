"""The first workers of a run take processes that were started for them before Ray Train asked for any."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from orchestrator.config import TrainConfig
from orchestrator.driver.launch import launch
from orchestrator.worker.job import Job
from orchestrator.worker.run import run_worker
from tests.support.clusters import small_cluster
from tests.support.runs import events_in

pytestmark = pytest.mark.filterwarnings("default")  # Ray and its parts warn of themselves


@pytest.fixture(params=["bare", "of a job"])
def cluster(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[None]:
    """Join a cluster as a driver does, or as one does that `ray job submit` has started, with files and variables."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "file").write_text("x")
    job = {"working_dir": str(tmp_path / "code"), "env_vars": {"Z": 'a "word" é', "A": "1"}}
    with small_cluster(runtime_env=job if request.param == "of a job" else None):
        yield


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_first_workers_are_started_ahead(tiny: TrainConfig, tmp_path: Path) -> None:
    born = tmp_path / "born"
    born.mkdir()

    def worker(job: Job) -> dict[str, Any]:
        rank = ray.train.get_context().get_world_rank()
        (born / str(rank)).write_text(str(psutil.Process().create_time()))
        return run_worker(job)

    launch(replace(tiny, num_workers=2, max_iters=2), worker)
    [asked_s] = [event["time"] for event in events_in(tiny.out_dir) if event["kind"] == "attempt_starting"]
    born_s = [float(path.read_text()) for path in born.iterdir()]
    assert len(born_s) == 2
    # A node starts as many at once as it has CPUs, two here, and Ray's other actors take their turns: where the machine
    # is busy the second worker's process comes late. The first comes early only if its environment was foretold.
    assert min(born_s) < asked_s
