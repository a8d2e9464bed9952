"""cluster.yaml is one that `ray up` accepts, with a head that stays and workers that may go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

pytestmark = pytest.mark.filterwarnings("default")  # Ray's parts warn of themselves

FILE = Path(__file__).parents[2] / "cluster.yaml"


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
