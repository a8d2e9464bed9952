"""The way of a record out of the loop: stamped, to whoever shows it and to the run's sinks."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from orchestrator.config import TrainConfig
from orchestrator.distributed.world import World
from orchestrator.storage.options import redacted
from orchestrator.storage.run_folder import RunFolder
from orchestrator.telemetry.records import Note, Record, Stamped
from orchestrator.telemetry.sinks import Sinks, open_sinks


@contextmanager
def open_telemetry(
    config: TrainConfig, world: World, folder: RunFolder, post: Callable[[Stamped], None]
) -> Iterator[Callable[[Record], None]]:
    """Lend `emit`, which stamps a record, posts it and, on rank 0, writes it to the run's sinks.

    Raises:
        ConfigError: on all ranks, if a sink is asked for whose package is not installed.
    """
    sinks = world.collectively(_open, config, world, folder)

    def emit(record: Record) -> None:
        stamped = Stamped(record, time.time(), world.attempt)
        post(stamped)
        sinks.write(stamped)

    try:
        yield emit
    finally:
        sinks.close()


def _open(config: TrainConfig, world: World, folder: RunFolder) -> Sinks:
    if not world.is_main:
        return Sinks([])
    return open_sinks(
        folder,
        world.attempt,
        wandb_log=config.wandb_log,
        wandb_project=config.wandb_project,
        wandb_run_name=config.wandb_run_name,
        tensorboard_log=config.tensorboard_log,
        mlflow_log=config.mlflow_log,
        mlflow_experiment=config.mlflow_experiment,
        config=redacted(config),
    )


class PostingHandler(logging.Handler):
    """Posts log lines as notes."""

    def __init__(self, post: Callable[[Stamped], None]) -> None:
        super().__init__()
        self._post = post

    def emit(self, entry: logging.LogRecord) -> None:
        self._post(Stamped(Note(level=entry.levelname, text=entry.getMessage()), entry.created))
