"""Gpu: the Saver's two streams on its GPU, and the event of the state's last change.

A collective whose peer is gone never ends on a GPU, and everything behind it in the loop's stream waits with it. So
only the loop itself ever waits for that stream. Copies have streams of their own. They wait for the last change alone,
which was done before anything could get stuck. Knows no files and not which state it is.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from orchestrator.checkpoint.save.pinning import between_borders
from orchestrator.checkpoint.state import ScalerValues
from orchestrator.errors import CheckpointError

_ANSWER_S = 30.0  # in which a GPU that is well has copied all of a state
_POLL_S = 0.001


class Gpu:
    """Made by the loop's thread when the state is filled, before anything in its stream depends on another rank."""

    def __init__(self, device: torch.device, scaler: torch.amp.GradScaler) -> None:
        self._device, self._live_scaler = device, scaler
        # PyTorch has 32 streams of a priority and deals them out in turns, NCCL's too: so none is made per copy, and
        # they are of the priority that NCCL does not ask for.
        self._behind = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
        self._for_rescues = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
        self.note_change()

    def wait_for_step(self) -> None:
        """Wait until everything in the loop's stream is done; no wait if the loop has read the results already."""
        stream = torch.cuda.current_stream(self._device)
        if not stream.query():
            stream.synchronize()

    def note_change(self) -> None:
        """Remember this place in the loop's stream: from here on the state does not change until the next call."""
        self._changed: torch.cuda.Event = torch.cuda.current_stream(self._device).record_event()
        self._scaler = ScalerValues(self._live_scaler)

    def begin_copy(self, tensors: dict[str, Tensor], places: dict[str, memoryview]) -> torch.cuda.Event:
        """Put a copy of tensors, as they are since the last change, into a stream; return the event at its end."""
        self._behind.wait_event(self._changed)
        return self._put(self._behind, tensors, places)

    def copy_for_rescue(self, tensors: dict[str, Tensor], places: dict[str, memoryview]) -> None:
        """Copy tensors, as they are since the last change, while the loop's stream may be stuck.

        Raises:
            CheckpointError: the GPU does not answer.
        """
        _wait_a_while_for(self._changed)  # or to put something in could take for ever
        _wait_a_while_for(self._put(self._for_rescues, tensors, places))

    def scaler_for_rescue(self) -> dict[str, Any]:
        """Return the GradScaler's state since the last change; its own `state_dict` would ask the loop's stream.

        Raises:
            CheckpointError: the GPU does not answer.
        """
        self.copy_for_rescue(self._scaler.tensors, self._scaler.places)
        return self._scaler.state_dict()

    def _put(
        self, stream: torch.cuda.Stream, tensors: dict[str, Tensor], places: dict[str, memoryview]
    ) -> torch.cuda.Event:
        """Put copies into a stream, in pieces that lie within one registration; return the event at their end."""
        with torch.cuda.stream(stream):
            for name, place in places.items():
                flat, start = tensors[name].reshape(-1).view(torch.uint8), 0
                for piece in between_borders(place):
                    target = torch.frombuffer(piece, dtype=torch.uint8)
                    target.copy_(flat[start : start + len(piece)], non_blocking=True)
                    start += len(piece)
        return stream.record_event(torch.cuda.Event(blocking=True))  # type: ignore[no-untyped-call,no-any-return]


def _wait_a_while_for(event: torch.cuda.Event) -> None:
    deadline_s = time.monotonic() + _ANSWER_S
    while not event.query():  # type: ignore[no-untyped-call]
        if time.monotonic() > deadline_s:
            raise CheckpointError(f"the GPU has not answered for {_ANSWER_S:.0f} s")
        time.sleep(_POLL_S)
