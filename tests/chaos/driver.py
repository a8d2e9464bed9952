"""A driver that is killed by one of its own workers, or its Train controller: `python -m tests.chaos.driver SPEC`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import psutil

from orchestrator.config import TrainConfig
from orchestrator.launch import launch
from tests.chaos.faults import Fault, worker_with


class ControllerKilled(Fault):
    """The driver's Train controller is killed."""

    def fire(self) -> None:
        mine = psutil.Process(self.pid).children(recursive=True)
        controllers = [each.pid for each in mine if each.cmdline()[:1] and "TrainController" in each.cmdline()[0]]
        Fault.fire(Fault(**{**vars(self), "pid": controllers[0]}))


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text())
    kind = ControllerKilled if spec.get("whom") == "controller" else Fault
    fault = kind(**{**spec["fault"], "marker": Path(spec["fault"]["marker"])}, pid=os.getpid())
    outcome = launch(TrainConfig(**spec["config"]), worker_with(fault))
    print(json.dumps({"iter_num": outcome.iter_num}))


if __name__ == "__main__":
    main()
