"""What Ray starts for every rank: it makes the World, calls the loop, and brings checkpoints to Ray's notice."""

from __future__ import annotations

import logging
import os
import threading
import time
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
from orchestrator.storage.options import Secret, redacted, storage_options_of
from orchestrator.storage.run_folder import RUN_FILE, RunFolder
from orchestrator.telemetry.emit import PostingHandler, open_telemetry
from orchestrator.telemetry.records import CheckpointSaved
from orchestrator.training.attempt import Callbacks, StopRequest
from orchestrator.worker.drain import leave, notice
from orchestrator.worker.failure import AttemptFailedError, Cause, WorkerFailure, classify
from orchestrator.worker.final_reports import failure_reporter
from orchestrator.worker.notices import Watcher, cloud_here
from orchestrator.worker.stack_file import keep_stacks, stack_file
from orchestrator.worker.watchdog import Watchdog, be_outlasted, stacks

_ENDED_S = 60.0  # in which a controller that lives has ended a process that hangs
_PEER_LOST_S = 0.5  # in which the controller notices whose process is gone; of a node, it finds out by itself


def run_worker(job: dict[str, Any]) -> dict[str, Any]:
    """Train as one rank of the group that Ray has set up; job is {config, run_id, start_id, cwd, mailbox}.

    Returns how it ended: Outcome's fields, or {"error": ...} for a user's mistake, which no restart would mend.
    """
    with suppress(FileNotFoundError):
        os.chdir(job["cwd"])  # relative paths mean on every node what they mean for the driver
    mailbox = MailboxClient(job["mailbox"])
    _mailboxes[:] = [mailbox]
    _log_through(mailbox)
    config = resolve(on_what_is_given(config_of(job), ray.get_gpu_ids()))
    world = _world(config)
    watcher: Watcher | None = None
    watchdog = Watchdog(config.hang_timeout_s, partial(_hangs, world, failure_reporter()))

    def stop_request() -> int:
        watchdog.beat(_savers[-1].changed_at_s if _savers else 0.0)
        if mailbox.should_stop():
            return StopRequest.STOP
        return StopRequest.PREEMPTED if notice() else StopRequest.NONE

    def ready(saver: Saver) -> None:
        _savers[:] = [saver]
        first = mailbox.first("surroundings", saver.environment)
        world.collectively(lambda: _check_same_data(config, first, saver.environment))

    try:
        watcher = world.collectively(_watch_cloud)
        folder = world.collectively(lambda: _shared_folder(config, job))
        _folders[:] = [folder]
        with open_telemetry(config, world, folder, mailbox.post) as emit:
            outcome = train(config, world, Callbacks(emit, _register, stop_request, ready), folder)
        if outcome.preempted:
            text = notice() or "another rank's machine is taken away"
            now_s = time.time()
            raise AttemptFailedError(
                WorkerFailure(world.rank, Cause.PREEMPTED, text, outcome.iter_num, "", now_s).to_json()
            )
        return asdict(outcome)
    except AttemptFailedError:
        raise
    except Exception as error:
        if isinstance(error, UserError) and not isinstance(error, StorageUnavailableError):
            return {"error": str(error)}
        ending = classify(error, world.rank, *_rescue())
        if ending.cause is Cause.PEER_LOST:  # who is gone is for the controller to see, and it ends this process then
            time.sleep(_PEER_LOST_S)
        raise AttemptFailedError(ending.to_json()) from None
    finally:
        if watcher:
            watcher.close()
        watchdog.close()
        mailbox.close()


def _watch_cloud() -> Watcher | None:
    """Listen to what the cloud announces for this node, on its first rank; None where no cloud is found."""
    context = ray.train.get_context()
    cloud = cloud_here() if context.get_local_rank() == 0 else None
    return Watcher(cloud, partial(leave, workers_here=context.get_local_world_size())) if cloud else None


_mailboxes: list[MailboxClient] = []  # of this process: one
_folders: list[RunFolder] = []  # one, once it is open
_savers: list[Saver] = []  # one, once training has begun
_rescuing: list[threading.Thread] = []


def begin_rescue() -> None:
    """Put the state into node memory, behind. The controller calls this before the group ends, by another thread."""
    _rescuing.append(threading.Thread(target=_rescue, name="rescue", daemon=True))
    _rescuing[-1].start()


def end_rescue() -> tuple[int | None, float | None]:
    """Wait until that is done; return the iteration that is safe and when it was completed (seconds since 1970)."""
    _rescuing[-1].join()
    for mailbox in _mailboxes:
        mailbox.hurry()
    return _rescue()


def _rescue(**options: float) -> tuple[int | None, float | None]:
    iter_num = _savers[-1].rescue(**options) if _savers else None
    return (None, None) if iter_num is None else (iter_num, _savers[-1].changed_at_s)


def _hangs(world: World, say: Callable[[WorkerFailure], None], silence_s: float) -> bool:
    """Fail this attempt: training has stood still for too long. Its state and the stacks of its threads are kept."""
    if _savers and _savers[-1].is_finishing:  # an upload is waited for, which has limits of its own
        return False
    found = stacks()
    text = f"no progress for {silence_s:.0f} s; the stacks are in {stack_file(world)} in out_dir"
    reached = _rescue(stand_in_s=0.5)  # for whatever stands still has done so for long
    if _folders:
        keep_stacks(_folders[-1], world, found)
    say(WorkerFailure(world.rank, Cause.HANG, text, reached[0], "", reached[1]))
    time.sleep(_ENDED_S)  # the controller ends this process, in which one thread stands still
    os._exit(1)


def job_of(config: TrainConfig) -> dict[str, Any]:
    """Return a config as part of a job. Ray keeps and shows what a job holds: the options, secrets too, are hidden."""
    return {"config": redacted(config), "storage_options": Secret(config.storage_options)}


def config_of(job: dict[str, Any]) -> TrainConfig:
    """Return the config that `job_of` has put into a job."""
    return TrainConfig(**{**job["config"], "storage_options": job["storage_options"].text})


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
    """Send rank 0's log lines to the driver's display; of the other ranks only warnings are shown, by Ray."""
    logging.getLogger().setLevel(logging.WARNING)  # some of Ray Train's loggers are named by file, so not the next one
    logging.getLogger("ray.train").setLevel(logging.WARNING)
    for name in ("orchestrator", "model"):
        log = logging.getLogger(name)
        if ray.train.get_context().get_world_rank() == 0:
            log.setLevel(logging.INFO)
            log.handlers = [PostingHandler(mailbox.post)]
            log.propagate = False
        else:
            log.setLevel(logging.WARNING)


def _shared_folder(config: TrainConfig, job: dict[str, Any]) -> RunFolder:
    """Open the run's folder: the one that the driver has prepared or, for an evaluation, has read.

    Raises:
        CheckpointError: this node sees another one.
    """
    folder = RunFolder(config.out_dir, storage_options_of(config))
    key = "run_id" if config.eval_only else "start_id"  # another driver may begin anew while a run is evaluated
    if folder.read_with_retries(lambda: folder.read_json(RUN_FILE)).get(key) != job[key]:
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
