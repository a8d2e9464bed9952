"""Pretrained weights for tests: as from_pretrained's, but small and drawn at random."""

from __future__ import annotations

from typing import Any

import torch

from model import GPT, GPTConfig
from orchestrator.checkpoint.snapshot import Snapshot


def random_weights(seed: int = 1, **changes: Any) -> Snapshot:
    """Return a state at iteration 0 without an optimizer; changes: GPTConfig's arguments."""
    torch.manual_seed(seed)
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 64, "block_size": 16, "vocab_size": 5000, "bias": True}
    args = {**shape, "dropout": 0.0, "activation": "gelu_tanh", **changes}
    tensors = GPT(GPTConfig(**args)).state_dict()
    tensors.pop("lm_head.weight")  # tied to transformer.wte.weight
    return Snapshot(dict(tensors), {}, (), args, iter_num=0, best_val_loss=1e9)
