"""Variables that Ray reads: which cluster, which folder, which version of Ray Train. Read before Ray is imported.

Your shell may hold values that you set for other programs, or long ago. We understand them, or refuse them in a line.
Must not import Ray.
"""

from __future__ import annotations

import logging
import os
import socket
from pathlib import Path
from urllib.parse import urlsplit

from orchestrator.errors import ConfigError

logger = logging.getLogger(__name__)

_TRAIN_V2 = "RAY_TRAIN_V2_ENABLED"
_DEFAULTS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.25",  # a lost worker is noticed within this
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",  # and a node that is drained within this
    # Of a cluster that is started here. Ray's 15 leaves workers a thirtieth of a core that another program wants too.
    "RAY_worker_niceness": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths keep their meaning in workers
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Without a dashboard, as in a cluster that is started here, two of Ray's actors complain about it every second.
    "RAY_DEDUP_LOGS_SKIP_REGEX": "State API may be temporarily unavailable|'PreemptionWatcher'",
}
_SOCKET_PATH_BYTES = 107  # of an AF_UNIX address, on Linux
_SOCKET = "ray/session_2026-01-01_00-00-00_000000_0000000/sockets/plasma_store.0"
_SHORT_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm")
_ROOM_BYTES = 50 * 2**20  # for logs; Ray's object store lies elsewhere

_given: list[str] = []  # of RAY_*, by the user


def set_defaults() -> None:
    """Set what Ray reads when it is imported or started; what the user has set stays, if training can work with it."""
    _given[:] = sorted(name for name in os.environ if name.startswith("RAY_"))
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    if os.environ.get(_TRAIN_V2, "1").lower() not in ("1", "true"):
        logger.warning("%s=%s is set to 1: training needs it", _TRAIN_V2, os.environ[_TRAIN_V2])
        os.environ[_TRAIN_V2] = "1"


def given() -> str:
    """Return the names of Ray's variables that the user has set, as the end of a text; their values may be secret."""
    return f". Ray reads what this environment sets: {', '.join(_given)}" if _given else ""


def cluster_address() -> str | None:
    """Return what RAY_ADDRESS names: host:port, or "auto" for what runs on this machine; None for a new cluster here.

    Raises:
        ConfigError: it can be no cluster's address; says which form it has.
    """
    text = os.environ.get("RAY_ADDRESS", "").strip()
    if text in ("", "local"):  # Ray's word for: a new one
        return None
    if text == "auto":
        return text
    remedy = "Unset RAY_ADDRESS to train on this machine"
    if "://" in text:
        host = _host_of(text) or "HOST"
        what = {"ray": "Ray's client", "http": "Ray's dashboard", "https": "Ray's dashboard"}
        whose = what.get(text.partition("://")[0].lower(), "no cluster")
        raise ConfigError(
            f"RAY_ADDRESS={text}: that is the address of {whose}; training joins a cluster from one of its machines, "
            f"by host:port (RAY_ADDRESS={host}:6379), or is submitted to it (ray job submit). {remedy}"
        )
    host, _, port = text.rpartition(":")
    if not _is_host(host) or not _is_port(port):
        example = f"{text}:6379" if _is_host(text) and ":" not in text else "head:6379"
        raise ConfigError(
            f"RAY_ADDRESS={text}: give host:port, such as {example} (a port from 1024 to 65535), or auto. {remedy}"
        )
    return text


def _host_of(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None


def _is_host(text: str) -> bool:
    if text.startswith("[") and text.endswith("]"):  # IPv6
        text = text[1:-1]
        return bool(text) and all(char in "0123456789abcdefABCDEF:.%" for char in text)
    return bool(text) and all(char.isalnum() or char in "-._" for char in text)


def _is_port(text: str) -> bool:
    return text.isascii() and text.isdecimal() and 1024 <= int(text) <= 65535


def check_interface() -> None:
    """Check that the network interface that workers on this machine are told to meet on is here.

    Raises:
        ConfigError: GLOO_SOCKET_IFNAME names none.
    """
    name, here = os.environ.get("GLOO_SOCKET_IFNAME"), [each for _, each in socket.if_nameindex()]
    if name is not None and not set(name.split(",")) <= set(here):
        raise ConfigError(
            f"GLOO_SOCKET_IFNAME={name}: this machine has {', '.join(here)}; give one of them, or unset it"
        )


def temp_dir() -> str | None:
    """Return where Ray puts the files of a cluster that is started here; None: where it does by itself.

    Raises:
        ConfigError: nowhere on this machine is a folder for them.
    """
    variable = next((name for name in ("RAY_TMPDIR", "TMPDIR") if name in os.environ), None)
    first = os.environ[variable] if variable else _SHORT_FOLDERS[0]
    if not (why_not := _unfit(first)):
        return None
    named = f"{variable}={first}" if variable else first
    for folder in _SHORT_FOLDERS:
        for name in ("ray", f"ray-{os.getuid()}"):
            if not _unfit(folder, name):
                logger.warning("%s %s: Ray's files go to %s/%s", named, why_not, folder, name)
                return f"{folder}/{name}"
    raise ConfigError(f"{named} {why_not}, and none of {', '.join(_SHORT_FOLDERS)} fits: set RAY_TMPDIR to a folder")


def _unfit(folder: str, name: str = "ray") -> str:
    """Return why a folder is none for Ray's files, "" if it is one; name: of the folder in it."""
    if len(os.fsencode(f"{folder}/{_SOCKET}")) > _SOCKET_PATH_BYTES:
        most = _SOCKET_PATH_BYTES - len(_SOCKET) - 1
        return f"is too long for Ray's sockets, which can have {most} characters"
    path = Path(folder)
    if not path.is_absolute() or not path.is_dir():
        return "is no folder"
    if not os.access(path / name if (path / name).exists() else path, os.W_OK | os.X_OK):
        return "cannot be written"
    stat = os.statvfs(path)
    return "is full" if stat.f_bavail * stat.f_frsize < _ROOM_BYTES else ""


RESUBMITTED = "ORCHESTRATOR_RESUBMITTED"  # set where a cluster that does not answer may come back
