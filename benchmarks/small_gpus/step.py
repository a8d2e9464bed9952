"""One configuration: the peak of what PyTorch's allocator gives out for a run's steps, and the plan's figure.

The real step, as the loop takes it, on a CPU. The profiler reports every allocation, so the peak is exact and the same
on every machine.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from model import LoRAConfig
from model.lora import frozen_parameters
from orchestrator.capacity.gpu import gpu_memory, held_sums, lanes_of
from orchestrator.capacity.shape import shape_of, targets_of
from orchestrator.checkpoint.restore.init_from import scratch_args
from orchestrator.checkpoint.snapshot import Adapters, Base
from orchestrator.checkpoint.state import TrainState, build_state
from orchestrator.config import TrainConfig
from orchestrator.distributed.device import autocast
from orchestrator.distributed.numerics import make_deterministic
from orchestrator.distributed.parallelism import Parallelism, parallelize
from orchestrator.distributed.world import World

VOCAB_SIZE = 16384
SIZES: dict[str, Any] = {
    **{"n_layer": 6, "n_head": 8, "n_embd": 512, "block_size": 256, "batch_size": 4},
    **{"gradient_accumulation_steps": 2, "device": "cpu", "dtype": "float32", "compile": False},
}
_LORA: dict[str, Any] = {"init_from": "gpt2", "bias": True, "lora_rank": 8}
_SAVING: dict[str, Any] = {"activation_checkpointing": True, "loss_chunk": 128}
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bfloat16": {"dtype": "bfloat16"},
    "activation_checkpointing": {"activation_checkpointing": True, "bias": True},
    "loss_chunk": {"loss_chunk": 128},
    "both, bfloat16": {**_SAVING, "dtype": "bfloat16"},
    "dropout": {"dropout": 0.1, "bias": True},
    "batch_size=8": {"batch_size": 8, "dtype": "bfloat16"},
    "lanes=4": {"lanes": 4, "gradient_accumulation_steps": 4, **_SAVING},
    "LoRA": _LORA,
    "LoRA, bfloat16": {**_LORA, "dtype": "bfloat16", "lora_dropout": 0.05},
    "LoRA, both, base in bfloat16": {**_LORA, **_SAVING, "dtype": "bfloat16", "lora_base_dtype": "bfloat16"},
    "LoRA, all-linear": {**_LORA, "lora_targets": "all-linear", "activation_checkpointing": True, "loss_chunk": 128},
}


@dataclass(frozen=True)
class Measured:
    """Bytes: the highest of a step beyond weights, gradients, moments and lane buffers, and all of them."""

    step_bytes: int
    all_bytes: int
    planned_step_bytes: int
    planned_all_bytes: int

    @property
    def error(self) -> float:
        """How far the plan is off, as a part: of the step's own memory, or of all if that is worse."""
        pairs = ((self.planned_step_bytes, self.step_bytes), (self.planned_all_bytes, self.all_bytes))
        return max((planned / measured - 1 for planned, measured in pairs), key=abs)


def measure(name: str) -> Measured:
    """Train with one of CONFIGURATIONS, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.small_gpus.step", name]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return Measured(**json.loads(done.stdout.splitlines()[-1]))


def measure_here(keys: dict[str, Any]) -> Measured:
    """Train for two iterations in this process; keys: settings besides SIZES."""
    config = TrainConfig(**{**SIZES, **keys})
    make_deterministic(config)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        state = built(config)
        model = parallelize(state.model, config, World(), lanes_of(config))
        X = torch.randint(VOCAB_SIZE, (config.batch_size, config.block_size))
        for _ in range(2):
            iterate(config, state, model, X)
    all_bytes = peak_bytes(profiler)
    shape = shape_of(config, scratch_args(config, VOCAB_SIZE))
    planned = gpu_memory(config, shape, on_gpu=False)
    trained_bytes = sum(each.nbytes for each in state.trained.values())
    weights_bytes = sum(each.nbytes for each in state.model.parameters())
    state_bytes = weights_bytes + (3 + held_sums(config, 1)) * trained_bytes  # gradients and moments, lane buffers
    return Measured(all_bytes - state_bytes, all_bytes, planned.moment.total, planned.total)


def built(config: TrainConfig) -> TrainState:
    """Return a state with random weights, frozen ones too."""
    adapters = None
    if config.lora_rank:
        targets = targets_of(config.lora_targets)
        lora = LoRAConfig(config.lora_rank, config.lora_alpha, targets, config.lora_base_dtype)
        adapters = Adapters(lora, Base("random"))
    state = build_state(config, scratch_args(config, VOCAB_SIZE), World(), adapters=adapters)
    with torch.no_grad():
        for parameter in frozen_parameters(state.model.named_parameters()).values():
            parameter.normal_(0.0, 0.02)
    return state


def iterate(config: TrainConfig, state: TrainState, model: Parallelism, tokens: Tensor) -> None:
    """Take a step as the loop does."""
    for micro_step in model.micro_steps:
        with model.accumulate(micro_step):
            with autocast(config):
                loss = model(tokens, tokens)[1]
            state.scaler.scale(loss * model.weight).backward()  # type: ignore[no-untyped-call]
    model.clip(state.optimizer, state.scaler, config.grad_clip)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    model.zero_grad(state.optimizer)


def peak_bytes(profiler: profile) -> int:
    """Return the most bytes that were allocated at a time while the profiler ran."""
    assert profiler.profiler
    results = profiler.profiler.kineto_results
    assert results
    events: list[Any] = [each for each in results.events() if each.name() == "[memory]"]
    sizes: list[int] = [each.nbytes() for each in sorted(events, key=lambda each: each.start_ns())]
    return max(accumulate(sizes))


if __name__ == "__main__":
    print(json.dumps(asdict(measure_here(CONFIGURATIONS[sys.argv[1]]))))
