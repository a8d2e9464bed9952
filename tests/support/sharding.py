"""A second placement, weights on every rank and moments in flat ranges, and ranks that save and restore such states."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from orchestrator.checkpoint.restore import import_state, restore
from orchestrator.checkpoint.restore.init_from import scratch_args
from orchestrator.checkpoint.save.policy import SaveIntervals
from orchestrator.checkpoint.save.saver import Saver
from orchestrator.checkpoint.snapshot import MOMENTS, Snapshot
from orchestrator.checkpoint.state import TrainState, allocate_moments, build_state, capture, set_step_counts
from orchestrator.checkpoint.tensor_slice import TensorSlice, replicate
from orchestrator.config import TrainConfig
from orchestrator.distributed.join import new_attempt
from orchestrator.distributed.world import World
from orchestrator.training.attempt import join_run
from tests.support.runs import checkpoints_in
from tests.support.states import random_state

_VOCAB_SIZE = 11
_ITER_NUM = 5


def shard_moments(tensors: Mapping[str, Tensor], world_size: int) -> list[TensorSlice]:
    """Each rank holds a flat range of each moment, of about the same length; everything else is replicated."""
    sharded = {name: tensor for name, tensor in tensors.items() if name.startswith("exp_avg")}
    slices = replicate({name: tensor for name, tensor in tensors.items() if name not in sharded}, world_size)
    for name, tensor in sharded.items():
        offset = 0
        for rank, part in enumerate(tensor.reshape(-1).tensor_split(world_size)):
            slices.append(TensorSlice(name, tuple(tensor.shape), offset, part, (rank,)))
            offset += part.numel()
    return slices


def shard_moments_on(rank: int, tensors: Mapping[str, Tensor], world_size: int) -> list[TensorSlice]:
    """The same on a rank that keeps its own range of each moment and nothing else of it."""
    weights = {name: tensor for name, tensor in tensors.items() if not name.startswith("exp_avg")}
    names = tensors.keys() - weights.keys()
    moments = {name: torch.empty(weights[name.split(".", 1)[1]].shape, device="meta") for name in sorted(names)}

    def own(each: TensorSlice) -> Tensor:
        tensor = tensors[each.name]  # whole, before the first step
        return tensor if tensor.numel() == each.tensor.numel() else tensor.reshape(-1)[each.offset : each.end]

    slices = shard_moments({**weights, **moments}, world_size)
    return [replace(each, tensor=own(each)) if each.name in names and rank in each.holders else each for each in slices]


@dataclass(frozen=True)
class Case:
    """A state that is saved or restored by ranks on nodes: "001" are two on one node and one on another.

    memory: the folder of the nodes' memories, "" for none.
    """

    config: TrainConfig
    layout: str
    is_sharded: bool = True
    memory: str = ""

    def config_of(self, rank: int) -> TrainConfig:
        if not self.memory:
            return replace(self.config, memory_dir="")
        path = Path(self.memory, self.layout[rank])
        path.mkdir(exist_ok=True)
        return replace(self.config, memory_dir=str(path))

    def build(self, config: TrainConfig, args: dict[str, Any], world: World, **options: Any) -> TrainState:
        state = build_state(config, args, world, **options)
        if self.is_sharded:
            state.placement = partial(shard_moments_on, world.rank)
        return state


def known_state(config: TrainConfig) -> Snapshot:
    """Return the state that is saved."""
    return random_state(scratch_args(config, _VOCAB_SIZE), _ITER_NUM)


def values_of(snapshot: Snapshot) -> dict[str, Tensor]:
    return {**snapshot.model, **snapshot.optimizer}


def stand_on_node(folder: str, layout: str, rank: int) -> None:
    os.chdir(Path(folder, layout[rank]))


def held(state: TrainState, world: World) -> list[TensorSlice]:
    live = capture(state)
    slices = state.placement({**live.model, **live.optimizer}, world.size)
    return [each for each in slices if world.rank in each.holders]


def save(world: World, case: Case) -> None:
    """Save a state of known values to storage and, if the nodes have memory, there too."""
    config, world = case.config_of(world.rank), replace(world, attempt=world.on_main(new_attempt))
    state, values = case.build(config, scratch_args(config, _VOCAB_SIZE), world), values_of(known_state(config))
    state.iter_num, state.config = _ITER_NUM, asdict(config)
    allocate_moments(state, world)
    for each in held(state, world):
        each.tensor.copy_(values[each.name].reshape(-1)[each.offset : each.end].view_as(each.tensor))
    set_step_counts(state)
    store = checkpoints_in(config.out_dir)
    saver = Saver(state, world, store, join_run(config, world, store), {}, SaveIntervals(1000))
    saver.offer(state, None, is_last=True)
    saver.close(is_finished=False)


def restore_all(world: World, cases: Sequence[Case], prepare: Callable[[int], None] = lambda _rank: None) -> None:
    """Restore one state after the other, and print what came of each, as JSON. prepare: is called first."""
    prepare(world.rank)
    for case in cases:
        found = world.gather_json(_restored(replace(world, attempt=world.on_main(new_attempt)), case))
        if world.is_main:
            os.write(1, f"\nrestored {json.dumps(found)}\n".encode())


def _restored(world: World, case: Case) -> dict[str, Any]:
    """Restore a state, check every bit of it, and return what this rank has read and received."""
    config, store = case.config_of(world.rank), checkpoints_in(case.config.out_dir)
    restore.build_state = import_state.build_state = case.build  # type: ignore[assignment]
    nodes = join_run(config, world, store)
    with received_bytes() as received:
        state = restore.restore_or_initialize(config, world, store, nodes, scratch_args(config, _VOCAB_SIZE))
    if nodes.memory:
        nodes.memory.close(is_finished=False)
    values, slices = values_of(known_state(config)), held(state, world)
    if state.iter_num != _ITER_NUM:
        return {"is_new": True}
    assert {each.name for each in slices} == values.keys(), "every rank has a part of everything"
    for each in slices:
        assert torch.equal(each.tensor.reshape(-1), values[each.name].reshape(-1)[each.offset : each.end]), each.key
    own_bytes = sum(each.tensor.nbytes for each in slices if each.name.startswith("exp_avg"))
    kept_bytes = sum(kept[moment].nbytes for kept in state.optimizer.state.values() for moment in MOMENTS)
    assert kept_bytes == own_bytes, "nothing is kept of what others hold"
    assert all(kept["step"] == _ITER_NUM for kept in state.optimizer.state.values())
    resumed = state.resumed_from
    counts = {"storage_bytes": resumed.from_storage_bytes, "size_bytes": resumed.size_bytes} if resumed else {}
    other_bytes = sum(each.tensor.nbytes for each in slices) - own_bytes
    return {**counts, "moment_bytes": own_bytes, "other_bytes": other_bytes, **received}


@contextmanager
def received_bytes() -> Iterator[dict[str, int]]:
    """Count what this rank receives: with all others, and alone."""
    received, send, broadcast = {"with_all": 0, "alone": 0}, World.send, World.broadcast

    def counted_send(world: World, tensors: list[Tensor], source: int, target: int) -> None:
        received["alone"] += sum(tensor.nbytes for tensor in tensors) if world.rank == target != source else 0
        send(world, tensors, source, target)

    def counted_broadcast(world: World, tensors: list[Tensor], source: int) -> None:
        received["with_all"] += sum(tensor.nbytes for tensor in tensors) if world.rank != source else 0
        broadcast(world, tensors, source)

    World.send, World.broadcast = counted_send, counted_broadcast  # type: ignore[method-assign]
    yield received
    World.send, World.broadcast = send, broadcast  # type: ignore[method-assign]
