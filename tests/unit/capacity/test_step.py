"""The formulas of a step's memory, against fake tensors: the same operations, no memory and no values.

In one thing fake tensors differ: two gradients of one weight are added up in a third tensor, real ones in place. So no
case is here in which that is the highest moment; `python -m benchmarks small_gpus` has them.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from model import GPT, GPTConfig, LoRAConfig
from model.lora import freeze
from orchestrator.capacity.gpu import gpu_memory
from orchestrator.capacity.kept import KeptTensors
from orchestrator.capacity.moments import highest
from orchestrator.capacity.shape import ModelShape, shape_of
from orchestrator.checkpoint.restore.init_from import scratch_args
from orchestrator.config import TrainConfig
from orchestrator.distributed.device import autocast
from orchestrator.distributed.flat_gradient import FlatGradient
from orchestrator.distributed.gradients import clip_gradients
from tests.support.live_bytes import LiveBytes

SMALL: dict[str, Any] = {"n_layer": 3, "n_head": 8, "n_embd": 256, "block_size": 128, "batch_size": 4}
LORA: dict[str, Any] = {"init_from": "gpt2", "bias": True, "lora_rank": 8}
XL: dict[str, Any] = {"n_layer": 48, "n_head": 25, "n_embd": 1600, "block_size": 1024, "batch_size": 1, "bias": True}
SAVING: dict[str, Any] = {"activation_checkpointing": True, "loss_chunk": 100}


def settings(**keys: Any) -> TrainConfig:
    return TrainConfig(**{"device": "cpu", "dtype": "float32", "gradient_accumulation_steps": 2, **keys})


def built(config: TrainConfig, shape: ModelShape) -> GPT:
    keys = ("n_layer", "n_head", "n_embd", "block_size", "bias", "dropout")
    model = GPT(GPTConfig(vocab_size=shape.vocab_size, **{key: getattr(config, key) for key in keys}))
    if config.lora_rank:
        lora = LoRAConfig(shape.rank, config.lora_alpha, shape.targets, config.lora_base_dtype, config.lora_dropout)
        freeze(model, lora)
        model._tie_weights()
    model.transformer.recompute, model.loss_chunk = config.activation_checkpointing, config.loss_chunk
    return model


def fake_step_bytes(config: TrainConfig, shape: ModelShape) -> int:
    """Return the most bytes of tensors in an iteration of two micro-steps, beyond those before it."""
    with FakeTensorMode(), LiveBytes() as live:
        model = built(config, shape)
        optimizer = model.configure_optimizers(0.1, 1e-4, (0.9, 0.95), "cpu")
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        gradient = FlatGradient(model)
        X, Y = (torch.zeros(config.batch_size, config.block_size, dtype=torch.int64) for _ in range(2))
        optimizer.step()  # allocates moments
        state_bytes = live.peak_bytes = live.bytes
        for _ in range(2):
            with autocast(config):
                loss = model(X, Y)[1]
            (loss * 0.5).backward()
        clip_gradients(model, optimizer, scaler, 1.0)
        optimizer.step()
        gradient.flat.zero_()
    return live.peak_bytes - state_bytes


def fake_evaluation_bytes(config: TrainConfig, shape: ModelShape) -> int:
    """Return the most bytes of tensors in an evaluation of two batches, beyond the weights."""
    with FakeTensorMode(), LiveBytes() as live, torch.no_grad():
        model = built(config, shape).eval()
        X, Y = (torch.zeros(config.batch_size, config.block_size, dtype=torch.int64) for _ in range(2))
        weights_bytes = live.peak_bytes = live.bytes
        for _ in range(2):
            with autocast(config):
                model(X, Y)
    return live.peak_bytes - weights_bytes


def error(config: TrainConfig, vocab_size: int) -> float:
    """Return by how much the formulas miss the fake tensors, as a part."""
    shape = shape_of(config, scratch_args(config, vocab_size))
    counted = (fake_evaluation_bytes if config.eval_only else fake_step_bytes)(config, shape)
    return highest(KeptTensors(config, shape, on_gpu=False)).total / counted - 1


CASES: list[tuple[int, dict[str, Any]]] = [
    (512, {}),  # the last block is the highest
    (512, {"bias": True, "dropout": 0.1}),
    (512, {"activation_checkpointing": True, "dropout": 0.1}),
    (8192, {}),  # the loss is
    (8192, {"loss_chunk": 100}),
    (2048, SAVING),
    (512, LORA),
    (512, {**LORA, "activation_checkpointing": True, "lora_dropout": 0.1}),
    (8192, {**LORA, "lora_targets": "all-linear", "loss_chunk": 100}),
    (8192, {**LORA, **SAVING, "lora_base_dtype": "bfloat16"}),
    (512, {**LORA, "lora_targets": "all-linear", "lora_dropout": 0.1, "activation_checkpointing": True}),
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("vocab_size", "keys"), CASES)
def test_the_formulas_count_what_pytorch_keeps(vocab_size: int, keys: dict[str, Any], dtype: str) -> None:
    config = settings(**SMALL, **keys, dtype=dtype)
    assert abs(error(config, vocab_size)) < 0.05


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("vocab_size", "keys"),
    [
        (512, {"dropout": 0.1}),  # a block is the highest
        (8192, {}),  # the loss is
        (8192, {"loss_chunk": 100}),
        (512, LORA),
        (8192, LORA),
        (512, {**LORA, "lora_targets": "all-linear"}),
        (8192, {**LORA, "lora_base_dtype": "bfloat16", "loss_chunk": 100}),  # the head is, in float32
    ],
)
def test_an_evaluation_keeps_nothing_for_gradients(vocab_size: int, keys: dict[str, Any], dtype: str) -> None:
    config = settings(**SMALL, **keys, dtype=dtype, eval_only=True)
    assert abs(error(config, vocab_size)) < 0.05
    items = gpu_memory(config, shape_of(config, scratch_args(config, vocab_size))).items
    assert items["gradients"] == items["AdamW's moments"] == items["lane buffers"] == 0


@pytest.mark.parametrize(
    "keys", [{}, SAVING, LORA, {**LORA, "lora_base_dtype": "bfloat16", "lora_targets": "all-linear"}]
)
@pytest.mark.slow
def test_gpt2_xl_at_full_size(keys: dict[str, Any]) -> None:
    assert abs(error(settings(**{**XL, **keys}, dtype="bfloat16"), 50257)) < 0.05


@pytest.fixture
def gpu_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropout with a mask of bytes, and attention that keeps no (T, T) matrix with dropout, as on a GPU."""
    attention = F.scaled_dot_product_attention

    def flash(*args: Any, **options: Any) -> torch.Tensor:
        return attention(*args, **{**options, "dropout_p": 0.0})

    def dropout(x: torch.Tensor, p: float, training: bool = True, inplace: bool = False) -> torch.Tensor:
        return torch.native_dropout(x, p, True)[0] if training and p and not inplace else x

    monkeypatch.setattr(F, "scaled_dot_product_attention", flash)
    monkeypatch.setattr(F, "dropout", dropout)


@pytest.mark.usefixtures("gpu_kernels")
@pytest.mark.parametrize("keys", [{}, {"activation_checkpointing": True}, {**LORA, "lora_dropout": 0.1}])
def test_dropout_on_a_gpu_keeps_bytes(keys: dict[str, Any]) -> None:
    config = settings(**SMALL, **keys, dropout=0.1, dtype="bfloat16")
    shape = shape_of(config, scratch_args(config, 512))
    counted = fake_step_bytes(config, shape)
    assert highest(KeptTensors(config, shape)).total == pytest.approx(counted, rel=0.05)


@pytest.mark.parametrize("keys", [{}, {"bias": True}, LORA, {**LORA, "lora_targets": "c_proj,c_fc"}])
def test_weights_gradients_and_moments_are_those_of_the_model(keys: dict[str, Any]) -> None:
    config = settings(**SMALL, **keys)
    shape = shape_of(config, scratch_args(config, 512))
    with torch.device("meta"):
        model = built(config, shape)
    trained = sum(each.numel() for each in model.parameters() if each.requires_grad)
    items = gpu_memory(config, shape).items
    assert items["weights"] == sum(each.nbytes for each in model.parameters())
    assert (items["gradients"], items["AdamW's moments"]) == (4 * trained, 8 * trained)


@pytest.mark.parametrize("keys", [{}, LORA])
def test_computed_operations_are_those_of_mfu(keys: dict[str, Any]) -> None:
    config = settings(**SMALL, **keys)
    shape = shape_of(config, scratch_args(config, 512))
    with torch.device("meta"):
        model = built(config, shape)
    per_sequence = model.estimate_mfu(1, dt=1.0, peak_flops=1.0)
    assert shape.flops_per_token() * config.block_size == pytest.approx(per_sequence, rel=0.02)
