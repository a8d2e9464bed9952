"""What Ray starts for every rank: it makes the World, calls the loop, and brings checkpoints to Ray's notice."""

from __future__ import annotations

import logging
import os
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch.distributed as dist
from ray.train import Checkpoint, CheckpointUploadMode

from orchestrator.checkpoint.save.saver import Saver
from orchestrator.cluster.mailbox import MailboxClient
from orchestrator.config import TrainConfig
from orchestrator.distributed.device import local_device, resolve
from orchestrator.distributed.join import new_attempt
from orchestrator.distributed.numerics import NumericsFingerprint
from orchestrator.distributed.world import World
from orchestrator.errors import CheckpointError, DataError, StorageUnavailableError, UserError
from orchestrator.host.gpus import wait_until_free
from orchestrator.loop import train
from orchestrator.storage.run_folder import RUN_FILE, RunFolder, open_run_folder
from orchestrator.telemetry.emit import PostingHandler, open_telemetry
from orchestrator.telemetry.records import CheckpointSaved
from orchestrator.training.attempt import Callbacks, StopRequest
from orchestrator.worker.drain import leave, notice
from orchestrator.worker.failure import AttemptFailedError, Cause, WorkerFailure, classify
from orchestrator.worker.final_reports import failure_reporter
from orchestrator.worker.job import Job
from orchestrator.worker.notices import Watcher, cloud_here
from orchestrator.worker.rescue import RunningWorker, register
from orchestrator.worker.stack_file import keep_stacks, stack_file
from orchestrator.worker.watchdog import Watchdog, be_outlasted, stacks

_ENDED_S = 60.0  # in which a controller that lives has ended a process that hangs
_PEER_LOST_S = 0.5  # in which the controller notices whose process is gone; of a node, it finds out by itself


def run_worker(job: Job) -> dict[str, Any]:
    """Train as one rank of the group that Ray has set up.

    Returns Outcome's fields, or {"error": ...} for a user's mistake, which no restart would mend.

    Raises:
        AttemptFailedError: this attempt has failed, and another one may not.
    """
    with suppress(FileNotFoundError):
        os.chdir(job.cwd)  # relative paths mean on every node what they mean for the driver
    worker = RunningWorker(MailboxClient(job.mailbox))
    register(worker)
    _log_through(worker.mailbox)
    config = resolve(on_what_is_given(job.full_config, ray.get_gpu_ids()))
    world = _world(config)
    watchdog = Watchdog(config.hang_timeout_s, partial(_fail_hanging, worker, world, failure_reporter()))
    watcher: Watcher | None = None
    try:
        watcher = world.collectively(_watch_cloud)
        worker.folder = folder = world.collectively(_shared_folder, config, job)
        with open_telemetry(config, world, folder, worker.mailbox.post) as emit:
            hooks = Callbacks(
                emit, _register, partial(_stop_request, worker, watchdog), partial(_ready, worker, config, world)
            )
            outcome = train(config, world, hooks, folder)
        if outcome.preempted:
            text = notice() or "another rank's machine is taken away"
            failure = WorkerFailure(world.rank, Cause.PREEMPTED, text, outcome.iter_num, "", time.time())
            raise AttemptFailedError(failure)
        return asdict(outcome)
    except AttemptFailedError:
        raise
    except Exception as error:  # of the training loop, with whatever the user has put into it
        if isinstance(error, UserError) and not isinstance(error, StorageUnavailableError):
            return {"error": str(error)}
        failure = classify(error, world.rank, *worker.rescue())
        if failure.cause is Cause.PEER_LOST:  # the controller sees by itself whose process is gone, and ends this one
            time.sleep(_PEER_LOST_S)
        raise AttemptFailedError(failure) from None
    finally:
        if watcher:
            watcher.close()
        watchdog.close()
        worker.mailbox.close()


def _ready(worker: RunningWorker, config: TrainConfig, world: World, saver: Saver) -> None:
    """Take the Saver, which can rescue the state from now on, and check that the data are what they were."""
    worker.saver = saver
    logging.getLogger("model").setLevel(logging.WARNING)  # the model is described; after a rollback it is the same
    first = worker.mailbox.first("surroundings", saver.environment)
    world.collectively(_check_same_data, config, first, saver.environment)


def _stop_request(worker: RunningWorker, watchdog: Watchdog) -> int:
    """Return whether the loop should go on; it asks once per iteration."""
    watchdog.beat(worker.changed_at_s)
    if worker.mailbox.should_stop():
        return StopRequest.STOP
    return StopRequest.PREEMPTED if notice() else StopRequest.NONE


def _watch_cloud() -> Watcher | None:
    """Watch the cloud's notices for this node, on its first rank; None where no cloud is found."""
    context = ray.train.get_context()
    cloud = cloud_here() if context.get_local_rank() == 0 else None
    return Watcher(cloud, partial(leave, workers_here=context.get_local_world_size())) if cloud else None


def _fail_hanging(
    worker: RunningWorker,
    world: World,
    report: Callable[[WorkerFailure], None],
    silence_s: float,
) -> bool:
    """Fail this attempt, which makes no progress; keep its state and the stacks of its threads."""
    if worker.saver and worker.saver.is_finishing:  # it waits for an upload, which has limits of its own
        return False
    found = stacks()
    text = f"no progress for {silence_s:.0f} s; the stacks are in {stack_file(world)} in out_dir"
    reached = worker.rescue(stand_in_s=0.5)  # whatever stands still has done so for long
    if worker.folder:
        keep_stacks(worker.folder, world, found)
    report(WorkerFailure(world.rank, Cause.HANG, text, reached[0], "", reached[1]))
    time.sleep(_ENDED_S)  # the controller ends this process, in which one thread stands still
    os._exit(1)


def on_what_is_given(config: TrainConfig, gpu_ids: Sequence[Any]) -> TrainConfig:
    """Return the config for a worker that Ray has given these GPUs: with none, those that it may see are others'."""
    return config if gpu_ids else replace(config, device="cpu")


def _world(config: TrainConfig) -> World:
    context = ray.train.get_context()
    device = local_device(config, context.get_local_rank())
    if device.type == "cuda" and ray.get_runtime_context().get_assigned_resources().get("GPU", 0) >= 1:
        wait_until_free(device)
    world = World(context.get_world_rank(), context.get_world_size(), device)
    assert dist.is_initialized() or world.size == 1
    be_outlasted()
    return replace(world, attempt=world.on_main(new_attempt))


def _log_through(mailbox: MailboxClient) -> None:
    """Send rank 0's log lines to the driver's display. Of the other ranks Ray shows warnings only."""
    logging.getLogger().setLevel(logging.WARNING)  # some of Ray Train's loggers are named by file, so not the next one
    logging.getLogger("ray.train").setLevel(logging.WARNING)
    is_main = ray.train.get_context().get_world_rank() == 0
    for name in ("orchestrator", "model"):
        log = logging.getLogger(name)
        log.setLevel(logging.INFO if is_main else logging.WARNING)
        if is_main:
            log.handlers = [PostingHandler(mailbox.post)]
            log.propagate = False
    logging.getLogger("orchestrator.checkpoint.save.rescue").setLevel(logging.WARNING)  # the monitor says so for all
    if is_main and not _describes_model(mailbox):
        logging.getLogger("model").setLevel(logging.WARNING)


def _describes_model(mailbox: MailboxClient) -> bool:
    """Return whether the size of the model and its optimizer's groups are still to be logged: a driver does so once."""
    me = uuid.uuid4().hex
    return bool(mailbox.first("describes_model", me) == me)


def _shared_folder(config: TrainConfig, job: Job) -> RunFolder:
    """Open the run's folder: the one that the driver has prepared or, for an evaluation, has read.

    Raises:
        CheckpointError: this node sees another one.
    """
    folder = open_run_folder(config)
    key = "run_id" if config.eval_only else "start_id"  # another driver may begin anew while a run is evaluated
    if folder.read_with_retries(folder.read_json, RUN_FILE).get(key) != getattr(job, key):
        raise CheckpointError(
            f"out_dir={config.out_dir} is not the driver's on node {os.uname().nodename}: it must be a folder that all "
            "nodes share (NFS) or a URL (s3://bucket/run)"
        )
    return folder


def _check_same_data(config: TrainConfig, first: dict[str, Any], now: dict[str, Any]) -> None:
    """Check that the dataset is the one that this driver's first attempt began with.

    A worker dies, by SIGBUS, of a token file that is cut while it reads there. Starting it again mends nothing.

    Raises:
        DataError: it is another.
    """
    before = NumericsFingerprint.from_json(first)
    if change := NumericsFingerprint.from_json(now).change_of_data(before):
        raise DataError(
            f"{Path(config.data_dir, config.dataset)} was changed while this run used it: {change}. Put back what it "
            "was and give the same command again; to go on with other data, give it without doing so"
        )


def _register(saved: CheckpointSaved) -> None:
    """Tell Ray of a committed checkpoint, which is in its place already, whole and checked: nothing is uploaded."""
    run = ray.train.get_context().get_storage()
    checkpoint = Checkpoint(f"{run.experiment_fs_path}/{saved.name}", filesystem=run.storage_filesystem)
    metrics = {"iter_num": saved.iter, "best_val_loss": saved.best_val_loss, "val_loss": saved.val_loss}
    ray.train.report(
        metrics,
        checkpoint,
        checkpoint_dir_name=saved.name,
        checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD,
    )
