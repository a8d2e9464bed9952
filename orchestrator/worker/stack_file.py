"""Stacks of a process that hangs, in a file of the run's folder. Knows no Ray."""

from __future__ import annotations

import threading
from contextlib import suppress

from orchestrator.distributed.world import World
from orchestrator.errors import CheckpointError
from orchestrator.storage.run_folder import RunFolder

_PATIENCE_S = 5.0  # storage may be the reason for the hang


def stack_file(world: World) -> str:
    """Return the name of this rank's file, of this attempt."""
    return f"hang-{world.attempt}-rank{world.rank}.txt"


def keep_stacks(folder: RunFolder, world: World, text: str) -> None:
    """Write the stacks of a rank into the run's folder, if storage takes them within seconds."""

    def write() -> None:
        with suppress(CheckpointError):  # this process ends, whatever becomes of it
            folder.write(stack_file(world), text.encode())

    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    writer.join(timeout=_PATIENCE_S)
