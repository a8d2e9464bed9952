"""World: a call on rank 0 alone has one value, and one error, on all ranks."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from orchestrator.distributed.world import World
from orchestrator.errors import ConfigError, StorageUnavailableError, UserError

SIZE = 3


@pytest.fixture
def on_ranks(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[World], Any]], list[Any]]:
    """Run a function on three ranks, which are threads here, and return what it returns or raises on each."""
    barrier = threading.Barrier(SIZE, timeout=60)
    slots: list[Any] = [None] * SIZE

    def gather_json(self: World, value: Any) -> list[Any]:
        slots[self.rank] = value
        barrier.wait()
        found = list(slots)
        barrier.wait()
        return found

    monkeypatch.setattr(World, "gather_json", gather_json)

    def answer(function: Callable[[World], Any], rank: int) -> Any:
        try:
            return function(World(rank, SIZE))
        except Exception as error:
            return error

    def run(function: Callable[[World], Any]) -> list[Any]:
        with ThreadPoolExecutor(SIZE) as ranks:
            return list(ranks.map(lambda rank: answer(function, rank), range(SIZE)))

    return run


def test_rank_0_calls_and_all_have_its_value(on_ranks: Callable[..., list[Any]]) -> None:
    called: list[int] = []

    def function(world: World) -> Any:
        return world.on_main(lambda: called.append(world.rank) or {"run_id": "x"})

    assert on_ranks(function) == [{"run_id": "x"}] * SIZE
    assert called == [0]


@pytest.mark.parametrize("kind", [ConfigError, StorageUnavailableError])
def test_its_error_is_raised_on_all(kind: type[UserError], on_ranks: Callable[..., list[Any]]) -> None:
    def fail() -> None:
        raise kind("out_dir=x cannot be read")

    found = on_ranks(lambda world: world.on_main(fail))
    assert [type(error) for error in found] == [kind] * SIZE
    assert {str(error) for error in found} == {"out_dir=x cannot be read"}


def test_any_ranks_error_is_raised_on_all_and_names_the_rank(on_ranks: Callable[..., list[Any]]) -> None:
    def fail_on_two(world: World) -> int:
        if world.rank == 2:
            raise ConfigError("no GPU")
        return world.rank

    found = on_ranks(lambda world: world.collectively(lambda: fail_on_two(world)))
    assert {(type(error), str(error)) for error in found} == {(ConfigError, "rank 2: no GPU")}


def test_without_an_error_each_rank_has_its_own_value(on_ranks: Callable[..., list[Any]]) -> None:
    assert on_ranks(lambda world: world.collectively(lambda: world.rank)) == [0, 1, 2]
