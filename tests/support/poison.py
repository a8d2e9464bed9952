"""Numbers gone bad at exact points: on one rank, at iterations of the data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Poison:
    """rank: where; at: the iterations whose batches make the loss bad; value: what the loss is multiplied by."""

    rank: int
    at: frozenset[int]
    value: float = float("nan")

    def __call__(self, rank: int) -> None:
        """Put it into this process: `tests.support.ranks` calls this in every rank."""
        if rank != self.rank:
            return
        from model import GPT
        from orchestrator.training import attempt

        now = {"iter": -1}
        original_iter, original_forward = attempt.data_iter, GPT.forward

        def data_iter(*args: Any) -> int:
            now["iter"] = original_iter(*args)
            return now["iter"]

        def forward(model: Any, idx: Any, targets: Any = None) -> Any:
            logits, loss = original_forward(model, idx, targets)
            if loss is not None and model.training and now["iter"] in self.at:
                loss = loss * self.value
            return logits, loss

        attempt.data_iter, GPT.forward = data_iter, forward  # type: ignore[assignment,method-assign]


@dataclass(frozen=True)
class FlippedBit:
    """A bit of one rank's weights changes when the batches of an iteration are drawn, once (marker: a file)."""

    rank: int
    at: int
    marker: str

    def __call__(self, rank: int) -> None:
        if rank != self.rank:
            return
        from pathlib import Path

        from orchestrator.training.guard import Guard

        original = Guard.judge

        def judge(guard: Any, *args: Any) -> Any:
            if guard._state.iter_num == self.at and not Path(self.marker).exists():
                Path(self.marker).touch()
                next(guard._state.model.parameters()).data.view(torch.int32)[0, 0] ^= 1 << 20
            return original(guard, *args)

        Guard.judge = judge  # type: ignore[method-assign]
