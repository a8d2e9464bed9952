"""A driver that is killed by one of its own workers: run as a process, `python -m tests.chaos.driver SPEC.json`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from orchestrator.config import TrainConfig
from orchestrator.launch import launch
from tests.chaos.faults import Fault, worker_with


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text())
    fault = Fault(**{**spec["fault"], "marker": Path(spec["fault"]["marker"])}, pid=os.getpid())
    outcome = launch(TrainConfig(**spec["config"]), worker_with(fault))
    print(json.dumps({"iter_num": outcome.iter_num}))


if __name__ == "__main__":
    main()
