"""Begin an attempt: the newest whole checkpoint of the run, else what init_from names.

Every file is read by one rank and every tensor sent to the others, so storage is read once whatever the world size.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from model import GPT, GPTConfig
from orchestrator.checkpoint.files import read_tensors
from orchestrator.checkpoint.snapshot import Snapshot, describe, undescribe
from orchestrator.checkpoint.start import read_start
from orchestrator.checkpoint.state import TrainState, adopt_groups, capture, make_slots
from orchestrator.checkpoint.store import Checkpoint, CheckpointStore
from orchestrator.config import TrainConfig
from orchestrator.errors import CheckpointError
from orchestrator.world import World

logger = logging.getLogger(__name__)


def begin(config: TrainConfig, world: World, store: CheckpointStore, scratch_args: dict[str, Any]) -> TrainState:
    """Build model and optimizer and fill them with the state to go on from; scratch_args are GPTConfig's.

    Raises:
        CheckpointError, ConfigError: on every rank alike, if init_from's file cannot be read or does not fit.
    """
    for checkpoint in _offered(world, store):
        state = _build(config, {**checkpoint.state["model_args"], "dropout": config.dropout}, world)
        if _fill_from_store(state, checkpoint, world, store):
            state.resumed_from = checkpoint
            return state
    world.together(store.check_not_lost)
    if config.init_from == "scratch":
        return _build(config, scratch_args, world)
    return _import(config, world)


def _build(config: TrainConfig, model_args: dict[str, Any], world: World) -> TrainState:
    torch.manual_seed(config.seed)
    model = GPT(GPTConfig(**model_args)).to(world.device)
    optimizer = model.configure_optimizers(
        config.weight_decay, config.learning_rate, (config.beta1, config.beta2), world.device.type
    )
    scaler = torch.amp.GradScaler(world.device.type, enabled=config.dtype == "float16")
    return TrainState(model, optimizer, scaler, config={})


def _offered(world: World, store: CheckpointStore) -> Iterator[Checkpoint]:
    """Yield the committed checkpoints, newest first, as rank 0 sees them: the choice is the same on all ranks."""
    found = store.newest_first() if world.is_main else iter(())
    while offer := world.broadcast_json(_to_json(next(found, None))):
        yield Checkpoint(**offer)


def _to_json(checkpoint: Checkpoint | None) -> dict[str, Any] | None:
    return {"name": checkpoint.name, "state": checkpoint.state} if checkpoint else None


def _fill_from_store(state: TrainState, checkpoint: Checkpoint, world: World, store: CheckpointStore) -> bool:
    """Read and verify a checkpoint and fill the state with it; where a byte is wrong, say so and return False."""
    readers = {file: index % world.size for index, file in enumerate(sorted(checkpoint.files))}
    mine: dict[str, Tensor] = {}
    error = None
    try:
        for file, reader in readers.items():
            if reader == world.rank:
                mine |= read_tensors(store.fs, store.path(checkpoint.name, file), checkpoint.files[file])
    except CheckpointError as problem:
        error = str(problem)
    if errors := [found for found in world.gather_json(error) if found]:
        if world.is_main:
            store.reject(checkpoint.name, errors[0])
        return False
    source = {name: readers[entry["file"]] for name, entry in checkpoint.state["tensors"].items()}
    _fill(state, checkpoint.snapshot({}), mine, source, world)
    return True


def _fill(state: TrainState, saved: Snapshot, mine: dict[str, Tensor], source: dict[str, int], world: World) -> None:
    """Copy every tensor from the rank that has it (source: tensor -> rank) into the live state of all ranks."""
    if "step" in source:
        make_slots(state.optimizer)
    live = capture(state)
    tensors = {**live.model, **live.optimizer}
    if tensors.keys() != source.keys():
        raise CheckpointError(f"the saved state lacks or adds tensors: {sorted(tensors.keys() ^ source.keys())[:5]}")
    with torch.no_grad():
        for name, tensor in sorted(tensors.items()):
            if source[name] == world.rank:
                tensor.copy_(mine[name])
            world.broadcast(tensor, source[name])
        for slots in state.optimizer.state.values():
            slots["step"].copy_(live.optimizer["step"])
    if saved.param_groups and (changed := adopt_groups(state.optimizer, saved.param_groups)) and world.is_main:
        logger.warning("the optimizer goes on as saved, as in nanoGPT: %s", ", ".join(changed))
    if state.scaler.is_enabled() and saved.scaler:
        state.scaler.load_state_dict(saved.scaler)
    state.iter_num, state.best_val_loss = saved.iter_num, saved.best_val_loss


def _import(config: TrainConfig, world: World) -> TrainState:
    """Start from a ckpt.pt or from GPT-2 weights: rank 0 reads, the others receive."""
    snapshot = world.together(lambda: read_start(config) if world.is_main else None)
    mine = {**snapshot.model, **snapshot.optimizer} if snapshot else {}
    description, names = world.broadcast_json([describe(snapshot), sorted(mine)] if snapshot else None)
    saved = undescribe(description, {}, {})
    state = _build(config, {**saved.model_args, "dropout": config.dropout}, world)
    _fill(state, saved, mine, dict.fromkeys(names, 0), world)
    return state
