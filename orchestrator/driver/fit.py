"""Fit: runs Ray's trainer in a thread. Meanwhile this process shows the workers' records, and tells them to stop."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from typing import Any

import ray
from ray._private.state import state as cluster

from orchestrator.cluster.mailbox import MailboxReader
from orchestrator.cluster.ray_calls import RAY_CALL_ERRORS
from orchestrator.driver.driver import Driver
from orchestrator.driver.ray_metrics import metrics_of
from orchestrator.driver.ray_output import RayOutput
from orchestrator.driver.trainer import Trainer
from orchestrator.host.background import BackgroundQueue
from orchestrator.host.signals import STOP_SIGNALS
from orchestrator.telemetry.display import Display
from orchestrator.telemetry.records import Begin, Event, Failure, LossSeen, Note, Stamped
from orchestrator.telemetry.sinks import Sinks, sinks_of
from orchestrator.worker.failure import Cause

_LOOK_EVERY_S = 0.2
_FIT_ENDS_S = 5.0


def fit(driver: Driver, trainer: Trainer, mailbox: Any) -> Future[dict[str, Any]]:
    """Run the trainer until it ends, or until another driver has taken over; return the future of rank 0's value."""
    in_background = BackgroundQueue("fit", lambda: signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS))
    result: Future[dict[str, Any]] = in_background.submit(lambda: dict(trainer.fit().return_value))
    in_background.close()
    has_told, reader = False, MailboxReader(mailbox)
    metrics = sinks_of(lambda: metrics_of(driver, trainer))
    with _ended_with_us(result), Display(driver.config.max_iters) as display:
        while not wait([result], timeout=_LOOK_EVERY_S).done:
            if driver.lease and driver.lease.successor:
                driver.stop.set()
                break
            if driver.stop.is_set() and not has_told:
                has_told = True
                text = "stopping: the iteration is finished and saved (Ctrl-C again: stop at once)"
                display.show(Note(text=text))
            _pass_on(reader.take(driver.stop.is_set()), driver, display, metrics)
        _pass_on(reader.take(driver.stop.is_set()), driver, display, metrics)
    return result


def _pass_on(posted: list[Stamped], driver: Driver, display: Display, metrics: Sinks) -> None:
    """Keep the controller's events, show the workers' records, set Ray's metrics, and sort Ray's own words."""
    for stamped in posted:
        record = stamped.record
        if isinstance(record, LossSeen):
            driver.ray_output.expect_loss()
        elif isinstance(record, Event):
            driver.journal.emit(record, stamped.time_s)
            if isinstance(record, Failure):
                _sort_by_cause(driver.ray_output, record.cause)
        else:
            if isinstance(record, Begin):
                driver.ray_output.end_loss()
            display.show(record)
            driver.journal.observe(stamped)
        metrics.write(stamped)
    metrics.flush()
    driver.ray_output.pass_on()
    if path := driver.ray_output.log_file_to_tell():
        display.show(Note(text=f"Ray's own words about lost workers are in {path}"))


def _sort_by_cause(output: RayOutput, cause: str) -> None:
    if cause == Cause.USER_ERROR:  # its traceback is for the user
        output.show_everything()
    else:
        output.expect_loss()


@contextmanager
def _ended_with_us(fitting: Future[dict[str, Any]]) -> Iterator[None]:
    """End Ray's fit when this is interrupted: its thread would still call Ray after that has ended, which aborts us.

    Fit ends with its controller. How an actor is found is not public; where that has changed, the exit code is 1.
    """
    try:
        yield
    except KeyboardInterrupt:
        with suppress(*RAY_CALL_ERRORS, AttributeError, KeyError):
            core_worker = ray._private.worker.global_worker.core_worker
            for actor_id, actor in cluster.actor_table(None, core_worker.get_current_job_id(), "ALIVE").items():
                if actor["ActorClassName"].endswith("TrainController"):
                    core_worker.kill_actor(ray.ActorID.from_hex(actor_id), True)
        wait([fitting], timeout=_FIT_ENDS_S)
        raise
