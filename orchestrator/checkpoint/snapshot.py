"""Snapshot: one training state as named tensors and JSON values, the form in which it travels and is stored.

Knows no storage (`store.py`) and no other program's format (`formats/`).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from model import LoRAConfig

MOMENTS = ("exp_avg", "exp_avg_sq")  # that AdamW keeps of every parameter


@dataclass(frozen=True)
class ParamGroup:
    """One AdamW parameter group: its hyperparameters and the names of its parameters, in optimizer order."""

    params: tuple[str, ...]
    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float


@dataclass(frozen=True)
class Base:
    """The frozen weights beside which adapters are trained: no part of the state, but it is worth nothing without them.

    source: as init_from names it. revision: a run's checkpoint, a commit at the Hub, "" for a file or folder.
    checksum: of the weights as they are held (restore/base.py), "" where nobody has computed it.
    """

    source: str
    revision: str = ""
    checksum: str = ""


@dataclass(frozen=True)
class Adapters:
    """What a state of adapters belongs to. Its LoRAConfig has no dropout: that is the next attempt's own."""

    lora: LoRAConfig
    base: Base

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        found = asdict(self.lora)
        del found["dropout"]
        return {**found, "targets": list(self.lora.targets), "base": asdict(self.base)}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Adapters:
        """Return what such JSON values describe."""
        lora = LoRAConfig(value["rank"], value["alpha"], tuple(value["targets"]), value["base_dtype"])
        return cls(lora, Base(**value["base"]))


@dataclass(frozen=True)
class Snapshot:
    """nanoGPT's six (model, optimizer, model_args, iter_num, best_val_loss, config) plus the GradScaler.

    model: nanoGPT's state-dict names -> tensors, the tied `lm_head.weight` left out (it is `transformer.wte.weight`).
        Of a run that trains adapters, these alone (model/lora.py).
    optimizer: `exp_avg.<parameter>`, `exp_avg_sq.<parameter>` and `step` (float32 scalar); empty when only the
        model was read, or when nothing was stepped yet.
    param_groups: empty where the source has no optimizer.
    val_loss: the validation loss of exactly this state, None where it was not evaluated.
    guard: the losses and bad steps so far (training/guard.py), and how many rollbacks the state knows of.
    adapters: to which base model they belong, None where all weights are trained.
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
    guard: dict[str, Any] = field(default_factory=dict)
    adapters: Adapters | None = None


def describe(snapshot: Snapshot) -> dict[str, Any]:
    """Return everything of a snapshot but its tensors, as JSON values."""
    adapters = {"adapters": snapshot.adapters.to_json()} if snapshot.adapters else {}
    return {
        **adapters,
        "iter_num": snapshot.iter_num,
        "best_val_loss": snapshot.best_val_loss,
        "val_loss": snapshot.val_loss,
        "model_args": snapshot.model_args,
        "config": snapshot.config,
        "param_groups": [asdict(group) for group in snapshot.param_groups],
        "scaler": snapshot.scaler,
        "guard": snapshot.guard,
    }


def undescribe(description: dict[str, Any], model: dict[str, Tensor], optimizer: dict[str, Tensor]) -> Snapshot:
    """Return the snapshot of a description and tensors; other keys of the description are left out."""
    groups = tuple(
        ParamGroup(**{**group, "params": tuple(group["params"]), "betas": tuple(group["betas"])})
        for group in description["param_groups"]
    )
    plain = {
        key: description[key] for key in ("model_args", "iter_num", "best_val_loss", "val_loss", "config", "scaler")
    }
    guard = description.get("guard", {})
    found = description.get("adapters")
    adapters = Adapters.from_json(found) if found else None
    return Snapshot(model=model, optimizer=optimizer, param_groups=groups, guard=guard, adapters=adapters, **plain)


def tensors_equal(a: Snapshot, b: Snapshot) -> bool:
    """Return whether two snapshots hold the same bits in model and optimizer."""
    return all(
        x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)
        for x, y in ((a.model, b.model), (a.optimizer, b.optimizer))
    )
