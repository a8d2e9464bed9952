"""The cluster that a driver works on: the one that it is in, or one that is started on this machine for it."""

from __future__ import annotations

import logging
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from orchestrator import resubmit
from orchestrator.config import TrainConfig
from orchestrator.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

_KNOCK_TIMEOUT_S = 10.0
_LOCAL_OBJECT_STORE_BYTES = 100 * 2**20  # nothing of ours passes through Ray's object store

# What a head is started with, here and in cluster.yaml: the room that a lost attempt leaves is found again within this;
# otherwise Ray waits longer each time, up to a second.
HEAD_SETTINGS = {
    "RAY_gcs_create_placement_group_retry_min_interval_ms": "10",
    "RAY_gcs_create_placement_group_retry_max_interval_ms": "100",
}


class ClusterLostError(Exception):
    """A cluster that has answered before does not any more."""


@contextmanager
def cluster_of(no_data: DataError | None) -> Iterator[None]:
    """Join the cluster that this process is in, or start one here and end it afterwards.

    Raises:
        DataError: no_data, where this machine would be the whole cluster.
    """
    if ray.is_initialized():
        yield
        return
    caught = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    if not _join():
        if no_data:
            raise no_data
        _start_cluster()
    elif no_data:
        logger.warning("the dataset is not on this machine, the workers will look for it on theirs (%s)", no_data)
    for number, handler in caught.items():  # Ray puts a SIGTERM handler of its own
        signal.signal(number, handler)
    try:
        yield
    finally:
        ray.shutdown()


def _join() -> bool:
    """Join the cluster at RAY_ADDRESS, which `ray job submit` sets; return whether there is one.

    Without it nothing is joined: what runs on this machine may be the local cluster of another run, and end with it.

    Raises:
        ConfigError: RAY_ADDRESS names one that does not answer.
    """
    address = os.environ.get("RAY_ADDRESS", "local")
    if address == "local":  # Ray's word for: a new one
        return False
    try:
        _knock(address)
        ray.init(address=address, logging_level=logging.WARNING)
    except OSError as error:
        if os.environ.get(resubmit.VARIABLE):  # it has answered before
            raise ClusterLostError(f"RAY_ADDRESS={address}: the cluster does not answer") from None
        raise ConfigError(
            f"RAY_ADDRESS={address}: no Ray cluster answers there ({first_line(error)}); "
            "give a running one's host:port, or unset RAY_ADDRESS to train on this machine"
        ) from None
    except RuntimeError as error:  # other versions of Ray or Python than here
        raise ConfigError(f"RAY_ADDRESS={address}: the Ray cluster there cannot be joined: {error}") from None
    return True


def _knock(address: str) -> None:
    """Find out in seconds that nobody listens at host:port, where Ray would try for minutes.

    Raises:
        OSError: nobody does.
    """
    host, _, port = address.rpartition(":")
    if host and "://" not in address and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=_KNOCK_TIMEOUT_S).close()


def _start_cluster() -> None:
    # No dashboard runs. An actor of Train looks for one all the same, and stumbles where two runs share a machine.
    os.environ.setdefault("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:9")
    for name, value in HEAD_SETTINGS.items():
        os.environ.setdefault(name, value)
    ray.init(
        address="local",
        num_cpus=os.cpu_count(),
        include_dashboard=False,
        object_store_memory=_LOCAL_OBJECT_STORE_BYTES,
        logging_level=logging.ERROR,
    )


def check_capacity(config: TrainConfig, may_wait: bool) -> float:
    """Return the GPUs of each worker, if the cluster has room for all workers.

    may_wait: it had room before, and what is missing may come back: the run waits for it.

    Raises:
        ConfigError: it has not; says what is there and what was asked.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    has_gpus = any(node.get("GPU") for node in nodes) and config.device != "cpu"
    gpus = config.gpus_per_worker if config.gpus_per_worker is not None else float(has_gpus)
    wanted = {"CPU": config.cpus_per_worker, "GPU": gpus}
    room = sum(min(int(node.get(kind, 0) / each) for kind, each in wanted.items() if each) for node in nodes)
    if room < config.min_workers:
        if may_wait:
            logger.warning(
                "the cluster has room for %d of %s workers now: waiting for machines", room, config.num_workers
            )
            return gpus
        there = {kind: sum(node.get(kind, 0) for node in nodes) for kind in wanted}
        raise ConfigError(
            f"num_workers={config.num_workers} with {config.cpus_per_worker:g} CPU and {gpus:g} GPU each is more than "
            f"the cluster can give: it has {there['CPU']:g} CPU and {there['GPU']:g} GPU on {len(nodes)} node(s), "
            f"room for {room}. Lower --num_workers, --cpus_per_worker or --gpus_per_worker, or add nodes"
        )
    return gpus


def first_line(error: BaseException) -> str:
    """Return an error's last line, which says what went wrong."""
    return (str(error).strip() or type(error).__name__).splitlines()[-1]
