"""TrainState: the live training state, and its passage to and from a Snapshot. Nothing else outlives a step."""

from __future__ import annotations

import logging
import math
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from model import GPT, GPTConfig
from model.lora import init_adapters
from orchestrator.checkpoint.snapshot import MOMENTS, Adapters, ParamGroup, Snapshot
from orchestrator.checkpoint.store import Checkpoint
from orchestrator.checkpoint.tensor_file import bytes_of
from orchestrator.checkpoint.tensor_slice import Placement, TensorSlice, replicate
from orchestrator.config import TrainConfig
from orchestrator.distributed.world import World
from orchestrator.errors import CheckpointError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Resumed:
    """The state of this run that filled the live one.

    is_durable: it lies in storage; else in node memory only.
    size_bytes: what was read in all; from_storage_bytes: of storage, by all ranks together.
    """

    checkpoint: Checkpoint
    is_durable: bool
    size_bytes: int
    from_storage_bytes: int
    seconds: float


@dataclass
class TrainState:
    """nanoGPT's model, optimizer, iter_num, best_val_loss and config, and the GradScaler (in use with float16 only).

    evaluated_at: the iteration whose evaluation, if one was due, is done; val_loss: its validation loss, if it was due.
    guard: the losses and bad steps so far, as JSON values (training/guard.py).
    placement: which rank holds which part of which tensor.
    adapters: to which base model they belong, where they alone are trained; the model's other weights are no state.
    """

    model: GPT
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    config: dict[str, Any]
    iter_num: int = 0
    best_val_loss: float = 1e9
    evaluated_at: int = -1
    val_loss: float | None = None
    guard: dict[str, Any] = field(default_factory=dict)
    resumed_from: Resumed | None = None
    placement: Placement = replicate
    adapters: Adapters | None = None

    @property
    def trained(self) -> dict[str, Parameter]:
        """The parameters that steps change, by name."""
        return {name: each for name, each in self.model.named_parameters() if each.requires_grad}

    @property
    def is_evaluated(self) -> bool:
        """Whether the evaluation of this iteration is done, or none is due."""
        return self.evaluated_at == self.iter_num

    @property
    def is_durable(self) -> bool:
        """Whether the state that was resumed lies in storage; once it is evaluated there, too."""
        return self.resumed_from is not None and self.resumed_from.is_durable and self.is_evaluated


class ScalerValues:
    """A GradScaler's `state_dict` that waits for no device: values on a device are copied to `places`, as tensors are.

    tensors: the values on the device, of the state that the scaler is in when this is made; places: key -> memory.
    """

    def __init__(self, scaler: torch.amp.GradScaler) -> None:
        self.tensors: dict[str, Tensor] = {}
        if scaler.is_enabled() and scaler._scale is not None and scaler._growth_tracker is not None:
            self.tensors = {"scale": scaler._scale, "_growth_tracker": scaler._growth_tracker}
            self._known = {
                "growth_factor": scaler.get_growth_factor(),
                "backoff_factor": scaler.get_backoff_factor(),
                "growth_interval": scaler.get_growth_interval(),
            }
        else:  # not in use, or nothing was scaled yet
            self._known = scaler.state_dict()
        self._copies = {name: torch.empty(t.shape, dtype=t.dtype) for name, t in self.tensors.items()}
        self.places = {name: bytes_of(copy) for name, copy in self._copies.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return the argument for `load_state_dict`, once all values are copied."""
        return {**self._known, **{name: copy.item() for name, copy in self._copies.items()}}


def build_state(
    config: TrainConfig,
    model_args: dict[str, Any],
    world: World,
    *,
    is_empty: bool = False,
    adapters: Adapters | None = None,
) -> TrainState:
    """Build the model, its optimizer and scaler; with is_empty, their values are still to be filled in.

    adapters: they are trained, and begin as new ones; the values of the base model's weights are still to be filled in.
    """
    torch.manual_seed(config.seed)
    args = GPTConfig(**model_args)
    if adapters:
        model = GPT.empty(args, world.device, replace(adapters.lora, dropout=config.lora_dropout))
        init_adapters(model)
    else:
        model = GPT.empty(args, world.device) if is_empty else GPT(args).to(world.device)
    model.transformer.recompute, model.loss_chunk = config.activation_checkpointing, config.loss_chunk
    optimizer = model.configure_optimizers(
        config.weight_decay, config.learning_rate, (config.beta1, config.beta2), world.device.type
    )
    scaler = torch.amp.GradScaler(world.device.type, enabled=config.dtype == "float16")
    return TrainState(model, optimizer, scaler, config={}, adapters=adapters)


def capture(state: TrainState, val_loss: float | None = None, scaler: dict[str, Any] | None = None) -> Snapshot:
    """Return the state as a snapshot that shares its tensors: nothing is copied, so use it before the next step.

    scaler: the GradScaler's state where the caller reads it by itself; else, with float16 on a GPU, this waits for it.
    """
    names: dict[Tensor, str] = {parameter: name for name, parameter in state.trained.items()}
    optimizer: dict[str, Tensor] = {}
    if state.optimizer.state:  # in the model's order, whatever the optimizer's own: equal states are equal files
        kept = state.optimizer.state
        optimizer = {f"{moment}.{names[p]}": kept[p][moment] for moment in MOMENTS for p in names}
        optimizer["step"] = next(iter(kept.values()))["step"]  # the same for all: every parameter is in every step
    groups = tuple(
        ParamGroup(
            params=tuple(names[parameter] for parameter in group["params"]),
            lr=float(group["lr"]),
            betas=tuple(group["betas"]),
            eps=group["eps"],
            weight_decay=group["weight_decay"],
        )
        for group in state.optimizer.param_groups
    )
    return Snapshot(
        model={name: parameter.detach() for parameter, name in names.items()},
        optimizer=optimizer,
        param_groups=groups,
        model_args=asdict(state.model.config),
        iter_num=state.iter_num,
        best_val_loss=state.best_val_loss,
        val_loss=val_loss if val_loss is not None and math.isfinite(val_loss) else None,  # JSON knows no NaN
        config=state.config,
        scaler=state.scaler.state_dict() if scaler is None else scaler,
        guard=deepcopy(state.guard),
        adapters=state.adapters,
    )


def forecast(state: TrainState) -> Snapshot:
    """Return a snapshot with the names, shapes and types, but not the values, of all that come after a step."""
    found = capture(state)
    if found.optimizer:
        return found
    moments = {f"{moment}.{name}": tensor for moment in MOMENTS for name, tensor in found.model.items()}
    return replace(found, optimizer={**moments, "step": torch.zeros((), dtype=torch.float32)})


def allocate_moments(state: TrainState, world: World) -> None:
    """Give every parameter its step count and as much of its moments as this rank holds, as AdamW's first step would.

    Their values are still to come. A moment of which this rank holds nothing is on device meta.
    """
    names = {parameter: name for name, parameter in state.trained.items()}
    coming = forecast(state)
    slices = state.placement({**coming.model, **coming.optimizer}, world.size)
    held = {each.name: each.tensor for each in slices if world.rank in each.holders}
    for group in state.optimizer.param_groups:
        on_device = group.get("fused") or group.get("capturable")
        for parameter in group["params"]:
            kept = state.optimizer.state[parameter]
            kept["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device if on_device else "cpu")
            for moment in MOMENTS:
                like = held.get(f"{moment}.{names[parameter]}", parameter.detach().to("meta"))
                kept[moment] = torch.empty_like(like, memory_format=torch.preserve_format)


def slices_to_fill(state: TrainState, names: set[str], world: World) -> list[TensorSlice]:
    """Return the slices of the live state, on all ranks, that are filled from the saved tensors of these names.

    If the optimizer's are not among them, it keeps no moments.

    Raises:
        CheckpointError: the live state has other tensors.
    """
    if "step" in names:
        allocate_moments(state, world)
    live = capture(state)
    slices = state.placement({**live.model, **live.optimizer}, world.size)
    if differing := {each.name for each in slices} ^ names:
        raise CheckpointError(f"the saved state lacks or adds tensors: {sorted(differing)[:5]}")
    return slices


def set_step_counts(state: TrainState) -> None:
    """Give every parameter the one step count that was saved for all: the first one has it."""
    steps = [kept["step"] for kept in state.optimizer.state.values()]
    for step in steps[1:]:
        step.copy_(steps[0])


def adopt(state: TrainState, saved: Snapshot, world: World) -> None:
    """Set everything but the tensors to the saved values."""
    if saved.param_groups and (changed := _adopt_groups(state.optimizer, saved.param_groups)) and world.is_main:
        logger.warning("the optimizer goes on as saved, as in nanoGPT: %s", ", ".join(changed))
    if state.scaler.is_enabled() and saved.scaler:
        state.scaler.load_state_dict(saved.scaler)
    state.iter_num, state.best_val_loss, state.guard = saved.iter_num, saved.best_val_loss, saved.guard
    state.config = saved.config  # until the loop has compared it with its own


def _adopt_groups(optimizer: torch.optim.Optimizer, groups: tuple[ParamGroup, ...]) -> list[str]:
    """Set the optimizer's hyperparameters to the saved ones, as nanoGPT's resume does; return what that changed."""
    changed = []
    for live, saved in zip(optimizer.param_groups, groups, strict=True):
        for key in ("betas", "eps", "weight_decay"):
            if live[key] != getattr(saved, key):
                changed.append(f"{key} {getattr(saved, key)} instead of {live[key]}")
                live[key] = getattr(saved, key)
    return changed
