"""Runs in this process whose folder lies on a server, and faults of that server."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from orchestrator.checkpoint.snapshot import Snapshot, tensors_equal
from orchestrator.checkpoint.store import CheckpointStore
from orchestrator.config import TrainConfig
from orchestrator.distributed.device import resolve
from orchestrator.distributed.world import World
from orchestrator.loop import train
from orchestrator.storage.options import storage_options_of
from orchestrator.storage.run_folder import open_run_folder
from orchestrator.telemetry import records
from orchestrator.telemetry.emit import open_telemetry
from orchestrator.telemetry.format import print_record
from orchestrator.training.attempt import Callbacks
from tests.conftest import in_steps
from tests.support.proxy import Fault, FaultyProxy
from tests.support.runs import checkpoints_in

Record = dict[str, Any]
Calm = Callable[[TrainConfig], Snapshot]
_PATIENCE_S = 60.0


def puts(name: str) -> Callable[[str, str], bool]:
    """Return what matches the writing of files with this in their path."""
    return lambda method, path: method == "PUT" and name in path


def gets(name: str) -> Callable[[str, str], bool]:
    """Return what matches the reading of files with this in their path."""
    return lambda method, path: method == "GET" and name in path


def wait_for(is_true: Callable[[], Any], pause_s: float = 0.002) -> None:
    deadline_s = time.monotonic() + _PATIENCE_S
    while not is_true():
        assert time.monotonic() < deadline_s
        time.sleep(pause_s)


@dataclass
class Run:
    """A run in this process, with telemetry as `python -m orchestrator.loop` has it.

    each: called in every iteration, before its step.
    mark: what it returns is noted with every record, such as how often a fault has fired by then.
    """

    config: TrainConfig
    attempt: str = "a"
    each: Callable[[], None] = lambda: None
    mark: Callable[[], int] = lambda: 0
    stop_after: int | None = None
    records: list[Record] = field(default_factory=list)

    def train(self) -> Run:
        world = World(attempt=self.attempt)
        iterations = iter(range(10**6))

        def stop_request() -> bool:
            self.each()
            return self.stop_after is not None and next(iterations) >= self.stop_after

        folder = open_run_folder(self.config)
        with open_telemetry(self.config, world, folder, lambda stamped: print_record(stamped.record)) as emit:

            def note(record: records.Record) -> None:
                self.records.append({**records.to_json(record), "mark": self.mark()})
                emit(record)

            train(resolve(self.config), world, Callbacks(note, stop_request=in_steps(stop_request)), folder)
        return self

    def of(self, kind: str) -> list[int]:
        """Return the iterations of all records of a kind."""
        return [record["iter"] for record in self.records if record["kind"] == kind]

    def why(self, iter_num: int) -> str:
        """Return why the checkpoint of an iteration has failed."""
        (why,) = (r["why"] for r in self.records if r["kind"] == "checkpoint_failed" and r["iter"] == iter_num)
        return str(why)

    def steps_meanwhile(self, ended: str) -> int:
        """Return how many steps were done from the first mark on until an upload ended: checkpoint[_failed]."""
        begin = next(i for i, record in enumerate(self.records) if record["mark"])
        end = next(i for i, record in enumerate(self.records) if i >= begin and record["kind"] == ended)
        return sum(record["kind"] == "step" for record in self.records[begin:end])

    def has(self, kind: str) -> bool:
        """Return whether there is a record of a kind."""
        return bool(self.of(kind))

    def slowly(self, is_over: Callable[[], Any], act: Callable[[], None] = lambda: None, pause_s: float = 0.1) -> Run:
        """Act in every iteration, and let it take its time until it is over: milliseconds do not outlast a fault."""

        def each() -> None:
            act()
            if not is_over():
                time.sleep(pause_s)

        self.each = each
        return self


def store_of(config: TrainConfig) -> CheckpointStore:
    return checkpoints_in(config.out_dir, storage_options_of(config))


def check_whole(config: TrainConfig, final: Snapshot) -> None:
    """Read every byte of every checkpoint that is announced, and compare the newest one's bits."""
    store = store_of(config)
    found = list(store.newest_first())
    assert found[0].iter_num == config.max_iters
    assert store.damaged == {}
    states = [store.read(checkpoint) for checkpoint in found]
    assert tensors_equal(states[0], final)


def newest_whole(config: TrainConfig) -> int:
    """Return the iteration of the newest checkpoint that is announced, having read every byte of it."""
    store = store_of(config)
    newest = next(store.newest_first())
    store.read(newest)
    assert store.damaged == {}
    return newest.iter_num


def fault_of(kind: str, proxy: FaultyProxy, matches: Callable[[str, str], bool], times: int) -> Fault:
    match kind:
        case "500":
            return proxy.answer(500, "InternalError", matches, times)
        case "503":
            return proxy.answer(503, "SlowDown", matches, times)
        case "reset":
            return proxy.reset(matches, times, after_bytes=70_000)
    return proxy.hang(matches, times)


def kinds(*fast: str) -> Any:
    """Let a test run with each kind of fault, by default with these."""
    reasons = {
        "500": "the server has failed",
        "503": "the server is busy",
        "reset": "EndpointConnectionError",
        "hang": "ReadTimeoutError",
    }
    slow = {kind: () if kind in fast else pytest.mark.slow for kind in reasons}
    return pytest.mark.parametrize(
        ("kind", "reason"), [pytest.param(kind, reason, marks=slow[kind]) for kind, reason in reasons.items()]
    )


def slow(*values: object) -> Any:
    """One more case of the same, which is not among those that run by default."""
    return pytest.param(*values, marks=pytest.mark.slow)


def run(
    config: TrainConfig,
    attempt: str = "a",
    each: Callable[[], None] = lambda: None,
    records: list[Record] | None = None,
    stop_after: int | None = None,
) -> list[Record]:
    """Train as Run does and return the records; records: a list that gets each of them at once."""
    found = [] if records is None else records
    return Run(config, attempt, each, stop_after=stop_after, records=found).train().records


def iterations_of(records: list[Record], kind: str) -> list[int]:
    return [record["iter"] for record in records if record["kind"] == kind]
