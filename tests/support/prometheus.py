"""A real Prometheus that scrapes a Ray cluster: Debian's package."""

from __future__ import annotations

import json
import shutil
import subprocess
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from tests.support.ports import free_ports, wait_for_port
from tests.support.servers import ServerMissingError

_CONFIG = """
global: {{scrape_interval: 1s}}
scrape_configs:
- job_name: ray
  file_sd_configs: [{{files: ['{targets}'], refresh_interval: 1s}}]
"""


class Prometheus:
    """A server's process; targets: Ray's file of what there is to scrape.

    Raises:
        ServerMissingError: it is not installed.
    """

    def __init__(self, folder: Path, targets: Path) -> None:
        program = shutil.which("prometheus")
        if not program:
            raise ServerMissingError("Prometheus is not installed: apt-get install --no-install-recommends prometheus")
        config, log, (port,) = folder / "prometheus.yml", folder / "prometheus.log", free_ports(1)
        config.write_text(_CONFIG.format(targets=targets))
        command = [program, f"--config.file={config}", f"--storage.tsdb.path={folder}/tsdb"]
        with log.open("w") as file:
            self._process = subprocess.Popen(
                [*command, f"--web.listen-address=127.0.0.1:{port}"], stdout=file, stderr=subprocess.STDOUT
            )
        self._url = f"http://127.0.0.1:{port}/api/v1/query"
        wait_for_port(port, self._process, log)

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Return the series that an expression has now; a wrong expression is an error."""
        with urllib.request.urlopen(
            f"{self._url}?{urllib.parse.urlencode({'query': expression})}", timeout=30
        ) as answer:
            return list(json.load(answer)["data"]["result"])

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()
