"""Which variables of the driver's environment the workers of a cluster are started with. Knows no Ray and no torch.

You set `NCCL_DEBUG=INFO` where you give the command, and mean the processes that train. On a cluster Ray starts those
elsewhere and passes on next to nothing, so we pass such variables on. Those that belong to one machine stay there.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping

logger = logging.getLogger(__name__)

# What NCCL and CUDA read when they start. The user's own values win.
DEFAULTS = {
    # Who is gone is found by the controller, and who stands still by the watchdog. NCCL's own guards would abort the
    # collectives that survivors wait in: a step that is stuck would then go on, with gradients that are half summed.
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
    "TORCH_NCCL_RETHROW_CUDA_ERRORS": "0",
    # Hardware queues, of 8 by default: a rescue's copies must not stand in one behind a collective that never ends.
    "CUDA_DEVICE_MAX_CONNECTIONS": "32",
}

_PASSED = ("NCCL_", "GLOO_", "TORCH_", "TORCHINDUCTOR_", "PYTORCH_", "CUDA_", "MLFLOW_")
_PASSWORD_IN_URL = re.compile(r"://[^/]*:[^/]*@")
_OF_ONE_MACHINE = {
    "CUDA_VISIBLE_DEVICES",  # Ray gives each worker its own
    "CUDA_HOME",
    "CUDA_PATH",
    "CUDA_ROOT",
    "CUDA_BIN_PATH",
    "CUDA_INC_PATH",
    "CUDA_LIB_PATH",
    "CUDA_TOOLKIT_ROOT_DIR",
    "CUDA_MPS_PIPE_DIRECTORY",
    "CUDA_MPS_LOG_DIRECTORY",
    "TORCH_HOME",
    "TORCH_EXTENSIONS_DIR",
    "NCCL_HOSTID",  # with one for all, NCCL would take all nodes for one
    "NCCL_COMM_ID",  # an address of this machine
}
_OF_ONE_MACHINE_BEGIN = ("CUDA_PATH_V",)  # of each toolkit that is installed
_OF_ONE_MACHINE_END = ("_IFNAME",)  # network interfaces are named differently on every kind of machine
# Compiled artefacts are pickles that hold code: from a server that others write to, none is read.
_OF_SHARED_CACHES = ("REMOTE_CACHE", "REDIS")
_SECRET_WORDS = {"TOKEN", "SECRET", "PASSWORD", "PASSWD", "CREDENTIALS", "KEY"}  # Ray shows what it passes on


def passed_on(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that workers get of the driver's environment, by name."""
    return {
        name: value
        for name, value in sorted(environment.items())
        if _is_passed(name) and _is_text(value) and not _PASSWORD_IN_URL.search(value)
    }


def variables_of(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that workers are started with: ours, unless the driver's environment sets them otherwise."""
    return DEFAULTS | passed_on(environment)


def log_passed_variables(environment: Mapping[str, str]) -> None:
    """Log the variables that workers get of the driver's environment, if there are any."""
    if passed := passed_on(environment):
        listed = ", ".join(f"{name}={value}" for name, value in passed.items())
        logger.info("workers are started with this environment's %s", listed)


def _is_passed(name: str) -> bool:
    return (
        name.startswith(_PASSED)
        and name not in _OF_ONE_MACHINE
        and not name.startswith(_OF_ONE_MACHINE_BEGIN)
        and not name.endswith(_OF_ONE_MACHINE_END)
        and not any(part in name for part in _OF_SHARED_CACHES)
        and not _SECRET_WORDS & set(name.split("_"))
    )


def _is_text(value: str) -> bool:
    """Return whether Ray can pass a value on: bytes that are no UTF-8 it cannot."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
