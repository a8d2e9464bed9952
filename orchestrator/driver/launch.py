"""TrainConfig -> TorchTrainer -> Outcome: the driver. Knows Ray, and no torch maths.

    preflight.py   looks for what can be wrong, before anything is started or written
    launch.py      claims out_dir, finds or starts a cluster, and starts Ray's part again where that is lost
    trainer.py     makes Ray's trainer for the run
    fit.py         runs it in a thread, and shows what the workers post

Ctrl-C, SIGTERM and SIGHUP are passed on to the workers: they save and leave.
"""

# ruff: noqa: E402  (Ray reads variables when it is imported)
from __future__ import annotations

import logging
import os
import signal
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from orchestrator.cluster import variables

variables.set_defaults()

import ray

from orchestrator.capacity.warning import memory_warning
from orchestrator.cluster.join import ClusterLostError, StoppedError, cluster_of, last_line, logs_folder
from orchestrator.cluster.mailbox import open_mailbox
from orchestrator.cluster.room import wait_for_room
from orchestrator.config import TrainConfig
from orchestrator.controller import spares
from orchestrator.controller.budgets import RunAbandonedError
from orchestrator.driver import preflight
from orchestrator.driver.cluster_cards import cards_of
from orchestrator.driver.driver import Driver, Worker
from orchestrator.driver.fit import fit
from orchestrator.driver.journal import open_journal
from orchestrator.driver.lease import Lease
from orchestrator.driver.preflight import Plan
from orchestrator.driver.ray_output import LOG_FILE, ray_output
from orchestrator.driver.registry import REGISTRY_FILE
from orchestrator.driver.trainer import trainer_of
from orchestrator.errors import UndeletableError, UserError
from orchestrator.host.signals import on_stop_signals
from orchestrator.storage.options import redacted
from orchestrator.storage.run_folder import RUN_FILE
from orchestrator.telemetry.display import quiet
from orchestrator.telemetry.format import stopped_line
from orchestrator.telemetry.records import AttemptWaiting, Failure
from orchestrator.training.attempt import Outcome
from orchestrator.worker.environment import log_passed_variables
from orchestrator.worker.job import Job
from orchestrator.worker.run import run_worker

logger = logging.getLogger(__name__)

_CONTROLLERS, _LONG_S = 3, 300.0  # so many of Ray Train's that end within that time, one after the other, have a cause


class RunFailedError(Exception):
    """The run gave up: every restart that it was allowed is used, or Ray itself failed."""


class RunLostError(RunFailedError):
    """The cluster, or Ray's part of the run, was lost: the same command goes on, once they are there again."""


class ControllerLostError(Exception):
    """Ray Train's controller ended without an answer: it, its node or the cluster is gone."""


class InterruptedRunError(Exception):
    """The run was asked to stop; the message says what was saved and how to go on."""


def launch(config: TrainConfig, worker: Worker = run_worker) -> Outcome:
    """Train on the cluster that this process is in, or on one started for it here; worker is what each rank runs.

    Raises:
        UserError: before anything is started, or as soon as a worker finds what only it can see.
        InterruptedRunError: after Ctrl-C, SIGTERM or SIGHUP.
        RunFailedError: the run failed more often than max_failures allows, or another driver has taken over.
        RunLostError: the cluster is gone, or Ray's controller of the run again and again.
    """
    return run(preflight.plan(config), worker)


def run(plan: Plan, worker: Worker = run_worker) -> Outcome:
    """Carry out a plan.

    Raises:
        UserError, InterruptedRunError, RunFailedError: as `launch` does.
    """
    lease = None if plan.config.eval_only else Lease(plan.folder)  # an evaluation disturbs nobody
    if lease:
        lease.wait_until_free()
    with (
        _stop_event() as stop,
        lease.held() if lease else nullcontext(),
        open_journal(lease) as journal,
        ray_output() as output,
    ):
        driver = Driver(plan, worker, stop, lease, journal, output)
        try:
            return _outcome(_train_through_losses(driver), plan.config)
        except RunFailedError:
            output.show_everything()
            raise
        except KeyboardInterrupt:
            output.expect_loss()
            raise


def _train_through_losses(driver: Driver) -> dict[str, Any]:
    """Train until the run ends, and start Ray's part of it again where that is lost; return what rank 0 returned."""
    losses = 0
    while True:
        began_s = time.monotonic()
        try:
            return _train_on_ray(driver)
        except StoppedError:
            raise InterruptedRunError("stopped before training began: the same command begins it") from None
        except ClusterLostError as lost:
            raise RunLostError(str(lost)) from None
        except ControllerLostError as lost:
            driver.journal.emit(Failure(cause="controller_lost", text=str(lost)))
            driver.ray_output.show_everything()
            driver.is_first_try = False
            losses = losses + 1 if time.monotonic() - began_s < _LONG_S else 1
            is_callers = ray.is_initialized()  # who has joined the cluster before, and may join it again
            if is_callers or driver.stop.is_set() or losses > _CONTROLLERS:
                raise RunLostError(f"Ray has failed: {lost}; the same command goes on from there") from lost
            logger.warning("Ray has failed, its part of this run is started again: %s", lost)


def _train_on_ray(driver: Driver) -> dict[str, Any]:
    """Train on a cluster until the run ends or Ray's controller of it is lost; return what rank 0 returned.

    Raises:
        UserError: a worker, or the monitor in Ray's controller, has found a mistake.
        ControllerLostError: fit failed for a reason that is not the run's.
        RunFailedError: the run is given up, or another driver has taken over. Then the workers end with this driver's
            part of the cluster, at once; where the caller had joined it before, they leave after their iteration.
    """
    config, plan = driver.config, driver.plan
    with cluster_of(plan.no_data, _job_metadata(config)) as leaves_cluster:
        may_wait = not driver.is_first_try or bool(os.environ.get(variables.RESUBMITTED))
        try:
            gpus_per_worker = wait_for_room(
                config, may_wait, driver.stop, lambda: driver.journal.emit(AttemptWaiting())
            )
        except StoppedError:
            raise InterruptedRunError("stopped while waiting for machines, nothing was begun") from None
        if driver.stop.is_set():
            raise StoppedError
        ids = _prepare_out_dir(plan, driver.lease)
        driver.journal.begin()
        driver.ray_output.log_to(_log_folder(driver) / LOG_FILE)
        logger.info("%s", plan.start.summary)
        if driver.is_first_try:
            cards = cards_of(ray.nodes()) if gpus_per_worker >= 1 else []
            if warning := memory_warning(plan.start.config, plan.start.model_args, cards):
                logger.warning("%s", warning)
            log_passed_variables(os.environ)
        job = Job.of(config, **ids, cwd=str(Path.cwd()), mailbox=open_mailbox())
        each = {"CPU": config.cpus_per_worker} | ({"GPU": gpus_per_worker} if gpus_per_worker else {})
        is_new = not may_wait and plan.start.iter_num == 0
        trainer = trainer_of(driver, job, each, leaves_cluster=leaves_cluster, is_new=is_new)
        if config.warm_spares:
            spares.prestart_first(config.max_workers, each)
        return _value_of(fit(driver, trainer, job.mailbox), driver.lease)


def _job_metadata(config: TrainConfig) -> dict[str, str]:
    """Return the keys of a run by which people tell it from others in Ray's list of jobs."""
    keys = ("out_dir", "dataset", "init_from", "max_iters", "num_workers")
    return {"program": "nanogpt-orchestrator"} | {key: str(getattr(config, key)) for key in keys}


def _value_of(result: Future[dict[str, Any]], lease: Lease | None) -> dict[str, Any]:
    """Return what rank 0 returned; raises as `_train_on_ray` does."""
    if lease and lease.check():  # whatever has become of the workers since
        raise RunFailedError(lease.cut_off)
    error = result.exception()
    why = getattr(error, "controller_failure", None)
    if isinstance(why, RunAbandonedError):
        raise RunFailedError(f"the run is given up: {why}")
    if isinstance(why, UserError):
        raise why
    if error:  # all of Ray's other failures are one to us
        raise ControllerLostError(last_line(error)) from error
    return result.result()


@contextmanager
def _stop_event() -> Iterator[threading.Event]:
    """Lend an event that the first Ctrl-C, SIGTERM or SIGHUP sets; a second Ctrl-C interrupts at once."""
    stop = threading.Event()

    def on_signal(number: int) -> None:
        if stop.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        if number == signal.SIGHUP:  # the terminal may be gone
            quiet()
        stop.set()

    is_main_thread = threading.current_thread() is threading.main_thread()  # only there can signals be caught
    with on_stop_signals(on_signal) if is_main_thread else nullcontext():
        yield stop


def _prepare_out_dir(plan: Plan, lease: Lease | None) -> dict[str, str | None]:
    """Write run.json, unless there is no lease to do so, and return the ids in it.

    run_id: the run's, the same for all its drivers; what nodes keep of it in memory is named by it.
    start_id: this driver's; by it workers know that they see the folder that the driver has prepared.

    Raises:
        ConfigError: another driver began at the same moment.
        CheckpointError: it cannot be written.
    """
    before = plan.folder.read_json(RUN_FILE)
    if lease is None:
        return {key: before.get(key) for key in ("run_id", "start_id")}
    lease.confirm()
    ids = {"run_id": before.get("run_id") or uuid.uuid4().hex, "start_id": lease.start_id}
    plan.folder.write_json(RUN_FILE, {**ids, "config": redacted(plan.config), "ray": ray.__version__})
    with suppress(UndeletableError):
        plan.folder.delete(REGISTRY_FILE)  # it may name what is gone, and Ray would not start then
    return ids


def _log_folder(driver: Driver) -> Path:
    """Return where Ray's words go: out_dir if it is a folder that this driver may write to, else Ray's own logs."""
    folder = driver.plan.folder
    return Path(folder.root) if driver.lease and folder.is_local else logs_folder()


def _outcome(value: dict[str, Any], config: TrainConfig) -> Outcome:
    if "error" in value:
        raise UserError(value["error"])
    outcome = Outcome(**value)
    if outcome.stopped:
        text = stopped_line(outcome.iter_num, config.max_iters, config.out_dir, eval_only=config.eval_only)
        raise InterruptedRunError(text)
    return outcome
