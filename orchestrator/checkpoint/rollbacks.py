"""Rollbacks: stretches of a run that were undone, and what that means for its states and its data.

    <out_dir>/rollbacks.json    [{"to_iter": 4000, "skipped_iters": 130, "why": "..."}, ...], oldest first

A rollback to iteration c undoes every later state that does not know of it. From c on, training continues with other
batches: those of the undone stretch are skipped. All of it follows from the list alone, so that whoever restarts the
run, from whichever state, goes through the same iterations with the same data.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from orchestrator.checkpoint.store import CheckpointStore
from orchestrator.distributed.world import World
from orchestrator.storage.run_folder import RunFolder

logger = logging.getLogger(__name__)

_FILE = "rollbacks.json"


@dataclass(frozen=True)
class Rollback:
    """To the state of to_iter; from there, skipped_iters iterations' batches are left out."""

    to_iter: int
    skipped_iters: int
    why: str


def read_rollbacks(folder: RunFolder, world: World) -> list[Rollback]:
    """Return the run's rollbacks, oldest first, on all ranks as rank 0 reads them.

    Raises:
        CheckpointError: on all ranks alike, the storage does not answer.
    """
    found = world.on_main(folder.read_with_retries, folder.read_json, _FILE)
    return [Rollback(**entry) for entry in found.get("rollbacks", [])]


def write_rollbacks(folder: RunFolder, rollbacks: Sequence[Rollback]) -> None:
    """Undo, from now on and for all attempts, the stretches of these rollbacks.

    Raises:
        CheckpointError: the list cannot be written.
    """
    folder.with_retries(folder.write_json, _FILE, {"rollbacks": [asdict(rollback) for rollback in rollbacks]})


def delete_undone(store: CheckpointStore, rollbacks: Sequence[Rollback]) -> None:
    """Delete the checkpoints that were undone, so that no reader takes one for the newest or the best."""
    for checkpoint in list(store.newest_first()) if rollbacks else []:
        if is_undone(checkpoint.state, rollbacks):
            logger.info("deleting %s, which was undone: %s", checkpoint.name, rollbacks[-1].why)
            store.withdraw(checkpoint.name)


def is_undone(state: dict[str, Any], rollbacks: Sequence[Rollback]) -> bool:
    """Return whether a state, by its state.json, lies in a stretch that was undone after it was saved."""
    known = state.get("guard", {}).get("rollbacks", 0)
    return any(state["iter_num"] > rollback.to_iter for rollback in rollbacks[known:])


def data_iter(iter_num: int, rollbacks: Sequence[Rollback]) -> int:
    """Return the iteration whose batches an iteration uses: without rollbacks, its own."""
    return iter_num + sum(rollback.skipped_iters for rollback in rollbacks if rollback.to_iter <= iter_num)
