"""Stacks of a process that hangs, in a file of the run's folder. Knows no Ray."""

from __future__ import annotations

import threading
from contextlib import suppress

from orchestrator.checkpoint.store import CheckpointStore
from orchestrator.config import TrainConfig
from orchestrator.distributed.world import World
from orchestrator.storage.options import storage_options_of

_PATIENCE_S = 5.0  # storage may be what hangs


def stack_file(world: World) -> str:
    """Return the name of this rank's file, of this attempt."""
    return f"hang-{world.attempt}-rank{world.rank}.txt"


def keep_stacks(config: TrainConfig, world: World, text: str) -> None:
    """Write the stacks of a rank into out_dir, if storage takes them within seconds."""

    def write() -> None:
        store = CheckpointStore(config.out_dir, storage_options_of(config))
        with suppress(Exception):  # this process ends, whatever becomes of it
            store.fs.pipe_file(store.path(stack_file(world)), text.encode())

    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    writer.join(timeout=_PATIENCE_S)
