"""A worker's GPU before training: whether PyTorch can use it at all, and whether its memory is free. Knows no Ray."""

from __future__ import annotations

import logging
import os
import re
import time
import warnings
from collections.abc import Callable, Sequence

import torch

logger = logging.getLogger(__name__)

_USED = 0.1  # of a GPU's memory, by others than the worker that has it for itself: at most so much,
_USED_BYTES = 10**9  # or so much, for the worker's own context counts, too
_PATIENCE_S = 20.0  # in which the memory of a killed process comes back
_LOOK_EVERY_S = 0.1
_WORTH_TELLING_S = 1.0


def fault_here(gpu_ids: Sequence[str]) -> str:
    """Return why this process cannot use the GPUs that it was given, "" where it can.

    gpu_ids: theirs, of those in CUDA_VISIBLE_DEVICES. To be called once that is set for good: CUDA reads it once.
    """
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        if not torch.cuda.is_available():
            return f"PyTorch {torch.__version__} finds none: {_why_none([str(each.message) for each in told])}"
    try:
        return _fault_of_one(gpu_ids)
    except (AssertionError, RuntimeError) as error:
        return f"PyTorch {torch.__version__} cannot use it: {_first_line(error)}"


def _why_none(told: list[str]) -> str:
    """Return PyTorch's own words: it warns the first time only, and fails in almost the same ones each time."""
    if not told:
        try:
            torch.cuda.init()  # type: ignore[no-untyped-call]
        except (AssertionError, RuntimeError) as error:  # the former: it was built without CUDA
            told = [_first_line(error)]
    return told[0].strip() if told else "no reason given"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _fault_of_one(gpu_ids: Sequence[str]) -> str:
    visible, count = os.environ.get("CUDA_VISIBLE_DEVICES"), torch.cuda.device_count()
    places = visible.split(",") if visible else [str(place) for place in range(count)]
    for gpu_id in gpu_ids:
        place = places.index(gpu_id) if gpu_id in places else count
        if place >= count:
            return f"CUDA sees {count} of the GPUs {','.join(places)}, and not GPU {gpu_id}"
        capability = torch.cuda.get_device_capability(place)
        if not has_kernels_for(capability, torch.cuda.get_arch_list()):
            name, (major, minor) = torch.cuda.get_device_name(place), capability
            return f"PyTorch {torch.__version__} has no kernels for this {name} (sm_{major}{minor})"
    return ""


def has_kernels_for(capability: tuple[int, int], architectures: Sequence[str]) -> bool:
    """Return whether a PyTorch that was built for some architectures (sm_80, compute_90, ...) runs on a GPU.

    Machine code runs on GPUs of the same major number, code that is still to be translated on all later ones.
    """
    found = [re.fullmatch(r"(sm|compute)_(\d+)(\d)[a-z]?", each) for each in architectures]
    built = [(each[1], (int(each[2]), int(each[3]))) for each in found if each]
    return not built or any(
        version <= capability and (kind == "compute" or version[0] == capability[0]) for kind, version in built
    )


def wait_until_free(
    device: torch.device,
    patience_s: float = _PATIENCE_S,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Wait until the memory of a GPU that nobody shares is free.

    A process that was killed is gone before its memory is, and a warm one takes its place at once.
    """
    began_s = clock()
    while True:
        free_bytes, total_bytes = torch.cuda.mem_get_info(device)
        waited_s = clock() - began_s
        if total_bytes - free_bytes < max(_USED * total_bytes, _USED_BYTES):
            if waited_s > _WORTH_TELLING_S:
                logger.info("waited %.1f s until the memory of %s was free", waited_s, device)
            return
        if waited_s >= patience_s:
            logger.warning(
                "%s has only %.1f of %.1f GB free after %.0f s: another process uses it, which may have been started "
                "without Ray, or was killed and cannot end (nvidia-smi lists them); training goes on with the rest",
                device,
                free_bytes / 1e9,
                total_bytes / 1e9,
                waited_s,
            )
            return
        sleep(_LOOK_EVERY_S)
