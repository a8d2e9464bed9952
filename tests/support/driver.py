"""A driver that is killed by one of its own workers, or its Train controller: `python -m tests.support.driver SPEC`."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from pathlib import Path

import numpy as np
import psutil

from orchestrator.config import TrainConfig
from orchestrator.driver.launch import launch
from tests.support.faults import Fault, worker_with


class ControllerKilled(Fault):
    """The driver's Train controller is killed."""

    def fire(self) -> None:
        mine = psutil.Process(self.pid).children(recursive=True)
        controllers = [each.pid for each in mine if each.cmdline()[:1] and "TrainController" in each.cmdline()[0]]
        Fault.fire(Fault(**{**vars(self), "pid": controllers[0]}))


class Outside(Fault):
    """Somebody outside does something to this host: it is named in the marker, and waits until that is done."""

    def fire(self) -> None:
        if not self.marker.exists():
            new = self.marker.with_suffix(".new")
            new.write_text(socket.gethostname())
            new.rename(self.marker)
            while not self.marker.with_suffix(".done").exists():
                time.sleep(0.02)


class Glutton(Fault):
    """This process takes more and more memory, until Ray's monitor ends it."""

    def fire(self) -> None:
        if not self.marker.exists():
            self.marker.touch()
            taken = []
            while len(taken) < 600:  # of 10 MB: more than the limit that the test has set
                taken.append(np.ones(10 * 2**17))
                time.sleep(0.01)
            time.sleep(5)


_KINDS = {"driver": Fault, "controller": ControllerKilled, "outside": Outside, "memory": Glutton}


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text())
    kind = _KINDS[spec.get("whom", "driver")]
    fault = kind(**{**spec["fault"], "marker": Path(spec["fault"]["marker"])}, pid=os.getpid())
    outcome = launch(TrainConfig(**spec["config"]), worker_with(fault))
    print(json.dumps({"iter_num": outcome.iter_num}))


if __name__ == "__main__":
    main()
