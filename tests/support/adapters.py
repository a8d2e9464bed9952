"""Adapters as a run trains and saves them: beside a base model, with values that change its logits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from model import GPT, LoRAConfig
from model.lora import is_adapter
from orchestrator.checkpoint.formats.base import base_checksum, held
from orchestrator.checkpoint.snapshot import Adapters, Base, Snapshot
from orchestrator.checkpoint.state import build_state, capture
from orchestrator.checkpoint.tensor_file import checksum
from orchestrator.config import TrainConfig
from orchestrator.distributed.world import World
from tests.support.states import save_run


def trained_adapters(base: Snapshot, lora: LoRAConfig, where: Base, iter_num: int = 7) -> tuple[Snapshot, GPT]:
    """Return the state of a run that has trained adapters of a base model, and its live model in eval mode."""
    held_base = {name: held(tensor, lora.base_dtype) for name, tensor in base.model.items()}
    known = replace(where, checksum=base_checksum({name: checksum(each) for name, each in held_base.items()}))
    config = TrainConfig(device="cpu", lora_dropout=lora.dropout)
    state = build_state(config, base.model_args, World(), adapters=Adapters(replace(lora, dropout=0.0), known))
    draw = torch.Generator().manual_seed(iter_num)
    with torch.no_grad():
        for name, parameter in state.model.named_parameters():
            if is_adapter(name):
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.3)
            else:
                parameter.copy_(base.model[name])
    state.iter_num, state.config = iter_num, {**base.config, "lora_dropout": lora.dropout}
    return capture(state), state.model.eval()


def save_adapters(out_dir: Path, base: Snapshot, lora: LoRAConfig, where: Base, iter_num: int = 7) -> GPT:
    """Save such a run, and return its live model."""
    state, model = trained_adapters(base, lora, where, iter_num)
    save_run(out_dir, state)
    return model
