"""Ports of this machine that are free, or will be listened to."""

from __future__ import annotations

import socket
import subprocess
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def wait_for_port(port: int, server: subprocess.Popen[Any], log: Path) -> None:
    deadline_s = time.monotonic() + 60
    while True:
        assert server.poll() is None, log.read_text()
        assert time.monotonic() < deadline_s, log.read_text()
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.2)
