"""What the loop calls with a record: it stamps the record and hands it to the display and to the run's sinks."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from orchestrator.config import TrainConfig
from orchestrator.distributed.world import World
from orchestrator.storage.options import redacted
from orchestrator.storage.run_folder import RunFolder
from orchestrator.telemetry.sinks import Sinks, open_sinks

Record = dict[str, Any]


@contextmanager
def open_telemetry(
    config: TrainConfig, world: World, folder: RunFolder, show: Callable[[Record], None]
) -> Iterator[Callable[[Record], None]]:
    """Lend a function that takes records: show gets each at once, metrics.jsonl, TensorBoard and W&B on rank 0 too.

    Raises:
        ConfigError: on all ranks, if W&B or TensorBoard is asked for and not installed.
    """
    sinks = world.collectively(lambda: _open(config, world, folder) if world.is_main else Sinks([]))

    def tell(record: Record) -> None:
        stamped = {**record, "attempt": world.attempt, "time": time.time()}
        show(stamped)
        sinks.write(stamped)

    try:
        yield tell
    finally:
        sinks.close()


def _open(config: TrainConfig, world: World, folder: RunFolder) -> Sinks:
    return open_sinks(
        folder,
        world.attempt,
        wandb_log=config.wandb_log,
        wandb_project=config.wandb_project,
        wandb_run_name=config.wandb_run_name,
        tensorboard_log=config.tensorboard_log,
        config=redacted(config),
    )


class PostingHandler(logging.Handler):
    """Turns log lines into records of kind `note`."""

    def __init__(self, post: Callable[[Record], None]) -> None:
        super().__init__()
        self._post = post

    def emit(self, entry: logging.LogRecord) -> None:
        self._post({"kind": "note", "level": entry.levelname, "text": entry.getMessage()})
