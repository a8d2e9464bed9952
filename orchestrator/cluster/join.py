"""The cluster that a driver works on: the one that it is in, or one that is started on this machine for it."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import ray
from ray._private.grpc_utils import init_grpc_channel
from ray.job_config import JobConfig

from orchestrator.cluster import variables
from orchestrator.errors import ConfigError, DataError
from orchestrator.host.machine import usable_cpus
from orchestrator.host.signals import STOP_SIGNALS

logger = logging.getLogger(__name__)

_KNOCK_TIMEOUT_S = 10.0
_LOCAL_OBJECT_STORE_BYTES = 100 * 2**20  # nothing of ours passes through Ray's object store


class ClusterLostError(Exception):
    """A cluster that has answered before does not any more."""


class _RayInitError(Exception):
    """Ray has failed to start or to join: the error is its own."""


class StoppedError(Exception):
    """The driver was asked to stop while it waited for machines."""


@contextmanager
def cluster_of(no_data: DataError | None, metadata: dict[str, str] | None = None) -> Iterator[bool]:
    """Join the cluster that this process is in, or start one here and end it afterwards.

    Lends whether we leave the cluster at the end: not if the caller has joined it before.
    metadata: of the job that this process is there, for the cluster's list of jobs.

    Raises:
        DataError: no_data, where this machine would be the whole cluster.
        ConfigError: RAY_ADDRESS names no cluster, or one that does not answer; or none can be started here.
        StoppedError: SIGTERM came while Ray started.
    """
    if ray.is_initialized():
        yield False
        return
    address = variables.cluster_address()
    if no_data and not address:
        raise no_data
    if no_data:
        logger.warning("the dataset is not on this machine, the workers will look for it on theirs (%s)", no_data)
    with _signals_kept():
        _join(address, metadata or {}) if address else _start_cluster()
    try:
        yield True
    finally:
        _leave()


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Keep our answers to signals, and the signals from what is started meanwhile: this process tells all others.

    `timeout` sends SIGTERM to all processes of a group, systemd and Slurm to all of a control group. Processes inherit
    which signals are held back; Ray itself does so with Ctrl-C.

    Raises:
        StoppedError: by the handler of SIGTERM that Ray puts in place of ours.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    held_back = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS[1:])
    try:
        yield
    except SystemExit:
        raise StoppedError from None
    finally:
        for number, handler in caught.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, held_back)


def _join(address: str, metadata: dict[str, str]) -> None:
    """Join a cluster.

    Without an address none is joined: what runs on this machine may be the local cluster of another run, and end with
    it.

    Raises:
        ConfigError: it does not answer.
    """
    try:
        _knock(address)
        if address == "auto":
            os.environ.pop("RAY_ADDRESS")  # where Ray takes it for an address
        _init_ray(address=address, logging_level=logging.WARNING, job_config=JobConfig(metadata=metadata))
    except _RayInitError as error:
        text = f"{last_line(error)}{variables.given()}"
        raise ConfigError(f"RAY_ADDRESS={address}: the Ray cluster there cannot be joined: {text}") from None
    except (OSError, ValueError) as error:  # the latter: a name that no host can have
        if os.environ.get(variables.RESUBMITTED):  # it has answered before
            raise ClusterLostError(f"RAY_ADDRESS={address}: the cluster does not answer") from None
        raise ConfigError(
            f"RAY_ADDRESS={address}: no Ray cluster answers there ({last_line(error)}); "
            "give a running one's host:port, or unset RAY_ADDRESS to train on this machine"
        ) from None


def _knock(address: str) -> None:
    """Find out in seconds that no cluster is at host:port, where Ray would try for minutes.

    Raises:
        OSError: none is.
        ValueError: no host can have that name.
    """
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    socket.create_connection((host.strip("[]"), int(port)), timeout=_KNOCK_TIMEOUT_S).close()
    is_ready = threading.Event()
    channel = init_grpc_channel(address)
    channel.subscribe(lambda state: is_ready.set() if state.name == "READY" else None, try_to_connect=True)
    try:
        if not is_ready.wait(_KNOCK_TIMEOUT_S):
            raise ConnectionError("what listens there does not speak as one does")
    finally:
        channel.close()


def _start_cluster() -> None:
    # No dashboard runs. An actor of Train looks for one all the same, and stumbles where two runs share a machine.
    os.environ.setdefault("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:9")
    variables.check_interface()
    folder = variables.temp_dir()
    try:
        with _no_process_left_behind():
            _init_ray(
                address="local",
                num_cpus=usable_cpus(),
                include_dashboard=False,
                object_store_memory=_LOCAL_OBJECT_STORE_BYTES,
                logging_level=logging.CRITICAL,  # the error is raised below
                _temp_dir=folder,
            )
            logging.getLogger("ray").setLevel(logging.ERROR)
    except (_RayInitError, OSError, ValueError) as error:
        cause = error.__cause__ if isinstance(error, _RayInitError) else error
        text = f"{type(cause).__name__}: {last_line(error)}{variables.given()}"
        raise ConfigError(f"Ray could not be started on this machine: {text}") from None


@contextmanager
def _no_process_left_behind() -> Iterator[None]:
    """End the processes that were started meanwhile, if that fails or a signal comes."""
    before = psutil.Process().children(recursive=True)
    with ExitStack() as on_failure:
        on_failure.callback(_kill_children_but, before)
        yield
        on_failure.pop_all()


def _kill_children_but(spared: Sequence[psutil.Process]) -> None:
    for child in psutil.Process().children(recursive=True):
        if child not in spared:
            with suppress(psutil.NoSuchProcess):
                child.kill()


def _init_ray(**options: Any) -> None:
    """Call ray.init.

    Raises:
        OSError, ValueError: as Ray raises them.
        _RayInitError: for all else.
    """
    try:
        ray.init(**options)
    except (OSError, ValueError):
        raise
    except Exception as error:  # other versions, other keys, ...: Ray raises bare Exceptions here
        raise _RayInitError(str(error)) from error


def _leave() -> None:
    """Leave the cluster, and end what was started for it here. At once: it does not hear SIGTERM, which Ray would send.

    How Ray ends its processes is not public; where that has changed, it takes some seconds longer.
    """
    node = ray._private.worker._global_node
    processes = [each.process for infos in node.all_processes.values() for each in infos] if node else []
    started: list[psutil.Process] = []
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            started += psutil.Process(process.pid).children(recursive=True)
    if node:
        kill_all_processes = node.kill_all_processes
        node.kill_all_processes = lambda **options: kill_all_processes(**{**options, "allow_graceful": False})
    ray.shutdown()
    for child in started:
        with suppress(psutil.NoSuchProcess):
            child.kill()


def logs_folder() -> Path:
    """Return the folder of this machine's logs of the cluster's Ray processes, after `cluster_of` has joined it."""
    return Path(ray._private.worker._global_node.get_logs_dir_path())


def last_line(error: BaseException) -> str:
    """Return an error's last line, which says what went wrong."""
    return (str(error).strip() or type(error).__name__).splitlines()[-1]
