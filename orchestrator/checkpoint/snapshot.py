"""Snapshot: one training state as named tensors and JSON values, the form in which it travels and is stored.

Nothing here knows where a snapshot is kept (`store.py`) or how other programs write theirs (`nanogpt.py`,
`huggingface.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class ParamGroup:
    """One AdamW parameter group: its hyperparameters and the names of its parameters, in optimizer order."""

    params: tuple[str, ...]
    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float


@dataclass(frozen=True)
class Snapshot:
    """nanoGPT's six (model, optimizer, model_args, iter_num, best_val_loss, config) plus the GradScaler.

    model: nanoGPT's state-dict names -> tensors, the tied `lm_head.weight` left out (it is `transformer.wte.weight`).
    optimizer: `exp_avg.<parameter>`, `exp_avg_sq.<parameter>` and `step` (float32 scalar); empty when only the
        model was read, or when nothing was stepped yet.
    param_groups: empty when only the model was read.
    val_loss: the validation loss of exactly this state, None where it was not evaluated.
    """

    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    param_groups: tuple[ParamGroup, ...]
    model_args: dict[str, Any]
    iter_num: int
    best_val_loss: float
    val_loss: float | None = None
    config: dict[str, Any] = field(default_factory=dict)
    scaler: dict[str, Any] = field(default_factory=dict)


def tensors_equal(a: Snapshot, b: Snapshot) -> bool:
    """Return whether two snapshots hold the same bits in model and optimizer."""
    return all(
        x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)
        for x, y in ((a.model, b.model), (a.optimizer, b.optimizer))
    )
