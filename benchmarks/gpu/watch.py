"""What runs in the acceptance are looked at and ended with, from within their process."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor

from orchestrator.checkpoint.save.saver import Saver
from orchestrator.checkpoint.state import TrainState, capture
from orchestrator.training import attempt


def in_steps(should_stop: Callable[[], int]) -> Callable[[], int]:
    """Return a should_stop that is asked once per iteration: in an evaluation, which asks with every batch, it is 0."""
    return lambda: 0 if sys._getframe(1).f_code.co_name == "evaluate" else should_stop()


class StopError(Exception):
    """Ends a run from within."""


@dataclass
class Watched:
    """The state and the saver of the run that the loop trains in this process."""

    states: list[TrainState] = field(default_factory=list)
    savers: list[Saver] = field(default_factory=list)

    def tensors(self) -> dict[str, Tensor]:
        """Return copies of what the state consists of, in host memory."""
        snapshot = capture(self.states[-1])
        return {name: tensor.cpu().clone() for name, tensor in {**snapshot.model, **snapshot.optimizer}.items()}


@contextmanager
def building(note: Callable[[Callable[[], TrainState]], TrainState]) -> Iterator[None]:
    """Let the loop call `note` wherever it builds a state: with the call that builds it, and for that call's value."""
    module, name = vars(attempt), "restore_or_initialize"
    build = module[name]
    module[name] = lambda *args, **more: note(lambda: build(*args, **more))
    try:
        yield
    finally:
        module[name] = build


@contextmanager
def watching() -> Iterator[Watched]:
    """Lend the state that the loop trains meanwhile: we compare with it, bit by bit, the state that is rescued."""
    watched = Watched()

    def note(build: Callable[[], TrainState]) -> TrainState:
        watched.states.append(build())
        return watched.states[-1]

    with building(note):
        yield watched
