"""Collectives that get stuck as NCCL's do: once a peer is gone they never return, in C, and raise nothing.

What is float32 stands for what lies on a GPU: gradients, and the state that a restore sends. Votes and JSON go through
host memory on GPUs too, and fail there as they do here. `destroy_process_group` waits behind what is stuck, and what is
begun after it never runs. It all sits in `torch.distributed` itself, below whatever reduces gradients.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from orchestrator.telemetry.goodput import Incident

NAMES = (
    "all_reduce",
    "broadcast",
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_single",
    "all_to_all",
    "all_to_all_single",
    "reduce_scatter",
    "reduce_scatter_tensor",
)

UNMENDED_S = 35.0  # Ray waits 30 s until the members have left their process group, then 5 s until they have ended


class StuckWork:
    """A collective under way, like torch's Work. Its future is completed by another thread, and only if it succeeds."""

    def __init__(self, begin: Callable[[], dist.Work], result: Tensor) -> None:
        self._future: Any = torch.futures.Future()
        threading.Thread(target=self._follow, args=(begin, result), daemon=True).start()

    def _follow(self, begin: Callable[[], dist.Work], result: Tensor) -> None:
        try:
            begin().wait()
        except RuntimeError:  # a peer is gone: NCCL's kernel spins on
            return
        self._future.set_result(result)

    def wait(self) -> None:
        """Wait, in C++ and without Python's lock, for ever if need be."""
        self._future.wait()

    def get_future(self) -> Any:
        return self._future


class Stuck:
    """This process's collectives; made once, by `arm`."""

    def __init__(self) -> None:
        self._pending: list[StuckWork] = []
        self._is_ending = False
        self._originals = {name: getattr(dist, name) for name in NAMES if hasattr(dist, name)}
        for name in self._originals:
            setattr(dist, name, self._stuck(name))
        self._destroy = dist.destroy_process_group
        dist.destroy_process_group = self.destroy_process_group

    def _stuck(self, name: str) -> Callable[..., Any]:
        original = self._originals[name]

        def collective(*args: Any, async_op: bool = False, **kwargs: Any) -> Any:
            result = args[0]
            some = result[0] if isinstance(result, list) else result
            if some.dtype != torch.float32:
                return original(*args, async_op=async_op, **kwargs)
            # begun on this thread, so that all ranks begin theirs in the same order
            begun = None if self._is_ending else _begun(lambda: original(*args, async_op=True, **kwargs))
            work = StuckWork(begun or _never, result)
            self._pending = [*(each for each in self._pending if not each.get_future().done()), work]
            if async_op:
                return work
            work.wait()
            return None

        return collective

    def destroy_process_group(self, group: Any = None) -> None:
        """Wait for what is under way, then end the group, as NCCL's finalize does."""
        if group is None:
            self._is_ending = True
            for work in self._pending:
                work.wait()
        self._destroy(group)


def check_teardown(incidents: list[Incident]) -> None:
    """Check that no group was waited for until its members had left it in order, which they cannot."""
    for incident in incidents:
        assert incident.phases["rescue"] + incident.phases["tear_down"] < UNMENDED_S / 3, incident


def _begun(begin: Callable[[], dist.Work]) -> Callable[[], dist.Work]:
    try:
        work = begin()
    except RuntimeError:
        return _never
    return lambda: work


def _never() -> dist.Work:
    raise RuntimeError("never begun, or never to end")


def arm() -> None:
    """Make this process's collectives get stuck, whatever begins them."""
    Stuck()
