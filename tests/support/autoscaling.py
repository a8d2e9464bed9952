"""A cluster with an autoscaler on this machine: Ray's fake provider starts raylets where a cloud would start machines.

Ray's own `AutoscalingCluster` lacks a file in the wheel and ends every Ray on the machine.
The provider itself is there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import ray
import ray.util
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID, FAKE_HEAD_NODE_TYPE

from tests.support.ports import free_ports, wait_for_port

_OBJECT_STORE_BYTES = 80 * 2**20
_LISTS = (  # which an external provider's configuration must have
    *("cluster_synced_files", "initialization_commands"),
    *("setup_commands", "head_setup_commands", "worker_setup_commands"),
    *("head_start_ray_commands", "worker_start_ray_commands"),
)


@contextmanager
def autoscaling_cluster(worker_types: dict[str, Any]) -> Iterator[str]:
    """Start a head without CPUs and an autoscaler (v2) that knows these worker types; lend the cluster's address.

    worker_types: as `available_node_types` of a cluster.yaml.
    """
    (port,) = free_ports(1)
    address = f"{ray.util.get_node_ip_address()}:{port}"
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:  # a socket's path is short
        config, log = Path(folder) / "config.json", Path(folder) / "head.log"
        config.write_text(json.dumps(_config(worker_types, address)))
        command = [
            *(str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--num-cpus=0"),
            *(f"--port={port}", "--min-worker-port=0", "--max-worker-port=0"),
            *(
                f"--object-store-memory={_OBJECT_STORE_BYTES}",
                "--include-dashboard=false",
                "--dashboard-agent-listen-port=0",
            ),
            *(f"--autoscaling-config={config}", f"--temp-dir={folder}"),
        ]
        environment = {
            **os.environ,
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            "RAY_FAKE_CLUSTER": "1",
            "RAY_enable_autoscaler_v2": "1",
            "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
            "RAY_API_SERVER_ADDRESS": "http://127.0.0.1:9",  # no dashboard runs: Ray need not wait for one
        }
        with log.open("w") as file:
            head = subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True)
        try:
            wait_for_port(port, head, log)
            yield address
        finally:
            end(head)


def end(head: subprocess.Popen[Any]) -> None:
    """Kill the head and all that it has started, the workers' raylets too."""
    session = os.getsid(head.pid)
    started = [each for each in psutil.process_iter() if _session_of(each) == session]
    head.kill()
    head.wait()
    for process in started:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(started, timeout=5)


def _session_of(process: psutil.Process) -> int | None:
    with suppress(ProcessLookupError):
        return os.getsid(process.pid)
    return None


def _config(worker_types: dict[str, Any], address: str) -> dict[str, Any]:
    head = {FAKE_HEAD_NODE_TYPE: {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}}
    return {
        "cluster_name": "fake",
        "max_workers": sum(each["max_workers"] for each in worker_types.values()),
        "provider": {
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "launch_multiple": True,
            "head_node_id": FAKE_HEAD_NODE_ID,
            "gcs_address": address,
        },
        "available_node_types": {**head, **worker_types},
        "head_node_type": FAKE_HEAD_NODE_TYPE,
        "idle_timeout_minutes": 10,
        "upscaling_speed": 1.0,
        **{key: {} for key in ("auth", "file_mounts")},
        **{key: [] for key in _LISTS},
    }
