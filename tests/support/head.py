"""A Ray head of the tests' own, with a dashboard, a job server and metrics, as on a cluster."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.support.ports import free_ports, wait_for_port

BIN = Path(sys.executable).parent
# `python` in a job is the first on the head's PATH.
ENVIRONMENT = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
ENVIRONMENT.pop("RAY_ADDRESS", None)


@dataclass(frozen=True)
class Head:
    """Its process, the cluster's address, the dashboard's URL, and the file that tells Prometheus what to scrape."""

    process: subprocess.Popen[Any]
    address: str
    dashboard: str
    scrape_targets: Path

    def workers(self) -> list[psutil.Process]:
        """Return the processes of Ray Train's workers."""
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if process.cmdline()[:1] and process.cmdline()[0].startswith("ray::RayTrainWorker"):
                    found.append(process)
        return found


@contextmanager
def started_head(environment: dict[str, str]) -> Iterator[Head]:
    """Lend a head; environment: more variables for it. Everything that it has started ends with it."""
    gcs, dashboard, agent, client, metrics = free_ports(5)
    command = [
        *(str(BIN / "ray"), "start", "--head", "--block", "--num-cpus=2", "--object-store-memory=100000000"),
        *(f"--port={gcs}", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}"),
        *(f"--ray-client-server-port={client}", f"--metrics-export-port={metrics}"),
        *("--min-worker-port=0", "--max-worker-port=0"),
    ]
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:  # a socket's path is short
        log = Path(folder) / "head.log"
        with log.open("w") as file:
            head = subprocess.Popen(
                [*command, f"--temp-dir={folder}"],
                env=ENVIRONMENT | environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            wait_for_port(dashboard, head, log)
            targets = Path(folder) / "prom_metrics_service_discovery.json"
            yield Head(head, f"127.0.0.1:{gcs}", f"http://127.0.0.1:{dashboard}", targets)
        finally:
            end(head)


def end(head: subprocess.Popen[Any]) -> None:
    """Kill the head and all that it started: a polite SIGTERM would drain the node for half a minute."""
    started = psutil.Process(head.pid).children(recursive=True)
    head.kill()
    head.wait()
    for process in started:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    _, alive = psutil.wait_procs(started, timeout=5)
    assert alive == []
