"""TrainConfig -> TorchTrainer -> Outcome: the driver. Knows Ray, and no torch maths.

What can be wrong is looked for first, before anything is started (`preflight.py`) or written. Then Ray's `fit` runs in
a thread and this process shows what the workers post, and passes Ctrl-C, SIGTERM and SIGHUP on to them: they save
and leave.
"""

# ruff: noqa: E402  (Ray reads variables when it is imported)
from __future__ import annotations

import logging
import os
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from orchestrator.cluster import variables

variables.set_defaults()

import ray
from ray._private.state import state as cluster
from ray.train import CheckpointConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig

from orchestrator.cluster.join import SIGNALS, ClusterLostError, StoppedError, cluster_of, first_line
from orchestrator.cluster.mailbox import MailboxReader, open_mailbox
from orchestrator.cluster.room import wait_for_room
from orchestrator.config import TrainConfig
from orchestrator.controller import spares
from orchestrator.controller.attempts import AttemptMonitor
from orchestrator.controller.budgets import Budgets, RunAbandonedError
from orchestrator.controller.gpu_check import GpuCheck
from orchestrator.distributed.join import process_group_backend
from orchestrator.driver import preflight
from orchestrator.driver.journal import Journal, open_journal
from orchestrator.driver.lease import Lease
from orchestrator.driver.preflight import Plan
from orchestrator.driver.registry import REGISTRY_FILE, storage_for_ray
from orchestrator.driver.trainer import TorchGroup, Trainer
from orchestrator.errors import UndeletableError, UserError
from orchestrator.storage.options import redacted
from orchestrator.storage.run_folder import RUN_FILE, RunFolder
from orchestrator.telemetry.display import Display, quiet
from orchestrator.telemetry.format import stopped_line
from orchestrator.training.attempt import Outcome
from orchestrator.worker.environment import tell_what_is_passed_on
from orchestrator.worker.run import job_of, run_worker

logger = logging.getLogger(__name__)

EVALUATION_FOLDER = ".evaluation"  # the folder that Ray knows when eval_only is set; nothing is put there
_FIT_ENDS_S = 5.0
_SET_UP_S = 1800.0  # in which all workers of a group have met; from then on the watchdog decides
_CONTROLLERS, _LONG_S = 3, 300.0  # so many of Ray Train's that end within that time, one after the other, have a cause


class RunFailedError(Exception):
    """The run gave up: every restart that it was allowed is used, or Ray itself failed."""


class RunLostError(RunFailedError):
    """The cluster, or Ray's part of the run, was lost: the same command goes on, once they are there again."""


class ControllerLostError(Exception):
    """Ray Train's controller ended without an answer: it, its node or the cluster is gone."""


class InterruptedRunError(Exception):
    """The run was asked to stop; the message says what was saved and how to go on."""


def launch(config: TrainConfig, worker: Callable[[dict[str, Any]], dict[str, Any]] = run_worker) -> Outcome:
    """Train on the cluster that this process is in, or on one started for it here; worker is what each rank runs.

    Raises:
        UserError: before anything is started, or as soon as a worker finds what only it can see.
        InterruptedRunError: after Ctrl-C, SIGTERM or SIGHUP.
        RunFailedError: the run failed more often than max_failures allows, or another driver has taken over.
        RunLostError: the cluster is gone, or Ray's controller of the run again and again.
    """
    return run(preflight.plan(config), worker)


def run(plan: Plan, worker: Callable[[dict[str, Any]], dict[str, Any]] = run_worker) -> Outcome:
    """Carry out a plan.

    Raises:
        UserError, InterruptedRunError, RunFailedError: as `launch` does.
    """
    config = plan.config
    lease = None if config.eval_only else Lease(plan.folder)  # an evaluation disturbs nobody
    if lease:
        lease.wait_until_free()
    with _signals() as stop, lease.held() if lease else nullcontext(), open_journal(lease) as events:
        times, is_first = 0, True
        while True:
            began_s = time.monotonic()
            try:
                return _outcome(_train_on_ray(plan, worker, stop, lease, events, is_first), config)
            except StoppedError:
                raise InterruptedRunError("stopped before training began: the same command begins it") from None
            except ClusterLostError as lost:
                raise RunLostError(str(lost)) from None
            except ControllerLostError as lost:
                events.tell("failure", cause="controller_lost", text=str(lost))
                times, is_first = (times + 1 if time.monotonic() - began_s < _LONG_S else 1), False
                is_callers = ray.is_initialized()  # who has joined the cluster before, and may join it again
                if is_callers or stop.is_set() or times > _CONTROLLERS:
                    raise RunLostError(f"Ray has failed: {lost}; the same command goes on from there") from lost
                logger.warning("Ray has failed, its part of this run is started again: %s", lost)


def _train_on_ray(
    plan: Plan,
    worker: Callable[..., Any],
    stop: threading.Event,
    lease: Lease | None,
    events: Journal,
    is_first: bool,
) -> dict[str, Any]:
    """Train on a cluster until the run ends or Ray's controller of it is lost; return what rank 0 returned."""
    config = plan.config
    with cluster_of(plan.no_data) as leaves_cluster:
        may_wait = not is_first or bool(os.environ.get(variables.RESUBMITTED))
        try:
            gpus_per_worker = wait_for_room(config, may_wait, stop, lambda: events.tell("attempt_waiting"))
        except StoppedError:
            raise InterruptedRunError("stopped while waiting for machines, nothing was begun") from None
        if stop.is_set():
            raise StoppedError
        ids = _prepare_out_dir(config, plan.folder, lease)
        events.begin()
        logger.info("%s", plan.start.summary)
        if is_first:
            tell_what_is_passed_on(os.environ)
        job = {**job_of(config), **ids, "cwd": str(Path.cwd()), "mailbox": open_mailbox()}
        each = {"CPU": config.cpus_per_worker} | ({"GPU": gpus_per_worker} if gpus_per_worker else {})
        is_new = not may_wait and plan.start.iter_num == 0
        trainer = _trainer(config, plan.folder, each, worker, job, leaves_cluster, is_new)
        if config.warm_spares:
            spares.prestart_first(config.max_workers, each)
        return _fit(trainer, job["mailbox"], config, stop, lease, events)


@contextmanager
def _signals() -> Iterator[threading.Event]:
    """Lend an event that the first Ctrl-C, SIGTERM or SIGHUP sets; a second Ctrl-C interrupts at once."""
    stop = threading.Event()

    def on_signal(number: int, _frame: Any) -> None:
        if stop.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        if number == signal.SIGHUP:  # the terminal may be gone
            quiet()
        stop.set()

    if threading.current_thread() is not threading.main_thread():  # only there can signals be caught
        yield stop
        return
    heard = [number for number in SIGNALS if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, on_signal) for number in heard}  # under nohup, SIGHUP stays ignored
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _prepare_out_dir(config: TrainConfig, folder: RunFolder, lease: Lease | None) -> dict[str, str | None]:
    """Write run.json, unless there is no lease to do so, and return the ids in it.

    run_id: the run's, the same for all its drivers; what nodes keep of it in memory is named by it.
    start_id: this driver's; by it workers know that they see the folder that the driver has prepared.

    Raises:
        ConfigError: another driver began at the same moment.
        CheckpointError: it cannot be written.
    """
    before = folder.read_json(RUN_FILE)
    if lease is None:
        return {key: before.get(key) for key in ("run_id", "start_id")}
    lease.confirm()
    ids = {"run_id": before.get("run_id") or uuid.uuid4().hex, "start_id": lease.start_id}
    folder.write_json(RUN_FILE, {**ids, "config": redacted(config), "ray": ray.__version__})
    with suppress(UndeletableError):
        folder.delete(REGISTRY_FILE)  # it may name what is gone, and Ray would not start then
    return ids


def _trainer(
    config: TrainConfig,
    folder: RunFolder,
    each: dict[str, float],
    worker: Callable[..., Any],
    job: dict[str, Any],
    leaves_cluster: bool,
    is_new: bool,
) -> Trainer:
    budgets = Budgets(config.max_failures, config.max_preemptions, config.iters_per_checkpoint)
    monitor = AttemptMonitor(job["mailbox"], budgets, each if config.warm_spares else None, is_new)
    needs_gpus = "GPU" in each and config.device != "cpu"
    parent, _, name = folder.root.rstrip("/").rpartition("/")
    if config.eval_only:  # it reads no registry: that one may be another driver's, and names what is gone
        parent, name = folder.root, EVALUATION_FOLDER
    if config.is_elastic:  # nodes that were counted and turn out to be gone are not waited for
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "10")
    return Trainer(
        worker,
        mailbox=job["mailbox"],
        leaves_cluster=leaves_cluster,
        train_loop_config=job,
        torch_config=TorchGroup(
            backend=_backend(config, each),
            timeout_s=int(max(_SET_UP_S, 2 * config.hang_timeout_s)),
        ),
        scaling_config=ScalingConfig(
            num_workers=(config.min_workers, config.max_workers) if config.is_elastic else config.min_workers,
            use_gpu="GPU" in each,
            resources_per_worker=each,
        ),
        run_config=RunConfig(
            name=name,
            storage_path=parent or "/",
            storage_filesystem=storage_for_ray(folder),
            # Ray restarts without end; what is worth a restart is the monitor's to decide
            failure_config=FailureConfig(max_failures=-1, max_preemption_failures=-1, controller_failure_limit=-1),
            checkpoint_config=CheckpointConfig(),  # what is kept is decided where it is written (CheckpointStore.prune)
            worker_runtime_env=spares.runtime_env(config.warm_spares),
            logging_config=LoggingConfig(log_level="WARNING"),
            callbacks=[monitor, GpuCheck(monitor)] if needs_gpus else [monitor],
        ),
    )


def _backend(config: TrainConfig, each: dict[str, float]) -> str:
    """Return what the workers' process group is made of; each: the resources of one."""
    gpus = each.get("GPU", 0.0) if config.device != "cpu" else 0.0
    if 0 < gpus < 1 and config.backend == "nccl":
        logger.info("workers share GPUs (gpus_per_worker=%g), which NCCL cannot: backend=gloo", gpus)
    return process_group_backend(config) if gpus >= 1 else "gloo"


def _fit(
    trainer: Trainer, mailbox: Any, config: TrainConfig, stop: threading.Event, lease: Lease | None, events: Journal
) -> dict[str, Any]:
    """Run Ray's fit in a thread and show what the workers post; return what rank 0 returned.

    Raises:
        UserError: the monitor has found a mistake that only workers show.
        ControllerLostError: fit failed for a reason that is not the run's.
        RunFailedError: the run is given up, or another driver has taken over. Then the workers end with this driver's
            part of the cluster, at once; where the caller had joined it before, they leave after their iteration.
    """
    ended: dict[str, Any] = {}

    def fit() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # they are for the main thread
        try:
            ended["value"] = trainer.fit().return_value
        except Exception as error:  # all of Ray's failures are one to us: this is the driver's top
            ended["error"] = error

    thread = threading.Thread(target=fit, name="fit", daemon=True)
    thread.start()
    told, listener = False, MailboxReader(mailbox)
    with _ended_with_us(thread), Display(config.max_iters) as display:
        while thread.is_alive():
            thread.join(timeout=0.2)
            if lease and lease.successor:
                stop.set()
                break
            if stop.is_set() and not told:
                told = True
                display.show(_note("stopping: the iteration is finished and saved (Ctrl-C again: stop at once)"))
            _pass_on(listener.take(stop.is_set()), display, events)
        _pass_on(listener.take(stop.is_set()), display, events)
    if lease and lease.check():  # whatever has become of the workers since
        raise RunFailedError(lease.cut_off)
    why = getattr(ended.get("error"), "controller_failure", None)
    if isinstance(why, RunAbandonedError):
        raise RunFailedError(f"the run is given up: {why}")
    if isinstance(why, UserError):
        raise why
    if "error" in ended:
        raise ControllerLostError(first_line(ended["error"])) from ended["error"]
    return dict(ended["value"])


@contextmanager
def _ended_with_us(fit: threading.Thread) -> Iterator[None]:
    """End Ray's fit when this is interrupted: its thread would still call Ray after that has ended, which aborts us.

    Fit ends with its controller. How an actor is found is not public; where that has changed, the exit code is 1.
    """
    try:
        yield
    except KeyboardInterrupt:
        with suppress(Exception):
            core_worker = ray._private.worker.global_worker.core_worker
            for actor_id, actor in cluster.actor_table(None, core_worker.get_current_job_id(), "ALIVE").items():
                if actor["ActorClassName"].endswith("TrainController"):
                    core_worker.kill_actor(ray.ActorID.from_hex(actor_id), True)
        fit.join(timeout=_FIT_ENDS_S)
        raise


def _pass_on(records: list[dict[str, Any]], display: Display, events: Journal) -> None:
    """Show what the workers posted, and keep what the monitor has told."""
    for record in records:
        if "event" not in record:
            display.show(record)
            events.observe(record)
        else:
            events.tell(**record["event"])


def _note(text: str) -> dict[str, Any]:
    return {"kind": "note", "text": text}


def _outcome(value: dict[str, Any], config: TrainConfig) -> Outcome:
    if "error" in value:
        raise UserError(value["error"])
    outcome = Outcome(**value)
    if outcome.stopped:
        told = stopped_line(outcome.iter_num, config.max_iters, config.out_dir, eval_only=config.eval_only)
        raise InterruptedRunError(told)
    return outcome
