"""Copy: live tensors into host memory behind the training step, by another thread and, on a GPU, another stream.

From the moment that it is made until `join` has returned, the tensors must not change. On a GPU no second copy is made
on the device: the bytes go straight into the mapped files, which are pinned for that.
"""

from __future__ import annotations

import logging
import threading

import numpy as np
import torch
from torch import Tensor

from orchestrator.checkpoint.files import bytes_of

logger = logging.getLogger(__name__)

_PIECE_BYTES = 64 * 2**20


class Copy:
    """One copy of a state; made and joined by the loop's thread, run by another.

    ready: on a GPU, what to wait for before reading; default: all that is in the current stream's queue.
    """

    def __init__(self, tensors: dict[str, Tensor], device: torch.device, ready: torch.cuda.Event | None = None) -> None:
        self._tensors = tensors
        self._is_issued = threading.Event()  # on a CPU: done; on a GPU: everything is in the stream's queue
        is_on_gpu = device.type == "cuda"
        self._ready = (ready or torch.cuda.current_stream(device).record_event()) if is_on_gpu else None
        self._done: torch.cuda.Event | None = None

    def run(self, places: dict[str, memoryview]) -> None:
        """Copy the tensors that have a place, and wait until their bytes are there."""
        try:
            tensors = {name: self._tensors[name] for name in places}
            if self._ready:
                self._done = _issue(tensors, places, self._ready)
            else:
                for name, tensor in tensors.items():
                    _copy_in_host_memory(bytes_of(tensor), places[name])
        finally:
            self.release()
        if self._done:
            self._done.synchronize()

    def release(self) -> None:
        """Let the loop go on, whatever has become of the copy."""
        self._tensors = {}
        self._is_issued.set()

    def join(self) -> None:
        """Let nothing that this thread does from here on change what is being copied."""
        self._is_issued.wait()
        if self._done:  # the step's kernels wait on the device, this thread does not
            torch.cuda.current_stream().wait_event(self._done)


def _issue(tensors: dict[str, Tensor], places: dict[str, memoryview], ready: torch.cuda.Event) -> torch.cuda.Event:
    device = next(tensor.device for tensor in tensors.values() if tensor.is_cuda)
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    with torch.cuda.device(device), torch.cuda.stream(stream):
        stream.wait_event(ready)
        for name, tensor in tensors.items():
            flat = tensor.reshape(-1).view(torch.uint8)
            torch.frombuffer(places[name], dtype=torch.uint8).copy_(flat, non_blocking=True)
        done: torch.cuda.Event = stream.record_event()
        return done


def _copy_in_host_memory(source: memoryview, target: memoryview) -> None:
    """Copy on this thread alone, and without Python's lock: torch's copy would take the cores of the step."""
    for start in range(0, len(source), _PIECE_BYTES):
        np.copyto(
            np.frombuffer(target[start : start + _PIECE_BYTES], np.uint8),
            np.frombuffer(source[start : start + _PIECE_BYTES], np.uint8),
        )


def pin(contents: list[memoryview]) -> None:
    """Register mapped files with CUDA, so that copies into them run at full speed and behind."""
    for content in contents:
        runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        code = runtime.cudaHostRegister(np.frombuffer(content, np.uint8).ctypes.data, len(content), 0)
        if int(code) != 0:
            logger.warning("node memory cannot be pinned (CUDA error %s): copies of the state are slower", code)
            return
