"""Resubmit: start the driver again when it, its controller or its cluster was lost. On Kubernetes nobody needs it.

We do not start a driver again that has finished, was stopped, has given the run up or found a user's mistake.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import threading
import time
from collections.abc import Sequence

from orchestrator.cluster.variables import RESUBMITTED
from orchestrator.host.signals import on_stop_signals

logger = logging.getLogger(__name__)

LOST = 3  # the exit code of a driver whose cluster is gone
_FIRST_WAIT_S, _LONGEST_WAIT_S = 1.0, 60.0
_LONG_S = 300.0  # after so long a run the next wait is short again
_IN_A_ROW = 20  # starts that came to nothing, about a quarter of an hour


def resubmit(command: Sequence[str], wait_s: float = _FIRST_WAIT_S, in_a_row: int = _IN_A_ROW) -> int:
    """Run a driver until it ends for good; return its exit code. Stop signals are passed on to it."""
    stopping = threading.Event()
    driver: subprocess.Popen[bytes] | None = None

    def pass_on(number: int) -> None:
        stopping.set()
        if driver and (
            number != signal.SIGINT or not _is_in_terminal()
        ):  # the terminal sends Ctrl-C to the driver, too
            driver.send_signal(number)

    times, pause_s = 0, wait_s
    with on_stop_signals(pass_on):
        while True:
            began_s = time.monotonic()
            driver = subprocess.Popen(command, env={**os.environ, RESUBMITTED: "1"} if times else None)
            code = driver.wait()
            if stopping.is_set() or not is_lost(code):
                return code if code >= 0 else 128 - code
            if time.monotonic() - began_s > _LONG_S:
                times, pause_s = 0, wait_s
            times += 1
            if times > in_a_row:
                logger.error("the driver was lost %d times in a row: given up", times)
                return LOST
            logger.warning("the driver was lost (exit code %d): starting it again in %.0f s", code, pause_s)
            if stopping.wait(pause_s):
                return 130
            pause_s = min(_LONGEST_WAIT_S, 2 * pause_s)


def is_lost(code: int) -> bool:
    """Return whether a driver with this exit code is worth another start: it was killed, or its cluster is gone."""
    return code == LOST or code < 0


def _is_in_terminal() -> bool:
    """Return whether Ctrl-C reaches all processes of the group by itself."""
    try:
        return os.tcgetpgrp(0) == os.getpgrp()
    except OSError:
        return False
