"""cluster.yaml is one that `ray up` accepts, with a head that stays and workers that may go."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

pytestmark = pytest.mark.filterwarnings("default")  # Ray's parts warn of themselves

FILE = Path(__file__).parents[3] / "cluster.yaml"


@pytest.fixture
def cluster() -> dict[str, Any]:
    return dict(yaml.safe_load(FILE.read_text(encoding="utf-8")))


def test_ray_accepts_it(cluster: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    monkeypatch.chdir(FILE.parent)
    prepared = prepare_config(cluster)
    validate_config(prepared)


def test_head_stays_and_workers_are_spot(cluster: dict[str, Any]) -> None:
    nodes = cluster["available_node_types"]
    assert "InstanceMarketOptions" not in nodes[cluster["head_node_type"]]["node_config"]
    assert nodes["gpu"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}


def test_files_for_the_nodes_exist(cluster: dict[str, Any]) -> None:
    ours = [local for local in cluster["file_mounts"].values() if not local.startswith("~")]
    assert [local for local in ours if not (FILE.parent / local).exists()] == []


def test_every_node_wants_the_token(cluster: dict[str, Any]) -> None:
    for commands in (cluster["head_start_ray_commands"], cluster["worker_start_ray_commands"]):
        assert [line for line in commands if "ray start" in line and "RAY_AUTH_MODE=token" in line]


def test_ray_of_the_image_is_the_one_that_is_installed(cluster: dict[str, Any]) -> None:
    from ray import __version__

    assert f":{__version__}-" in cluster["docker"]["image"]


def test_gcps_part_of_the_docs_is_accepted(cluster: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    docs = (FILE.parent / "docs/clusters.md").read_text(encoding="utf-8")
    (part,) = re.findall(r"```yaml\n(.*?)```", docs, flags=re.DOTALL)
    monkeypatch.chdir(FILE.parent)
    prepared = prepare_config({**cluster, **yaml.safe_load(part)})
    validate_config(prepared)
    nodes = prepared["available_node_types"]
    assert "scheduling" not in nodes["head"]["node_config"]
    assert nodes["gpu"]["node_config"]["scheduling"][0]["provisioningModel"] == "SPOT"


def test_ray_knows_the_settings_that_recovery_relies_on(cluster: dict[str, Any]) -> None:
    import ray

    head = " ".join(cluster["head_start_ray_commands"])
    set_here = {name: int(value) for name, value in re.findall(r"RAY_([a-z]\w+)=(\d+)", head)}
    assert {name: set_here[name] < getattr(ray._config, name)() for name in set_here} == dict.fromkeys(
        (
            "health_check_initial_delay_ms",
            "health_check_period_ms",
            "health_check_timeout_ms",
            "health_check_failure_threshold",
        ),
        True,
    )
    assert int(re.findall(r"RAY_JOB_STOP_WAIT_TIME_S=(\d+)", head)[0]) >= 60, "3 s otherwise"


def test_there_is_room_in_memory(cluster: dict[str, Any]) -> None:
    (shm,) = re.findall(
        r"--shm-size=(\d+)g", " ".join(cluster["available_node_types"]["gpu"]["docker"]["worker_run_options"])
    )
    (store,) = re.findall(r"--object-store-memory=(\d+)", " ".join(cluster["worker_start_ray_commands"]))
    assert int(shm) * 10**9 - int(store) > 2 * 18.7e9, "two states of a GPT-2 XL beside Ray's objects"


def test_workers_come_and_go(cluster: dict[str, Any]) -> None:
    gpu = cluster["available_node_types"]["gpu"]
    assert gpu["min_workers"] < gpu["max_workers"] <= cluster["max_workers"]
    assert gpu["labels"] == {"market-type": "spot"}
