"""Guard: looks at every step's numbers before the step is taken. Knows no Ray.

    a gradient that is not finite, or a loss far above the recent ones -> the step is skipped, on all ranks alike
    max_bad_steps of them in a row                                     -> the run goes back to its last good
                                                                          checkpoint and skips that stretch of data
    weights that differ between ranks (every replica_check_interval)   -> back to where they last agreed

All ranks see the same numbers, so they decide alike without asking each other. What a decision depends on is saved with
the state: a run that is resumed decides as the undisturbed one does.
"""

from __future__ import annotations

import logging
import math
import platform
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median

import torch
import xxhash
from torch import Tensor

from orchestrator.checkpoint.rollbacks import Rollback
from orchestrator.checkpoint.state import TrainState
from orchestrator.config import TrainConfig
from orchestrator.distributed.world import World
from orchestrator.errors import UserError

logger = logging.getLogger(__name__)

_LOSSES, _ENOUGH_LOSSES = 100, 30  # of which the median counts; before there are enough, no loss is a spike
_INTEGERS = {2: torch.int16, 4: torch.int32}  # by the size of what they stand for
_TIMES_AT_ONE_PLACE = 3
_MAD_TO_SIGMA = 1.4826  # of a normal distribution; Source: Rousseeuw and Croux 1993
_LEAST_SIGMA = 1e-3  # of the median: losses that hardly scatter make no spike of a small step


@dataclass(frozen=True)
class Verdict:
    """Whether to take a step; loss: the global batch's, where spikes are looked for; why: what is bad about it."""

    loss: float | None = None
    why: str = ""

    @property
    def is_good(self) -> bool:
        return not self.why


class Guard:
    """One rank's; memory: its JSON values, which are saved with the state (skipped: how many steps were)."""

    def __init__(self, config: TrainConfig, world: World, state: TrainState, rollbacks: Sequence[Rollback]) -> None:
        self._config, self._world, self._state = config, world, state
        self._rollbacks = rollbacks
        self._checked_at = state.iter_num
        saved = {"skipped": 0, "in_a_row": 0, "losses": [], **state.guard}
        self.memory = state.guard = {**saved, "rollbacks": len(rollbacks)}

    def judge(self, norm: float, loss: float, loss_scale: float) -> Verdict:
        """Look at a step's numbers before it is taken; they are on this machine already.

        norm: the gradient's. loss: the global batch's. loss_scale: float16's, else 1.
        """
        if loss_scale > 1.0:
            return Verdict()  # float16: the scaler skips steps by itself, while it looks for its scale
        if not math.isfinite(norm):
            return Verdict(why=f"the norm of the gradient is {norm}")
        if not self._config.loss_spike_z:
            return Verdict()
        z = spike_of(loss, self.memory["losses"])
        return Verdict(loss, f"the loss is {loss:.4f}, z={z:.1f}" if z > self._config.loss_spike_z else "")

    def note(self, verdict: Verdict) -> None:
        """Remember what was decided; call it while the state changes, for this is a part of it."""
        if not verdict.is_good:
            self.memory["skipped"] += 1
            self.memory["in_a_row"] += 1
            return
        self.memory["in_a_row"] = 0
        if verdict.loss is not None:
            self.memory["losses"] = [*self.memory["losses"], verdict.loss][-_LOSSES:]

    def counts(self) -> dict[str, int]:
        """Return how many steps were skipped, in all and in a row."""
        return {key: self.memory[key] for key in ("skipped", "in_a_row")}

    def after(self, verdict: Verdict) -> Rollback | None:
        """Return how far to go back, where too many steps in a row were bad.

        Raises:
            UserError: training goes wrong at the same place whatever data it is given.
        """
        in_a_row = self.memory["in_a_row"]
        if verdict.is_good or not 0 < self._config.max_bad_steps <= in_a_row:
            return None
        iter_num, interval = self._state.iter_num, self._config.iters_per_checkpoint
        to_iter = (iter_num - in_a_row) // interval * interval  # by the settings alone: a re-run goes back as far
        return self._checked(Rollback(to_iter, iter_num - to_iter, f"{in_a_row} bad steps in a row, {verdict.why}"))

    def compare_replicas(self) -> Rollback | None:
        """Compare the weights that all ranks hold, if that is due; where they differ, return how far to go back.

        Raises:
            UserError: they do so again and again.
        """
        interval, iter_num = self._config.replica_check_interval, self._state.iter_num
        if not interval or iter_num % interval or self._world.size == 1:
            return None
        weights = {name: parameter.detach() for name, parameter in self._state.model.named_parameters()}
        slices = self._state.placement(weights, self._world.size)
        replicated = [each.tensor for each in slices if each.is_replicated(self._world.size)]
        found = self._world.gather_json([digest_of(replicated), platform.node()])
        if not (why := difference([(digest, node) for digest, node in found])):
            self._checked_at = iter_num
            return None
        return self._checked(Rollback(self._checked_at, 0, why))

    def _checked(self, rollback: Rollback) -> Rollback:
        times = 1 + sum(before.to_iter == rollback.to_iter for before in self._rollbacks)
        if times > _TIMES_AT_ONE_PLACE:
            raise UserError(
                f"{rollback.why}, after training went back to iteration {rollback.to_iter} {times - 1} times already. "
                "If losses diverge: lower --learning_rate, raise --loss_spike_z, or look at the data there; "
                "if weights differ: take that node out of the cluster"
            )
        return rollback


def spike_of(loss: float, before: Sequence[float]) -> float:
    """Return the robust z-score of a loss among those before it, 0 while they are too few."""
    if not math.isfinite(loss):
        return math.inf
    if len(before) < _ENOUGH_LOSSES:
        return 0.0
    middle = median(before)
    sigma = max(_MAD_TO_SIGMA * median(abs(each - middle) for each in before), _LEAST_SIGMA * abs(middle))
    return (loss - middle) / sigma if sigma else 0.0


def digest_of(weights: Iterable[Tensor]) -> str:
    """Return a hash of weights: of each tensor's bits added up as integers, where the tensor lies."""
    sums = [tensor.detach().view(_INTEGERS[tensor.itemsize]).sum(dtype=torch.int64) for tensor in weights]
    return xxhash.xxh3_64(torch.stack(sums).cpu().numpy().tobytes()).hexdigest() if sums else ""


def difference(found: Sequence[tuple[str, str]]) -> str:
    """Return which ranks' digests differ from what most have, "" if none; found: (digest, node) by rank."""
    counts = Counter(digest for digest, _ in found).most_common()
    if len(counts) == 1:
        return ""
    has_majority = counts[0][1] > len(found) / 2
    wrong = [rank for rank, (digest, _) in enumerate(found) if not has_majority or digest != counts[0][0]]
    named = ", ".join(f"rank {rank} on {found[rank][1]}" for rank in wrong)
    return f"the weights of {named} differ from the others'" if has_majority else f"the weights of {named} differ"
