"""Pace: what steps and states cost, measured while the run goes, and how often a state is affordable by that."""

from __future__ import annotations

import time
from collections import deque
from statistics import median

import torch

from orchestrator.checkpoint.save.policy import affordable_interval
from orchestrator.host.machine import usable_cpus

_STEPS = 20  # of which the median counts
_BANDWIDTH_FRACTION = 0.3  # by how much a copy on another core slows training down, which needs the same memory


class SnapshotCost:
    """Measures one rank. processes: how many ranks share the cores of this node."""

    def __init__(self, device: torch.device, processes: int) -> None:
        cores = usable_cpus()
        self._is_on_gpu = device.type == "cuda"
        self._has_spare_core = cores > processes * torch.get_num_threads()
        self._steps_s: deque[float] = deque(maxlen=_STEPS)
        self._began_s = 0.0
        self._pause_s = self._busy_s = self._cpu_s = 0.0  # of the newest state
        self._is_measured = False

    def step_begins(self) -> None:
        """Note the beginning of a training step, which `step_ended` ends."""
        self._began_s = time.perf_counter()

    def step_ended(self) -> None:
        """Note its end."""
        if self._began_s:
            self._steps_s.append(time.perf_counter() - self._began_s)

    def begins(self) -> None:
        """Note that a state is being taken: what follows is its cost."""
        self._pause_s = 0.0

    def paused(self, seconds: float) -> None:
        """Add to the time that training has waited for the newest state."""
        self._pause_s += seconds

    def copied(self, busy_s: float, cpu_s: float) -> None:
        """Note how long a state was copied behind training, and how much of a core's time that took."""
        self._busy_s, self._cpu_s = busy_s, cpu_s
        self._is_measured = True

    def interval(self) -> int:
        """Return after how many iterations the next state may be taken; 1 before anything is known."""
        if not (self._is_measured and self._steps_s):
            return 1
        return affordable_interval(self._pause_s + self._taken_s(), self._busy_s, median(self._steps_s))

    def _taken_s(self) -> float:
        """Return how much of what is done behind training is taken from it."""
        if self._is_on_gpu:
            return 0.0  # it computes elsewhere
        return _BANDWIDTH_FRACTION * self._busy_s if self._has_spare_core else self._cpu_s
