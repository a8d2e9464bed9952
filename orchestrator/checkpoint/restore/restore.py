"""Begin an attempt: with the newest whole state of the run, wherever it lies, else with the one that init_from names.

A state may lie in the memory of several nodes and in storage. One rank reads each file, from the nearest source that
has it, straight into the live slices, and sends each slice to the ranks that want it while it reads the next ones. So
storage is read once at most, whatever the world size, and not at all if the nodes' memories have the state. If all
nodes have it, one rank of each reads for its node, and nothing crosses the network. On CPUs every rank reads for
itself, because memory is faster than messages within a node. A file may turn out to be damaged at its end, after its
slices were sent: then it is read from another source. Nothing is used before it is verified.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from orchestrator.checkpoint.restore.base import load_base
from orchestrator.checkpoint.restore.import_state import import_state
from orchestrator.checkpoint.restore.init_from import Vocabulary, check_same_run
from orchestrator.checkpoint.restore.overlap import overlaps
from orchestrator.checkpoint.restore.read_once import ReadOnce
from orchestrator.checkpoint.restore.read_plan import Source, plan_reads
from orchestrator.checkpoint.rollbacks import Rollback, is_undone
from orchestrator.checkpoint.save.node_memory import share_path, states_in
from orchestrator.checkpoint.save.node_topology import NodeTopology
from orchestrator.checkpoint.state import (
    Resumed,
    TrainState,
    adopt,
    build_state,
    set_step_counts,
    slices_to_fill,
)
from orchestrator.checkpoint.store import Checkpoint, CheckpointStore, newest_name_first
from orchestrator.checkpoint.tensor_slice import by_tensor
from orchestrator.config import TrainConfig
from orchestrator.distributed.world import World
from orchestrator.errors import CheckpointError

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
    """Build model and optimizer, and fill them with the newest whole state of the run or with the one it begins with.

    scratch_args: GPTConfig's for a new model. rollbacks: states that they undo are passed over.
    tokenizer: the dataset's, as JSON.

    Raises:
        CheckpointError, ConfigError, DataError: on every rank alike, if init_from cannot be read or does not fit.
    """
    data = Vocabulary(scratch_args["vocab_size"], tokenizer)
    for sources in candidates(world, store, nodes):
        saved = sources[0].checkpoint
        if is_undone(saved.state, rollbacks):
            continue
        world.collectively(check_same_run, config, saved.state, data)
        args = {**saved.state["model_args"], "dropout": config.dropout}
        state = build_state(config, args, world, is_empty=True, adapters=saved.adapters)
        if resumed := fill_from(state, sources, world, store, model_only=config.eval_only):
            state.resumed_from = resumed
            if state.adapters:
                load_base(config, state, world)
            return state
    world.on_main(store.check_not_lost)
    if config.init_from == "scratch":
        return build_state(config, scratch_args, world)
    return import_state(config, world, data, store.folder)


def candidates(world: World, store: CheckpointStore, nodes: NodeTopology) -> Iterator[list[Source]]:
    """Yield the sources of every state, newest state first, nearest source first: the same on all ranks."""
    in_memory = _in_memory(world, nodes)
    in_storage = world.on_main(_names, store, bool(in_memory))
    for name in newest_name_first({*in_memory, *in_storage}):
        sources = in_memory.get(name, [])
        if name in in_storage and (found := world.on_main(_load, store, name)):
            checkpoint = Checkpoint(name, found)
            folders = dict.fromkeys(checkpoint.files, store.folder.path(name))
            sources = [*sources, Source("storage", tuple(range(world.size)), checkpoint, folders, is_storage=True)]
        if sources:
            yield sources


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
        checkpoint = store.folder.read_with_retries(store.load, name)
    except CheckpointError as error:
        store.reject(name, str(error))
        return None
    return checkpoint.state if checkpoint else None


def _in_memory(world: World, nodes: NodeTopology) -> dict[str, list[Source]]:
    """Return the states that are whole in a node's memory, by name; the first rank of every node looks there."""
    mine = {}
    if nodes.memory and nodes.share == 0:
        for name, shares in states_in(nodes.memory.path).items():
            paths = {share: str(share_path(nodes.memory.path, name, share, len(shares))) for share in shares}
            mine[name] = [[paths[share], checkpoint.state] for share, checkpoint in shares.items()]
    sources: dict[str, list[Source]] = {}
    for rank, found in enumerate(world.gather_json(mine)):
        ranks = tuple(other for other, node in enumerate(nodes.ids) if node == nodes.ids[rank])
        for name, shares in found.items():
            merged = {**shares[0][1], "files": {}, "tensors": shares[0][1]["tensors"]}
            folders: dict[str, str] = {}
            for folder, share in shares:
                merged["files"] |= share["files"]
                folders |= dict.fromkeys(share["files"], folder)
            source = Source(f"the memory of rank {rank}'s node", ranks, Checkpoint(name, merged), folders)
            sources.setdefault(name, []).append(source)
    return sources


def fill_from(
    state: TrainState, sources: list[Source], world: World, store: CheckpointStore, *, model_only: bool
) -> Resumed | None:
    """Fill the live state from the sources of a saved one, and verify it; return None if a file is whole nowhere.

    model_only: the optimizer's files stay unread, and it keeps no moments.
    """
    began_s = time.perf_counter()
    checkpoint, sources = _merged(sources)
    files, saved = checkpoint.files, checkpoint.slices()
    if model_only:
        saved = {file: saved[file] for file in checkpoint.model_files}
    names = by_tensor(each for slices in saved.values() for each in slices).keys()
    live = by_tensor(slices_to_fill(state, set(names), world))
    wanted = {file: list(overlaps(slices, live)) for file, slices in saved.items()}
    refused: dict[str, dict[str, str]] = {}  # file -> label of a source -> what is wrong with it there
    from_storage_bytes = 0
    left = list(saved)
    while left:
        plan = plan_reads({file: files[file] for file in left if file in files}, wanted, sources, refused, world)
        if lost := sorted(set(left) - plan.keys()):
            if world.is_main:
                _fall_back(sources, "; ".join(f"{file} in {_listed(refused.get(file, {}))}" for file in lost), store)
            return None
        reading = ReadOnce(plan, files, wanted, world, store.folder)
        errors = reading.run()
        from_storage_bytes += reading.from_storage_bytes
        for file, readers in plan.items():
            if file in errors:
                refused.setdefault(file, {}).update(errors[file])
            elif world.is_main and file in refused:
                source = next(iter(readers.values()))
                told = checkpoint.name, file, source.label, _listed(refused[file])
                logger.warning("%s: %s was read from %s; passed over: %s", *told)
        left = [file for file in plan if file in errors]
    set_step_counts(state)
    adopt(state, checkpoint.snapshot({}), world)
    if checkpoint.is_evaluated:
        state.evaluated_at, state.val_loss = state.iter_num, checkpoint.val_loss
    total_bytes = int(world.sum(torch.tensor([from_storage_bytes])).item())
    is_durable = any(source.is_storage for source in sources)
    size_bytes = sum(files[file].size_bytes for file in saved)
    return Resumed(checkpoint, is_durable, size_bytes, total_bytes, time.perf_counter() - began_s)


def _merged(sources: list[Source]) -> tuple[Checkpoint, list[Source]]:
    """Return a state with the files of all sources, as a node may lack slices of ranks elsewhere, and the sources.

    Where two sources have other bits under the name of one file, the first one counts, and the other is left out.
    """
    first, records = sources[0].checkpoint, dict[str, Any]()
    agreeing = []
    for source in sources:
        found = source.checkpoint.state["files"]
        if all(records.get(file, record) == record for file, record in found.items()):
            records |= found
            agreeing.append(source)
    return Checkpoint(first.name, {**first.state, "files": records}), agreeing


def _fall_back(sources: list[Source], why: str, store: CheckpointStore) -> None:
    """Log that a state is whole nowhere. Only if storage has it, the user can restore it from a copy."""
    name = sources[0].checkpoint.name
    if any(source.is_storage for source in sources):
        store.reject(name, why)
    else:
        logger.warning("%s in node memory is not whole, falling back to the one before: %s", name, why)


def _listed(refused: dict[str, str]) -> str:
    return ", ".join(f"{label} ({why})" for label, why in refused.items()) or "the memory of no node"
