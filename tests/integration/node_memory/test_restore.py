"""Which ranks read the state from node memory, which from storage, and what they send to the others."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from orchestrator.checkpoint.restore import read_once as reading
from orchestrator.checkpoint.restore import read_plan
from orchestrator.checkpoint.snapshot import tensors_equal
from orchestrator.config import TrainConfig
from orchestrator.distributed.world import World
from tests.conftest import Undisturbed, final_state
from tests.support.damage import damage, flip_a_bit
from tests.support.readings import break_off_first_readings
from tests.support.scenes import Scene, iter_of, records


def test_after_the_death_of_all_processes_memory_has_it(
    left: Callable[[str, str], Scene], tiny: TrainConfig, undisturbed: Undisturbed
) -> None:
    scene = left("001", "ahead")
    name = scene.newest("0")
    again = scene.train("001", "again")
    assert again.is_done, again.said
    begin = scene.begin_record()
    assert (begin["from"], begin["iter"]) == (name, iter_of(name))
    assert begin["from_storage_bytes"] == 0
    assert f"resuming {name} ({begin['size_bytes'] / 1e6:.1f} MB of node memory in " in again.said
    assert scene.computed(begin["attempt"]) == list(range(begin["iter"], 24)), "nothing before it is repeated"
    assert tensors_equal(final_state(scene.config.out_dir), undisturbed(tiny, 3))
    assert scene.is_clean("01"), "what ends well leaves nothing"


@pytest.mark.parametrize("node", ["0", "1"])
@pytest.mark.slow
def test_the_memory_of_one_node_is_lost(
    left: Callable[[str, str], Scene], tiny: TrainConfig, undisturbed: Undisturbed, node: str
) -> None:
    scene = left("001", "ahead")
    expected = scene.iter_num()
    scene.lose(node)
    again = scene.train("001", "again")
    assert again.is_done, again.said
    begin = scene.begin_record()
    assert (begin["iter"], begin["from_storage_bytes"]) == (expected, 0)
    assert tensors_equal(final_state(scene.config.out_dir), undisturbed(tiny, 3))


@pytest.mark.slow
def test_a_node_whose_last_share_was_not_finished_is_left_out(
    left: Callable[[str, str], Scene], tiny: TrainConfig, undisturbed: Undisturbed
) -> None:
    scene = left("001", "ahead")
    name = scene.newest("0")
    unfinished = scene.shares("0", name)[1]
    unfinished.rename(unfinished.with_name(".slot-0123abcd"))
    again = scene.train("001", "again")
    assert again.is_done, again.said
    begin = scene.begin_record()
    assert (begin["from"], begin["from_storage_bytes"]) == (name, 0)
    assert tensors_equal(final_state(scene.config.out_dir), undisturbed(tiny, 3))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.slow
def test_without_any_memory_storage_is_read_once(left: Callable[[str, str], Scene], world_size: int) -> None:
    scene = left("001", "same")
    scene.lose("0", "1")
    checkpoint = scene.store.select("latest")
    expected = scene.store.read(checkpoint)
    stopped = replace(scene, config=replace(scene.config, max_iters=checkpoint.iter_num))
    again = stopped.train("0123"[:world_size], "again")
    assert again.is_done, again.said
    begin = stopped.begin_record()
    assert begin["from"] == checkpoint.name
    assert begin["world_size"] == world_size
    assert begin["from_storage_bytes"] == checkpoint.size_bytes, "headers included"
    assert tensors_equal(final_state(scene.config.out_dir), expected)


def test_what_was_sent_of_a_reading_that_broke_off_is_sent_again(
    left: Callable[[str, str], Scene], tiny: TrainConfig, undisturbed: Undisturbed
) -> None:
    scene = left("001", "same")
    scene.lose("0", "1")
    name = scene.store.select("latest").name
    again = scene.train("001", "again", prepare=break_off_first_readings)
    assert again.is_done, again.said
    assert {int(rank) for rank in re.findall(r"rank (\d) is broken off", again.said)} == {0, 1, 2}
    assert scene.begin_record()["from"] == name
    assert tensors_equal(final_state(scene.config.out_dir), undisturbed(tiny, 3))


def tell_what_is_read_and_sent(rank: int) -> None:
    """Let a process say which files it reads at the beginning, and what it sends or receives."""
    read, send = reading.stream_tensors, World.broadcast

    def say(text: str) -> None:
        os.write(1, f"\n{text}\n".encode())  # at once, and on a line of its own: three processes write to one file

    def telling(fs: Any, path: str, *rest: Any) -> Any:
        say(f"rank {rank} reads {path}")
        return read(fs, path, *rest)

    def sending(world: World, tensors: list[Any], source: int) -> None:
        if tensors:
            say(f"rank {rank} hears of rank {source}: {sum(tensor.nbytes for tensor in tensors)} bytes")
        send(world, tensors, source)

    reading.stream_tensors, World.broadcast = telling, sending  # type: ignore[assignment,method-assign]


@pytest.mark.parametrize("what", ["both nodes have it", "one node has it", "one file is damaged on one node"])
def test_who_has_the_state_in_memory_reads_it_and_only_the_rest_is_sent(
    left: Callable[[str, str], Scene], tiny: TrainConfig, undisturbed: Undisturbed, what: str
) -> None:
    scene = left("001", "ahead")
    name = scene.newest("0")
    size_bytes = {file: record.size_bytes for path in scene.shares("0", name) for file, record in records(path).items()}
    file = ""
    if what == "one node has it":
        scene.lose("1")
    elif what == "one file is damaged on one node":
        file, _ = damage(scene, "0", flip_a_bit)
    again = scene.train("001", "again", prepare=tell_what_is_read_and_sent)
    assert again.is_done, again.said
    read = [(int(rank), file) for rank, file in re.findall(r"rank (\d) reads .*/(\S+)", again.said)]
    heard_bytes = dict.fromkeys(range(3), 0)
    for rank, count in re.findall(r"rank (\d) hears of rank \d: (\d+) bytes", again.said):
        heard_bytes[int(rank)] += int(count)
    everything = sorted((rank, each) for rank in range(3) for each in size_bytes)
    match what:
        case "both nodes have it":
            assert sorted(read) == everything, "each rank in its own node's memory"
            assert set(heard_bytes.values()) == {0}
        case "one node has it":
            assert sorted(each for _, each in read) == sorted(size_bytes), "once, by one of two ranks"
            assert {rank for rank, _ in read} == {0, 1}
            assert min(heard_bytes.values()) > 0.9 * sum(size_bytes.values()), "all but the headers"
        case _:
            assert sorted(read) == sorted([*everything, (2, file)]), "the good copy again, to be sent"
            assert 0.9 * size_bytes[file] < min(heard_bytes.values()) <= max(heard_bytes.values()) < size_bytes[file]
    begin = scene.begin_record()
    assert (begin["from"], begin["from_storage_bytes"]) == (name, 0)
    assert tensors_equal(final_state(scene.config.out_dir), undisturbed(tiny, 3))


def read_as_on_gpus(rank: int) -> None:
    """Let a process take what others send within its node to be faster than memory, and say what is read and sent."""
    read_plan._reads_for_itself = lambda _world: False
    tell_what_is_read_and_sent(rank)


@pytest.mark.parametrize(
    "what",
    [
        "both nodes have it",
        pytest.param("one file is damaged on one node", marks=pytest.mark.slow),
        pytest.param("readings break off", marks=pytest.mark.slow),
    ],
)
def test_on_gpus_one_rank_of_each_node_reads_for_its_node(
    left: Callable[[str, str], Scene], tiny: TrainConfig, undisturbed: Undisturbed, what: str
) -> None:
    scene = left("001", "ahead")
    name = scene.newest("0")
    size_bytes = {file: record.size_bytes for path in scene.shares("0", name) for file, record in records(path).items()}
    again_by: list[tuple[int, str]] = []
    if what == "one file is damaged on one node":
        again_by = [(2, damage(scene, "0", flip_a_bit)[0])]
    again = scene.train("001", "again", prepare=READ_AS_ON_GPUS[what])
    assert again.is_done, again.said
    read = [(int(rank), file) for rank, file in re.findall(r"rank (\d) reads .*/(\S+)", again.said)]
    heard = [tuple(map(int, found)) for found in re.findall(r"rank (\d) hears of rank (\d): (\d+) bytes", again.said)]
    if what != "readings break off":
        expected = [*again_by, *((2, file) for file in size_bytes)]
        assert sorted(file for rank, file in read if rank == 2) == sorted(file for _, file in expected)
        assert sorted(file for rank, file in read if rank != 2) == sorted(size_bytes), "once, by one of two ranks"
        assert {rank for rank, _ in read} == {0, 1, 2}
        crossed = {of for rank, of, _ in heard if rank == 2} - {2} | {of for rank, of, _ in heard if rank != 2} & {2}
        assert crossed == ({2} if again_by else set()), "nothing but what one node lacks"
    begin = scene.begin_record()
    assert (begin["from"], begin["from_storage_bytes"]) == (name, 0)
    assert tensors_equal(final_state(scene.config.out_dir), undisturbed(tiny, 3))


def break_off_as_on_gpus(rank: int) -> None:
    read_as_on_gpus(rank)
    break_off_first_readings(rank)


READ_AS_ON_GPUS = {
    "both nodes have it": read_as_on_gpus,
    "one file is damaged on one node": read_as_on_gpus,
    "readings break off": break_off_as_on_gpus,
}
