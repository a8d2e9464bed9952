"""Save one state from all ranks together: every tensor is written once, by its owner, and announced at the end."""

from __future__ import annotations

import logging
import time
from typing import Any

from torch import Tensor

from orchestrator.checkpoint.files import tensor_pieces, write_file
from orchestrator.checkpoint.ownership import owners
from orchestrator.checkpoint.snapshot import Snapshot, describe
from orchestrator.checkpoint.store import FORMAT_VERSION, CheckpointStore, checkpoint_name
from orchestrator.world import World

logger = logging.getLogger(__name__)


def save(
    snapshot: Snapshot, world: World, store: CheckpointStore, environment: dict[str, Any], keep: int
) -> str | None:
    """Write a checkpoint and return its name, or None, on every rank alike, where storage failed.

    keep: the number of newest checkpoints that stay, besides the best; older ones are deleted.
    A failure is a warning: what was committed before stays, and training can go on.
    """
    name = checkpoint_name(snapshot.iter_num, world.attempt)
    parts = world.gather_json(_write_mine(snapshot, world, store, name))
    failed = [f"rank {rank}: {part['error']}" for rank, part in enumerate(parts) if "error" in part]
    if not failed and world.is_main:
        failed = _announce(snapshot, store, name, parts, environment)
    failed = world.broadcast_json(failed)
    if world.is_main:
        if failed:
            logger.warning("checkpoint %s was not saved: %s", name, "; ".join(failed))
        else:
            _prune(store, keep)
    return None if failed else name


def _prune(store: CheckpointStore, keep: int) -> None:
    try:
        store.prune(keep)
    except Exception as error:  # what stays is only clutter
        logger.warning("old checkpoints were not deleted: %s: %s", type(error).__name__, error)


def _write_mine(snapshot: Snapshot, world: World, store: CheckpointStore, name: str) -> dict[str, Any]:
    """Write the tensors that this rank owns; return what was written where, or the error."""
    owner = owners(snapshot.model, world.size)
    owner["step"] = 0
    part: dict[str, Any] = {"files": {}, "tensors": {}}
    try:
        store.fs.makedirs(store.path(name), exist_ok=True)
        for kind, tensors in (("model", snapshot.model), ("optimizer", snapshot.optimizer)):
            mine = {key: tensor for key, tensor in tensors.items() if owner[parameter_of(key)] == world.rank}
            if mine:
                file = f"{kind}-{world.rank:05d}-of-{world.size:05d}.safetensors"
                part["files"][file] = write_file(store.fs, store.path(name, file), tensor_pieces(mine)).to_json()
                part["tensors"] |= {key: _entry(file, tensor) for key, tensor in mine.items()}
    except Exception as error:  # every storage has exceptions of its own, and none of them may end the run
        return {"error": f"{type(error).__name__}: {error}"}
    return part


def parameter_of(key: str) -> str:
    """Return the parameter that a tensor of the state belongs to: `exp_avg.<parameter>` -> `<parameter>`."""
    moment, _, parameter = key.partition(".")
    return parameter if moment in ("exp_avg", "exp_avg_sq") else key


def _entry(file: str, tensor: Tensor) -> dict[str, Any]:
    return {"file": file, "shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}


def _announce(
    snapshot: Snapshot, store: CheckpointStore, name: str, parts: list[dict[str, Any]], environment: dict[str, Any]
) -> list[str]:
    """Write state.json, after which the checkpoint exists; return the error, if any."""
    state = {
        "format_version": FORMAT_VERSION,
        **describe(snapshot),
        "environment": environment,
        "saved_at_s": time.time(),
    }
    for key in ("files", "tensors"):
        state[key] = {inner: value for part in parts for inner, value in part[key].items()}
    try:
        store.commit(name, state)
    except Exception as error:  # as above
        return [f"{type(error).__name__}: {error}"]
    return []
