"""The state of nanoGPT's AdamW, whose parameters have numbers, to and from tensors under the parameters' names.

Source for the order: nanoGPT's GPT.configure_optimizers. Knows no files.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from orchestrator.checkpoint.formats.torch_file import TorchFile
from orchestrator.checkpoint.snapshot import MOMENTS, ParamGroup, Snapshot
from orchestrator.errors import CheckpointError

logger = logging.getLogger(__name__)

_OTHER_MATHS = {"amsgrad": False, "maximize": False, "decoupled_weight_decay": True}  # of AdamW as nanoGPT makes it
Shapes = dict[str, tuple[int, ...]]


def in_optimizer_order(shapes: Shapes) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the names of decayed parameters (matrices and embeddings) and of the others, as they are numbered."""
    decayed = tuple(name for name, shape in shapes.items() if len(shape) >= 2)
    others = tuple(name for name, shape in shapes.items() if len(shape) < 2)
    return decayed, others


def read_optimizer(
    saved: dict[str, Any] | None, model: dict[str, Tensor], source: str
) -> tuple[tuple[ParamGroup, ...], dict[str, Tensor]]:
    """Return groups and state under the parameters' names; a file without optimizer or steps gives none.

    Raises:
        CheckpointError: it is the state of another optimizer, or of other parameters.
    """
    if saved is None:
        return (), {}
    members = in_optimizer_order({name: tuple(tensor.shape) for name, tensor in model.items()})
    try:
        _check_kind(saved)
        groups = tuple(_read_group(group, names) for group, names in zip(saved["param_groups"], members, strict=True))
        ids = [i for group in saved["param_groups"] for i in group["params"]]
        kept = dict(zip((name for names in members for name in names), map(saved["state"].get, ids), strict=True))
        tensors = dict(_named_moments(kept, model)) if saved["state"] else {}
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise CheckpointError(
            f"{source}: its optimizer state is not that of nanoGPT's AdamW ({reason}). To take the weights alone: "
            "train with --init_weights_only=True, which begins at iteration 0 with new moments; export with --format=hf"
        ) from None
    return groups, tensors


def _check_kind(saved: dict[str, Any]) -> None:
    """Check that it is an AdamW's state, by what it keeps of the groups and of a parameter.

    Raises:
        ValueError: it is not.
    """
    for group in saved["param_groups"]:
        if "betas" not in group:
            raise ValueError(f"its groups have no betas, but {', '.join(sorted(group.keys() - {'params'}))}")
        for key, value in _OTHER_MATHS.items():
            if group.get(key, value) != value:
                raise ValueError(f"it has {key}={group[key]}")
    kept = set().union(*(each.keys() for each in saved["state"].values()))
    if kept - {"step", *MOMENTS} or (kept and not kept >= {"step", *MOMENTS}):
        raise ValueError(f"it keeps {', '.join(sorted(map(str, kept)))} of a parameter")
    if len(saved["param_groups"]) != 2:
        raise ValueError(f"it has {len(saved['param_groups'])} groups of parameters instead of 2: decayed and the rest")


def _read_group(group: dict[str, Any], names: tuple[str, ...]) -> ParamGroup:
    if len(group["params"]) != len(names):
        raise ValueError(f"{len(group['params'])} parameters in a group instead of {len(names)}")
    beta1, beta2 = group["betas"]
    scalars = (float(group[key]) for key in ("eps", "weight_decay"))
    return ParamGroup(names, float(group["lr"]), (float(beta1), float(beta2)), *scalars)


def _named_moments(kept: dict[str, dict[str, Any]], model: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    steps = set()
    for name, its in kept.items():
        for moment in MOMENTS:
            if its[moment].shape != model[name].shape:
                raise ValueError(f"{moment} of {name} is {tuple(its[moment].shape)}")
            yield f"{moment}.{name}", its[moment]
        steps.add(float(its["step"]))
    if len(steps) != 1:
        raise ValueError(f"parameters were stepped differently often: {sorted(steps)}")
    yield "step", torch.tensor(steps.pop(), dtype=torch.float32)


def optimizer_state(snapshot: Snapshot, shapes: Shapes, file: TorchFile, target: str) -> dict[str, Any]:
    """Return the state_dict of the AdamW that nanoGPT's configure_optimizers makes, with blanks of the file as tensors.

    Raises:
        CheckpointError: the snapshot's groups are not nanoGPT's two.
    """
    members = in_optimizer_order(shapes)
    groups, first = [], 0
    for group in _groups(snapshot, members, target):
        groups.append(_group_state(group, list(range(first, first + len(group.params))), snapshot.config))
        first += len(group.params)
    if not snapshot.optimizer and snapshot.iter_num:
        logger.warning("%s: the state has no optimizer moments; nanoGPT would resume with new ones", target)
    names = [name for group in members for name in group] if snapshot.optimizer else []
    state = {i: _parameter_state(snapshot.optimizer, name, file) for i, name in enumerate(names)}
    return {"state": state, "param_groups": groups}


def _parameter_state(optimizer: dict[str, Tensor], name: str, file: TorchFile) -> dict[str, Tensor]:
    return {
        "step": file.blank("step", optimizer["step"]),  # each parameter's own: AdamW counts them up in place
        **{moment: file.blank(f"{moment}.{name}", optimizer[f"{moment}.{name}"]) for moment in MOMENTS},
    }


def _groups(snapshot: Snapshot, members: tuple[tuple[str, ...], ...], target: str) -> list[ParamGroup]:
    """Return the snapshot's groups in nanoGPT's order, or new ones by its settings where it has none."""
    if not snapshot.param_groups:
        config = {"learning_rate": 6e-4, "beta1": 0.9, "beta2": 0.95, "weight_decay": 0.1, **snapshot.config}
        lr, betas = config["learning_rate"], (config["beta1"], config["beta2"])
        return [
            ParamGroup(members[0], lr, betas, 1e-8, config["weight_decay"]),
            ParamGroup(members[1], lr, betas, 1e-8, 0.0),
        ]
    by_members = {frozenset(group.params): group for group in snapshot.param_groups}
    try:
        return [by_members[frozenset(names)] for names in members]
    except KeyError:
        raise CheckpointError(f"{target}: the optimizer's groups are not nanoGPT's two, decayed and the rest") from None


def _group_state(group: ParamGroup, ids: list[int], config: dict[str, Any]) -> dict[str, Any]:
    """Return one entry of param_groups, with every key that the AdamW of current PyTorch writes."""
    # nanoGPT makes a fused AdamW on a GPU, and a loaded state overrides that: with None, PyTorch's GradScaler (float16)
    # would hand its scale to a kernel that refuses it.
    is_fused = str(config.get("device", "cuda")).startswith("cuda")
    return {
        "weight_decay": group.weight_decay,
        "lr": group.lr,
        "betas": tuple(group.betas),
        "eps": group.eps,
        "amsgrad": False,
        "maximize": False,
        "foreach": None,
        "capturable": False,
        "differentiable": False,
        "fused": True if is_fused else None,
        "decoupled_weight_decay": True,
        "params": ids,
    }
