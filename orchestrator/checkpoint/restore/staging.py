"""Staging: host memory through which what is read goes into tensors on a GPU, on a stream of its own.

Two pinned pieces take turns: while one is being sent, the next is read. On the loop's stream it would be sent in turns
with what the ranks send each other.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import cycle

import torch
from torch import Tensor

from orchestrator.checkpoint.tensor_file import bytes_of

_PIECE_BYTES = 16 * 2**20


class Staging:
    """For one thread. ready: an event of the loop's stream, from which on the tensors are there to be filled."""

    def __init__(self, device: torch.device, ready: torch.cuda.Event) -> None:
        self._stream = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
        self._stream.wait_event(ready)
        buffers = [torch.empty(_PIECE_BYTES, dtype=torch.uint8).pin_memory() for _ in range(2)]
        self._turns = cycle([(buffer, torch.cuda.Event(blocking=True)) for buffer in buffers])  # type: ignore[no-untyped-call]

    def pieces(self, tensor: Tensor) -> Iterator[memoryview]:
        """Yield where to read the bytes of a contiguous tensor to: each is sent once the caller asks for the next."""
        flat = tensor.detach().reshape(-1).view(torch.uint8)
        for start in range(0, len(flat), _PIECE_BYTES):
            buffer, sent = next(self._turns)
            sent.synchronize()
            target = flat[start : start + _PIECE_BYTES]
            yield bytes_of(buffer)[: len(target)]
            with torch.cuda.stream(self._stream):
                target.copy_(buffer[: len(target)], non_blocking=True)
            sent.record(self._stream)

    def finish(self) -> None:
        """Wait until everything is in its place."""
        self._stream.synchronize()
