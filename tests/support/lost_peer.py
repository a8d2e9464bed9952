"""Three ranks, of which one leaves after its first step: what the others make of theirs."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from orchestrator.distributed.world import World
from orchestrator.worker.failure import classify
from tests.support import ranks

Step = Callable[[], object]


def causes_of(step_of: Callable[[World], Step], folder: Path) -> set[str]:
    """Return the causes that the two ranks find whose peer has left; step_of: a module's function that makes a step."""
    ended = ranks.call(_step_twice, 3, folder / "log", step_of, folder)
    assert ended.is_done, ended.said
    return {(folder / f"ending-{rank}").read_text() for rank in (0, 2)}


def _step_twice(world: World, step_of: Callable[[World], Step], folder: Path) -> None:
    step = step_of(world)
    step()
    if world.rank == 1:
        os._exit(0)
    try:
        step()
    except Exception as error:
        kept = str(classify(error, world.rank, None).cause)
    else:
        kept = "went on with half a gradient"
    (folder / f"ending-{world.rank}").write_text(kept)
    os._exit(0)  # a group that has lost a member is not left in order
