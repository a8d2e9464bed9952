"""Driver: what one start of `orchestrator train` holds until it ends."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from orchestrator.config import TrainConfig
from orchestrator.driver.journal import Journal
from orchestrator.driver.lease import Lease
from orchestrator.driver.preflight import Plan
from orchestrator.driver.ray_output import RayOutput
from orchestrator.worker.job import Job

Worker = Callable[[Job], dict[str, Any]]


@dataclass
class Driver:
    """One for all clusters and controllers that it goes through.

    worker: what Ray runs on each rank.
    stop: is set when the run is asked to stop.
    lease: None for an evaluation, which writes nothing to out_dir.
    is_first_try: no controller of Ray's was started for it yet.
    """

    plan: Plan
    worker: Worker
    stop: threading.Event
    lease: Lease | None
    journal: Journal
    ray_output: RayOutput
    is_first_try: bool = True

    @property
    def config(self) -> TrainConfig:
        return self.plan.config
