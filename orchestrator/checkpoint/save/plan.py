"""SavePlan: which rank writes which part of a state into which file. Every rank computes the same plan by itself."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from orchestrator.checkpoint.snapshot import Snapshot, describe
from orchestrator.checkpoint.state import TrainState, capture
from orchestrator.checkpoint.store import ADAPTER_FORMAT_VERSION, FORMAT_VERSION, checkpoint_name
from orchestrator.checkpoint.tensor_slice import Placement, TensorSlice, replicate
from orchestrator.distributed.world import World

Files = dict[str, dict[str, TensorSlice]]  # file name -> key of the slice in it -> slice


@dataclass(frozen=True)
class SavePlan:
    """One state that is to be saved. It shares the live tensors, so use it before the next step.

    name: of its checkpoint. description: the content of its state.json, but for the records of the files.
    size_bytes: of all its tensors.
    """

    name: str
    iter_num: int
    files: Files
    description: dict[str, Any]
    size_bytes: int

    def without_tensors(self) -> SavePlan:
        """Return what a thread needs that outlives this iteration: live tensors must not stay alive because of it."""
        return replace(self, files={})

    def files_of(self, rank: int) -> dict[str, dict[str, Tensor]]:
        """Return the files that a rank writes to storage: file name -> key -> tensor."""
        return {file: tensors_in(slices) for file, slices in self.files.items() if rank_of(file) == rank}

    def tensors_on(self, rank: int) -> dict[str, Tensor]:
        """Return the slices that a rank holds: key -> tensor."""
        slices = [each for slices in self.files.values() for each in slices.values()]
        return {each.key: each.tensor for each in slices if rank in each.holders}


def plan_save(
    state: TrainState,
    world: World,
    environment: dict[str, Any],
    val_loss: float | None,
    scaler: dict[str, Any] | None = None,
) -> SavePlan:
    """Plan to save the state of this iteration; val_loss, scaler: see `capture`."""
    snapshot = capture(state, val_loss, scaler)
    files = files_of(snapshot, world.size, state.placement)
    description = {
        "format_version": ADAPTER_FORMAT_VERSION if snapshot.adapters else FORMAT_VERSION,
        **describe(snapshot),
        "is_evaluated": state.is_evaluated,
        "environment": environment,
        "tensors": tensor_index(files),
        "saved_at_s": time.time(),  # for people to read: clocks of two nodes may differ, and decide nothing
    }
    size_bytes = sum(each.tensor.nbytes for slices in files.values() for each in slices.values())
    name = checkpoint_name(snapshot.iter_num, world.attempt)
    return SavePlan(name, snapshot.iter_num, files, description, size_bytes)


def files_of(snapshot: Snapshot, world_size: int, placement: Placement = replicate) -> Files:
    """Return the files of a state's checkpoint. Each is one rank's; model and optimizer never share one."""
    slices = [each for each in placement({**snapshot.model, **snapshot.optimizer}, world_size) if each.tensor.numel()]
    owner = owners(slices, world_size)
    files: Files = {}
    for each in slices:
        kind = "model" if each.name in snapshot.model else "optimizer"
        file = f"{kind}-{owner[each.key]:05d}-of-{world_size:05d}.safetensors"
        files.setdefault(file, {})[each.key] = each
    return dict(sorted(files.items()))


def owners(slices: Sequence[TensorSlice], world_size: int) -> dict[str, int]:
    """Return which rank writes each slice, by its key, so that ranks write about equally many bytes.

    Largest first, each to the holder with the least so far; ties go to the lowest rank. A slice is never split: no rank
    writes less than the largest one, the token embedding, which is 10% of GPT-2's state and 1.7% of gpt2-xl's.

    Source: Graham's longest-processing-time rule (1969).
    """
    load = [0] * world_size
    owner = {}
    for each in sorted(slices, key=lambda each: (-each.tensor.nbytes, each.key)):
        rank = min(each.holders, key=load.__getitem__)
        owner[each.key] = rank
        load[rank] += each.tensor.nbytes
    return owner


def rank_of(file: str) -> int:
    """Return the rank that writes a file to storage."""
    return int(file.split("-")[1])


def holds_all(slices: dict[str, TensorSlice], rank: int) -> bool:
    """Return whether a rank holds all of a file's slices, and so can write the file."""
    return all(rank in each.holders for each in slices.values())


def tensors_in(slices: dict[str, TensorSlice]) -> dict[str, Tensor]:
    """Return the tensors of a file's slices, by their keys."""
    return {key: each.tensor for key, each in slices.items()}


def tensor_index(files: Files) -> dict[str, dict[str, Any]]:
    """Return where every slice lies and what it is, for state.json."""
    return {key: {"file": file, **each.to_json()} for file, slices in files.items() for key, each in slices.items()}
