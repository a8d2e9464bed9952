"""What Ray starts for every rank: it makes the World, calls the loop, and brings checkpoints to Ray's notice."""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from dataclasses import asdict, replace
from typing import Any

import ray.train
import torch.distributed as dist
from ray.train import Checkpoint, CheckpointUploadMode

from orchestrator.board import Poster
from orchestrator.checkpoint.durable import patiently_read
from orchestrator.checkpoint.store import CheckpointStore
from orchestrator.config import TrainConfig
from orchestrator.errors import CheckpointError, UserError
from orchestrator.loop import train
from orchestrator.process import local_device, new_attempt, resolve
from orchestrator.storage_options import Hidden, public, storage_options_of
from orchestrator.telemetry.tell import PostingHandler, open_telemetry
from orchestrator.world import World


def run_worker(job: dict[str, Any]) -> dict[str, Any]:
    """Train as one rank of the group that Ray has set up; job is {config, run_id, start_id, cwd, board}.

    Returns how it ended: Outcome's fields, or {"error": ...} for a user's mistake, which no restart would mend.
    """
    with suppress(FileNotFoundError):
        os.chdir(job["cwd"])  # relative paths mean on every node what they mean for the driver
    poster = Poster(job["board"])
    _log_through(poster)
    config = resolve(config_of(job))
    world = _world(config)
    try:
        world.together(lambda: _check_shared(config, job["start_id"]))
        with open_telemetry(config, world, poster.post) as tell:
            outcome = train(config, world, tell, _register, poster.should_stop)
        return asdict(outcome)
    except UserError as error:
        return {"error": str(error)}
    finally:
        poster.close()


def job_of(config: TrainConfig) -> dict[str, Any]:
    """Return a config as part of a job. Ray keeps and shows what a job holds: the options, secrets too, are hidden."""
    return {"config": public(config), "storage_options": Hidden(config.storage_options)}


def config_of(job: dict[str, Any]) -> TrainConfig:
    """Return the config that `job_of` has put into a job."""
    return TrainConfig(**{**job["config"], "storage_options": job["storage_options"].text})


def _world(config: TrainConfig) -> World:
    context = ray.train.get_context()
    device = local_device(config, context.get_local_rank())
    world = World(context.get_world_rank(), context.get_world_size(), device)
    assert dist.is_initialized() or world.size == 1
    return replace(world, attempt=world.broadcast_json(new_attempt()))


def _log_through(poster: Poster) -> None:
    """Send rank 0's log lines to the driver's display; of the other ranks only warnings are shown, by Ray."""
    logging.getLogger().setLevel(logging.WARNING)  # some of Ray Train's loggers are named by file, so not the next one
    logging.getLogger("ray.train").setLevel(logging.WARNING)
    for name in ("orchestrator", "model"):
        log = logging.getLogger(name)
        if ray.train.get_context().get_world_rank() == 0:
            log.setLevel(logging.INFO)
            log.handlers = [PostingHandler(poster.post)]
            log.propagate = False
        else:
            log.setLevel(logging.WARNING)


def _check_shared(config: TrainConfig, start_id: str | None) -> None:
    """Check that this node sees the folder that the driver has prepared.

    Raises:
        CheckpointError: it does not.
    """
    store = CheckpointStore(config.out_dir, storage_options_of(config))
    if patiently_read(lambda: store.read_json("run.json"), store).get("start_id") != start_id:
        raise CheckpointError(
            f"out_dir={config.out_dir} is not the driver's on node {os.uname().nodename}: it must be a folder that all "
            "nodes share (NFS) or a URL (s3://bucket/run)"
        )


def _register(record: dict[str, Any]) -> None:
    """Tell Ray of a committed checkpoint, which is in its place already, whole and checked: nothing is uploaded."""
    run = ray.train.get_context().get_storage()
    checkpoint = Checkpoint(f"{run.experiment_fs_path}/{record['name']}", filesystem=run.storage_filesystem)
    metrics = {"iter_num": record["iter"], **{key: record[key] for key in ("best_val_loss", "val_loss")}}
    ray.train.report(
        metrics,
        checkpoint,
        checkpoint_dir_name=record["name"],
        checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD,
    )
