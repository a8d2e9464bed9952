"""In how many lanes a run sums its gradients: the user's number, the saved one, a default."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from orchestrator.checkpoint.state import Resumed, TrainState
from orchestrator.checkpoint.store import Checkpoint
from orchestrator.config import TrainConfig, check
from orchestrator.distributed.lanes import Lanes
from orchestrator.distributed.world import World
from orchestrator.errors import ConfigError
from orchestrator.training.choose_lanes import choose_lanes, describe

FORTY = TrainConfig(gradient_accumulation_steps=40)


@dataclass(frozen=True)
class Cluster(World):
    """Ranks on these hosts, by rank; all answer alike but for their host's name."""

    hosts: tuple[str, ...] = ()

    def gather_json(self, value: Any) -> list[Any]:
        return list(self.hosts) if isinstance(value, str) else [value] * self.size


def on(*hosts: str) -> Cluster:
    return Cluster(size=len(hosts), hosts=hosts)


def state_of(saved: dict[str, Any] | None) -> TrainState:
    """Return a state of a small model; saved: the settings of the run that it was resumed from, on four workers."""
    state: Any = SimpleNamespace(model=nn.Linear(100, 100), resumed_from=None)
    if saved is not None:
        kept = Checkpoint("checkpoint", {"config": saved, "environment": {"world_size": 4}})
        state.resumed_from = Resumed(kept, True, 0, 0, 0.0)
    return state  # type: ignore[no-any-return]


def lanes(config: TrainConfig, world: World, saved: dict[str, Any] | None = None) -> int:
    return choose_lanes(config, world, state_of(saved))


@pytest.mark.parametrize("size", [1, 2, 3, 40])
def test_a_fixed_number_of_workers_has_a_lane_each(size: int) -> None:
    assert lanes(replace(FORTY, num_workers=size), on(*["a"] * size)) == size


def test_a_range_has_four_for_each_of_the_most(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert lanes(replace(FORTY, num_workers="2-8"), on("a", "b", "c")) == 32
    assert "32 lanes: the same bits on 1 to 32 workers" in caplog.text
    assert "busiest has 1.00 1.00 1.00 1.12 1.00 1.17 1.00 of an even share" in caplog.text
    assert lanes(replace(FORTY, num_workers="2-8", gradient_accumulation_steps=31), on("a", "b")) == 8


def test_a_range_has_fewer_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.training.choose_lanes.spare_memory_bytes", lambda: 1000)
    assert lanes(replace(FORTY, num_workers="2-8"), on("a", "b", "c")) == 8


def test_several_nodes_with_several_workers_keep_ddps_order(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    config, world = replace(FORTY, num_workers=4), on("a", "a", "b", "b")
    assert lanes(config, world) == 0
    assert "--lanes=4 makes them the same on any number" in caplog.text
    assert lanes(replace(config, lanes=8), world) == 8
    assert lanes(config, on("a", "b", "c", "d")) == 4
    assert lanes(config, on("a", "a", "a", "a")) == 4


def test_nondeterministic_runs_keep_ddps_order() -> None:
    assert lanes(replace(FORTY, deterministic=False), on("a", "a")) == 0


@pytest.mark.parametrize(
    ("saved", "size", "found"),
    [
        ({"lanes": 8}, 3, 8),
        ({"lanes": 2}, 3, 3),  # more workers than lanes: more lanes
        ({"lanes": 0}, 3, 0),  # begun in DDP's order
        ({}, 2, 4),  # of an older version: on four workers, here
        ({"deterministic": False}, 2, 0),
    ],
)
def test_a_run_goes_on_with_its_own(saved: dict[str, Any], size: int, found: int) -> None:
    config = replace(FORTY, num_workers="2-8")
    assert lanes(config, on(*["a"] * size), saved) == found
    assert lanes(replace(config, lanes=16), on(*["a"] * size), saved) == 16


def test_a_smaller_global_batch_has_fewer_lanes() -> None:
    assert lanes(replace(FORTY, gradient_accumulation_steps=4), on("a"), {"lanes": 8}) == 4


def test_too_many_workers_are_refused() -> None:
    with pytest.raises(ConfigError, match="lanes=2 are too few for 3 workers"):
        lanes(replace(FORTY, lanes=2), on("a", "a", "a"))
    with pytest.raises(ConfigError, match="3 workers are more than gradient_accumulation_steps=2"):
        lanes(replace(FORTY, gradient_accumulation_steps=2), on("a", "a", "a"))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"lanes": 4, "num_workers": "2-8"}, "lanes=4 is less than num_workers=2-8"),
        ({"lanes": 41}, "lanes=41 is more than gradient_accumulation_steps=40"),
        ({"lanes": 4, "deterministic": False}, "deterministic=False"),
    ],
)
def test_numbers_that_do_not_fit_are_refused_before_anything_starts(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        check(replace(FORTY, **changes))


def test_the_buffers_are_counted() -> None:
    told = describe(Lanes(8, 40), 2, 4, 10**7)
    assert "lane buffers take 20 20 10 MB a worker" in told
