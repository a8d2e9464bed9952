"""Pinned: registers mapped files with CUDA, so that copies into them run at full speed and in the background.

To register a gigabyte takes about 0.1 s. Meanwhile other calls of this machine's processes may wait, and some kernels
refuse more than two gigabytes at once. So we register pieces that end where an address is a multiple of a gigabyte. A
copy must not cross such a border.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from functools import partial

import numpy as np
import torch

from orchestrator.host.background import BackgroundQueue

logger = logging.getLogger(__name__)

_BORDER_BYTES = 2**30
_LOOK_S = 0.05


class Pinned:
    """The registered memory of one Saver, until `unpin`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._addresses: list[int] = []
        self._is_told = False

    def pin(self, contents: list[memoryview], goes_on: Callable[[], bool] = lambda: True) -> None:
        """Register files, while goes_on says so. If some cannot be registered, warn once and go on."""
        # A call that fails leaves its error on its thread, for the next kernel there to be blamed for: this one ends.
        # And a call that is stuck behind a collective, as calls that allocate may be, keeps only that thread.
        thread = BackgroundQueue("pinning", partial(torch.cuda.set_device, self._device))
        pinning = thread.submit(partial(self._pin, contents, goes_on))
        thread.close()
        while goes_on() and not pinning.done():
            wait([pinning], timeout=_LOOK_S)
        if pinning.done():
            pinning.result()

    def unpin(self) -> None:
        """Take back every registration: memory that is unmapped before that stays pinned."""
        runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        while self._addresses:
            runtime.cudaHostUnregister(self._addresses.pop())

    def _pin(self, contents: list[memoryview], goes_on: Callable[[], bool]) -> None:
        runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        left_bytes, why = 0, 0
        for piece in (piece for content in contents for piece in between_borders(content) if goes_on()):
            if code := int(runtime.cudaHostRegister(address_of(piece), len(piece), 0)):
                left_bytes, why = left_bytes + len(piece), code
            else:
                self._addresses.append(address_of(piece))
        if left_bytes and not self._is_told:
            self._is_told = True
            told = left_bytes / 1e9, sum(map(len, contents)) / 1e9, why
            logger.warning(
                "%.2f of %.2f GB of node memory cannot be pinned (CUDA error %d): copies of the state are slower", *told
            )


def between_borders(content: memoryview) -> Iterator[memoryview]:
    """Yield a buffer in pieces, none of which lies in two registrations."""
    while content:
        size_bytes = _BORDER_BYTES - address_of(content) % _BORDER_BYTES
        yield content[:size_bytes]
        content = content[size_bytes:]


def address_of(content: memoryview) -> int:
    """Return where a buffer that is not empty lies in this process's memory."""
    return int(np.frombuffer(content, np.uint8).ctypes.data)
