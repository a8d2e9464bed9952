"""AsyncCopy: copies live tensors into host memory while a training step runs, in a thread and, on a GPU, a stream.

The tensors must not change until `join` has returned. On a GPU there is no second copy on the device: the bytes go
straight into the mapped files, which are pinned for that.
"""

from __future__ import annotations

import threading

import numpy as np
import torch
from torch import Tensor

from orchestrator.checkpoint.save.gpu import Gpu
from orchestrator.checkpoint.state import ScalerValues
from orchestrator.checkpoint.tensor_file import bytes_of

_PIECE_BYTES = 64 * 2**20


class AsyncCopy:
    """One copy of a state. The loop's thread makes and joins it, another thread runs it.

    scaler: its GradScaler's values, which are copied as well. gpu: None if the state lies in host memory.
    """

    def __init__(self, tensors: dict[str, Tensor], scaler: ScalerValues, gpu: Gpu | None) -> None:
        self._tensors, self.scaler, self._gpu = {**tensors, **scaler.tensors}, scaler, gpu
        self._is_issued = threading.Event()  # on a CPU: done; on a GPU: everything is in the stream's queue
        self._done: torch.cuda.Event | None = None

    def run(self, places: dict[str, memoryview]) -> None:
        """Copy the tensors that have a place, and wait until their bytes are there. places: key -> memory."""
        places = {**places, **self.scaler.places}
        try:
            if self._gpu:
                self._done = self._gpu.begin_copy(self._tensors, places)
            else:
                copy_tensors(self._tensors, places)
        finally:
            self.release()
        if self._done:
            self._done.synchronize()

    def release(self) -> None:
        """Let the loop go on, even if the copy has failed."""
        self._tensors = {}
        self._is_issued.set()

    def join(self) -> None:
        """Wait until the tensors may change."""
        self._is_issued.wait()
        if self._done:  # on the host, which can tell how long it takes
            self._done.synchronize()


def copy_tensors(tensors: dict[str, Tensor], places: dict[str, memoryview]) -> None:
    """Copy tensors that lie in host memory to their places."""
    for name, place in places.items():
        _copy_in_host_memory(bytes_of(tensors[name]), place)


def _copy_in_host_memory(source: memoryview, target: memoryview) -> None:
    """Copy on this thread alone, and without Python's lock: torch's copy would take the cores of the step."""
    for start in range(0, len(source), _PIECE_BYTES):
        np.copyto(
            np.frombuffer(target[start : start + _PIECE_BYTES], np.uint8),
            np.frombuffer(source[start : start + _PIECE_BYTES], np.uint8),
        )
