"""Begin an attempt: the newest whole state of the run, wherever it lies, else what init_from names.

A state may lie in the memory of several nodes and in storage. Every file is read by one rank, from the nearest place
that has it, straight into the live tensors, and sent from there to the other ranks while the next tensors are read:
storage is read once at most, whatever the world size, and not at all where a node's memory has the state. Where all
nodes have it, one rank of each reads for its node, and nothing crosses the network. On CPUs, where memory is faster
than what is sent within a node, every rank reads for itself. What is sent may turn out to be damaged at the end of its
file; then the file is read elsewhere. Nothing is used before it is verified.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from model import GPT, GPTConfig
from orchestrator.checkpoint.finite import count_not_finite, not_finite
from orchestrator.checkpoint.restore.init_from import (
    Vocabulary,
    check_fits,
    check_same_run,
    read_initial_state,
    source_identity,
)
from orchestrator.checkpoint.restore.read_once import ReadOnce, ReadPlan, Source
from orchestrator.checkpoint.rollbacks import Rollback, is_undone
from orchestrator.checkpoint.save.node_topology import NodeTopology
from orchestrator.checkpoint.snapshot import Snapshot, describe, undescribe
from orchestrator.checkpoint.state import Resumed, TrainState, adopt_groups, allocate_moments, capture
from orchestrator.checkpoint.store import Checkpoint, CheckpointStore, newest_name_first
from orchestrator.checkpoint.tensor_file import FileRecord, checksum
from orchestrator.config import TrainConfig
from orchestrator.distributed.world import World
from orchestrator.errors import CheckpointError
from orchestrator.storage.run_folder import RunFolder

logger = logging.getLogger(__name__)


def restore_or_initialize(
    config: TrainConfig,
    world: World,
    store: CheckpointStore,
    nodes: NodeTopology,
    scratch_args: dict[str, Any],
    rollbacks: Sequence[Rollback] = (),
    tokenizer: dict[str, Any] | None = None,
) -> TrainState:
    """Build model and optimizer and fill them with the state to go on from; scratch_args are GPTConfig's.

    rollbacks: states that they undo are passed over. tokenizer: the dataset's, as JSON.

    Raises:
        CheckpointError, ConfigError, DataError: on every rank alike, if init_from cannot be read or does not fit.
    """
    data = Vocabulary(scratch_args["vocab_size"], tokenizer)
    for places in _offered(world, store, nodes):
        saved = places[0].checkpoint
        if is_undone(saved.state, rollbacks):
            continue
        world.collectively(lambda saved=saved: check_same_run(config, saved.state, data))  # type: ignore[misc]
        state = _build(config, {**saved.state["model_args"], "dropout": config.dropout}, world, is_empty=True)
        if resumed := _fill_from(state, places, world, store, model_only=config.eval_only):
            state.resumed_from = resumed
            return state
    world.on_main(store.check_not_lost)
    if config.init_from == "scratch":
        return _build(config, scratch_args, world)
    return _import(config, world, data, store.folder)


def _build(config: TrainConfig, model_args: dict[str, Any], world: World, *, is_empty: bool = False) -> TrainState:
    """Return the state of a new run; with is_empty, its weights are still to be filled in."""
    torch.manual_seed(config.seed)
    args = GPTConfig(**model_args)
    model = GPT.empty(args, world.device) if is_empty else GPT(args).to(world.device)
    model.transformer.recompute, model.loss_chunk = config.activation_checkpointing, config.loss_chunk
    optimizer = model.configure_optimizers(
        config.weight_decay, config.learning_rate, (config.beta1, config.beta2), world.device.type
    )
    scaler = torch.amp.GradScaler(world.device.type, enabled=config.dtype == "float16")
    return TrainState(model, optimizer, scaler, config={})


def _offered(world: World, store: CheckpointStore, nodes: NodeTopology) -> Iterator[list[Source]]:
    """Yield the places of every state, newest state first, nearest place first: the same on all ranks."""
    in_memory = _in_memory(world, nodes)
    in_storage = world.on_main(lambda: _names(store, bool(in_memory)))
    for name in newest_name_first({*in_memory, *in_storage}):
        places = in_memory.get(name, [])
        if name in in_storage and (found := world.on_main(partial(_load, store, name))):
            checkpoint = Checkpoint(name, found)
            folders = dict.fromkeys(checkpoint.files, store.folder.path(name))
            places = [*places, Source("storage", tuple(range(world.size)), checkpoint, folders, is_storage=True)]
        if places:
            yield places


def _names(store: CheckpointStore, has_others: bool) -> list[str]:
    try:
        return store.folder.read_with_retries(store.names)
    except CheckpointError as error:
        if not has_others:
            raise
        logger.warning("only the states in node memory are considered: %s", error)
        return []


def _load(store: CheckpointStore, name: str) -> dict[str, Any] | None:
    try:
        checkpoint = store.folder.read_with_retries(lambda: store.load(name))
    except CheckpointError as error:
        store.reject(name, str(error))
        return None
    return checkpoint.state if checkpoint else None


def _in_memory(world: World, nodes: NodeTopology) -> dict[str, list[Source]]:
    """Return the states that are whole in a node's memory, by name; the first rank of every node looks there."""
    mine = {}
    if nodes.memory and nodes.share == 0:
        for name, shares in nodes.memory.generations().items():
            paths = {share: str(nodes.memory.share_path(name, share, len(shares))) for share in shares}
            mine[name] = [[paths[share], checkpoint.state] for share, checkpoint in shares.items()]
    places: dict[str, list[Source]] = {}
    for rank, found in enumerate(world.gather_json(mine)):
        ranks = tuple(other for other, node in enumerate(nodes.ids) if node == nodes.ids[rank])
        for name, shares in found.items():
            merged = {**shares[0][1], "files": {}, "tensors": shares[0][1]["tensors"]}
            folders: dict[str, str] = {}
            for folder, share in shares:
                merged["files"] |= share["files"]
                folders |= dict.fromkeys(share["files"], folder)
            place = Source(f"the memory of rank {rank}'s node", ranks, Checkpoint(name, merged), folders)
            places.setdefault(name, []).append(place)
    return places


def _fill_from(
    state: TrainState, places: list[Source], world: World, store: CheckpointStore, *, model_only: bool
) -> Resumed | None:
    """Read and verify a state from its places and fill the live one; None where a file is whole nowhere.

    model_only: the optimizer's files stay unread, and it keeps no moments.
    """
    began_s = time.perf_counter()
    checkpoint = places[0].checkpoint
    places = [place for place in places if place.checkpoint.files == checkpoint.files]  # the same bits
    files = checkpoint.model_files if model_only else checkpoint.files
    wanted = {name for name, entry in checkpoint.state["tensors"].items() if entry["file"] in files}
    tensors = _live_tensors(state, wanted)
    refused: dict[str, dict[str, str]] = {}  # file -> place -> what is wrong with it there
    from_storage_bytes = 0
    left = files
    while left:
        plan = _assign(left, places, refused, world)
        if lost := sorted(left.keys() - plan.keys()):
            if world.is_main:
                _fall_back(places, "; ".join(f"{file} in {_listed(refused[file])}" for file in lost), store)
            return None
        reading = ReadOnce(plan, left, tensors, checkpoint, world, store.folder)
        errors = reading.run()
        from_storage_bytes += reading.from_storage_bytes
        for file, readers in plan.items():
            if file in errors:
                refused.setdefault(file, {}).update(errors[file])
            elif world.is_main and file in refused:
                place = next(iter(readers.values()))
                told = checkpoint.name, file, place.label, _listed(refused[file])
                logger.warning("%s: %s was read from %s; passed over: %s", *told)
        left = {file: left[file] for file in plan if file in errors}
    _share_steps(state, tensors)
    _adopt(state, checkpoint.snapshot({}), world)
    if checkpoint.is_evaluated:
        state.evaluated_at, state.val_loss = state.iter_num, checkpoint.val_loss
    total_bytes = int(world.sum(torch.tensor([from_storage_bytes])).item())
    is_durable = any(place.is_storage for place in places)
    size_bytes = sum(record.size_bytes for record in files.values())
    return Resumed(checkpoint, is_durable, size_bytes, total_bytes, time.perf_counter() - began_s)


def _fall_back(places: list[Source], why: str, store: CheckpointStore) -> None:
    """Tell that a state is whole nowhere. One that storage does not know of is lost; the others can be brought back."""
    name = places[0].checkpoint.name
    if any(place.is_storage for place in places):
        store.reject(name, why)
    else:
        logger.warning("%s in node memory is not whole, falling back to the one before: %s", name, why)


def _listed(refused: dict[str, str]) -> str:
    return ", ".join(f"{label} ({why})" for label, why in refused.items())


def _assign(
    files: dict[str, FileRecord], places: list[Source], refused: dict[str, dict[str, str]], world: World
) -> ReadPlan:
    """Return from where and by which ranks each file is read.

    Where all have it in memory, by all, or on GPUs by one of each node; else by one: from node memory first, then who
    has the least to read.
    """
    load = dict.fromkeys(range(world.size), 0)
    plan: ReadPlan = {}
    for file in sorted(files, key=lambda file: (-files[file].size_bytes, file)):
        options = [place for place in places if place.label not in refused.get(file, {})]
        at_hand = {rank: place for place in options if not place.is_storage for rank in place.ranks}
        if len(at_hand) == world.size and _reads_for_itself(world):
            plan[file] = at_hand
        elif len(at_hand) == world.size:
            near = [place for place in options if not place.is_storage]
            plan[file] = {min(place.ranks, key=lambda rank: (load[rank], rank)): place for place in near}
        elif options:
            ranked = [(place.is_storage, load[rank], rank, place) for place in options for rank in place.ranks]
            _, _, rank, place = min(ranked, key=lambda option: option[:3])
            plan[file] = {rank: place}
        for rank in plan.get(file, {}):
            load[rank] += files[file].size_bytes
    return plan


def _reads_for_itself(world: World) -> bool:
    """Return whether to read a node's memory is faster for a rank than to be sent what another one has read there."""
    return world.device.type == "cpu"


def _live_tensors(state: TrainState, wanted: set[str]) -> dict[str, Tensor]:
    """Return the tensors of the live state to be filled.

    Raises:
        CheckpointError: the saved state has others.
    """
    if "step" in wanted:
        allocate_moments(state.optimizer)
    live = capture(state)
    tensors = {**live.model, **live.optimizer}
    if tensors.keys() != wanted:
        raise CheckpointError(f"the saved state lacks or adds tensors: {sorted(tensors.keys() ^ wanted)[:5]}")
    return tensors


def _share_steps(state: TrainState, tensors: dict[str, Tensor]) -> None:
    """Give every parameter the one count of steps that was saved for all."""
    if "step" in tensors:
        for slots in state.optimizer.state.values():
            slots["step"].copy_(tensors["step"])


def _adopt(state: TrainState, saved: Snapshot, world: World) -> None:
    """Set what is no tensor."""
    if saved.param_groups and (changed := adopt_groups(state.optimizer, saved.param_groups)) and world.is_main:
        logger.warning("the optimizer goes on as saved, as in nanoGPT: %s", ", ".join(changed))
    if state.scaler.is_enabled() and saved.scaler:
        state.scaler.load_state_dict(saved.scaler)
    state.iter_num, state.best_val_loss, state.guard = saved.iter_num, saved.best_val_loss, saved.guard
    state.config = saved.config  # until the loop has compared it with its own


def _import(config: TrainConfig, world: World, data: Vocabulary, folder: RunFolder) -> TrainState:
    """Start from a run, a ckpt.pt or GPT-2 weights, with the same bits on all ranks: those of the first that has them.

    What all see is read by that rank alone, what nodes have on their own disks by one rank at each. The rest receive.

    Raises:
        CheckpointError, ConfigError, DataError: on every rank alike, if no node has it, or the first rank's cannot be
            read, does not fit or is not finite.
    """
    first, reader_of = _readers(config, world)
    is_reader = reader_of[world.rank] == world.rank
    snapshot = world.collectively(lambda: _read(config, folder, is_first=world.rank == first) if is_reader else None)
    mine = {**snapshot.model, **snapshot.optimizer} if snapshot else {}
    shapes = {name: list(mine[name].shape) for name in sorted(mine)}
    outlines = world.gather_json([describe(snapshot), shapes] if snapshot else None)
    del snapshot  # so that every tensor goes as soon as it is copied
    description, names = outlines[first][0], list(outlines[first][1])
    alike = [rank for rank, outline in enumerate(outlines) if outline == outlines[first]]
    saved = undescribe(description, {}, {})
    world.on_main(lambda: check_fits(config, config.init_from, saved, data))
    state = _build(config, {**saved.model_args, "dropout": config.dropout}, world, is_empty=True)
    tensors = _live_tensors(state, set(names))

    def fill(name: str) -> tuple[str, int]:
        tensors[name].copy_(mine.pop(name))
        return checksum(tensors[name]) if len(alike) > 1 else "", count_not_finite(tensors[name])

    with ThreadPoolExecutor(
        torch.get_num_threads(), initializer=world.choose_device
    ) as pool:  # each touches memory for the first time: one is slow
        checksums = world.gather_json(list(pool.map(fill, names if world.rank in alike else ())))
    mine.clear()  # of a rank whose file is another one
    for name, (_, count) in zip(names, checksums[first], strict=True):
        if count:
            raise CheckpointError(not_finite(config.init_from, name, count, tensors[name].numel()))
    sources = [reader if checksums[reader] == checksums[first] else first for reader in reader_of]
    if world.is_main and (others := {rank for rank, outline in enumerate(outlines) if outline} - set(sources)):
        told = config.init_from, ", ".join(map(str, sorted(others))), first
        logger.warning("init_from=%s is another one on the nodes of ranks %s: rank %d's is used by all", *told)
    world.broadcast_from_each([tensors[name] for name in names], sources)
    _share_steps(state, tensors)
    _adopt(state, saved, world)
    return state


def _readers(config: TrainConfig, world: World) -> tuple[int, list[int]]:
    """Return the first rank that has what the run starts from, and by rank which rank reads it for that one.

    Raises:
        CheckpointError: on every rank alike, if no node has it.
    """
    origins = world.gather_json(source_identity(config))
    if config.init_from != "resume" and not any(origins):
        raise CheckpointError(
            f"init_from={config.init_from}: no worker's node has it; copy it to one, or give a path or URL that all see"
        )
    first = next((rank for rank, origin in enumerate(origins) if origin), 0)
    return first, [origins.index(origin) if origin else first for origin in origins]


def _read(config: TrainConfig, folder: RunFolder, *, is_first: bool) -> Snapshot | None:
    """Return what the run starts from, mapped from a file where that can be; None where one but the first is bad.

    Raises:
        CheckpointError, ConfigError: the first one cannot be read.
    """
    try:
        snapshot = read_initial_state(config, folder)
    except Exception as error:  # whatever is wrong with another node's copy, the first one is sent
        if is_first:
            raise
        logger.warning("this node's copy is not used: %s: %s", type(error).__name__, error)
        return None
    return replace(snapshot, optimizer={}) if config.eval_only else snapshot  # an evaluation steps nothing
