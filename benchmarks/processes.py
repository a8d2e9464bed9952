"""The processes of a run on this machine."""

from __future__ import annotations

from contextlib import suppress

import psutil


def workers_of(driver_pid: int) -> list[psutil.Process]:
    """Return the processes of a driver's own cluster that train."""
    found = []
    for process in psutil.Process(driver_pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if (process.cmdline() or [""])[0].startswith("ray::RayTrainWorker"):
                found.append(process)
    return found
