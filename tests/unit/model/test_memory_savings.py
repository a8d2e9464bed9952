"""Savings of memory in a training step: the loss and the gradients stay, what is kept or made gets smaller."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from model import GPT, GPTConfig
from orchestrator.checkpoint.snapshot import tensors_equal
from orchestrator.config import TrainConfig
from tests.conftest import final_state
from tests.support import ranks
from tests.support.faults import Fault

ARGS: dict[str, Any] = {"n_layer": 4, "n_head": 2, "n_embd": 16, "block_size": 32, "vocab_size": 401, "dropout": 0.1}
B, T, V = 3, 32, 401


class Made(TorchDispatchMode):
    """Remembers the largest floating-point tensor that was made."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                self.largest = max(self.largest, tensor.numel())
        return result


def step(*, recompute: bool = False, loss_chunk: int = 0, dtype: torch.dtype | None = None) -> tuple[Any, int, int]:
    """Return the loss and all gradients, the bytes kept for the backward pass, and the largest tensor's values."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**ARGS)).train()
    model.transformer.recompute, model.loss_chunk = recompute, loss_chunk
    X, Y = torch.randint(V, (B, T)), torch.randint(V, (B, T))
    Y[0, :5] = -1
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    torch.manual_seed(1)
    with Made() as made:
        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast("cpu", dtype) if dtype else nullcontext(),
        ):
            _, loss = model(X, Y)
        loss.backward()
    gradients = [loss.detach(), *(parameter.grad for parameter in model.parameters())]
    return gradients, sum(size for data, size in kept.items() if data not in weights), made.largest


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_activation_checkpointing_changes_no_bit(dtype: torch.dtype | None) -> None:
    expected, kept_before, _ = step(dtype=dtype)
    found, kept, _ = step(recompute=True, dtype=dtype)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), "with dropout, too"
    assert kept < 0.5 * kept_before


@pytest.mark.parametrize(("dtype", "tolerance"), [(None, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("loss_chunk", [1, 7, 32, 1000])
def test_a_loss_in_chunks_is_the_same_up_to_rounding(
    dtype: torch.dtype | None, tolerance: float, loss_chunk: int
) -> None:
    expected, _, _ = step(dtype=dtype)
    found, _, _ = step(loss_chunk=loss_chunk, dtype=dtype)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=10 * tolerance, atol=tolerance)


def test_the_logits_never_exist_whole() -> None:
    assert step()[2] == B * T * V
    assert step(loss_chunk=8)[2] < B * T * V / 2


def test_compiled_it_gives_the_same() -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**ARGS, "dropout": 0.0})).train()
    model.transformer.recompute, model.loss_chunk = True, 8
    X, Y = torch.randint(V, (B, T)), torch.randint(V, (B, T))
    _, plain = model(X, Y)
    _, compiled = torch.compile(model, backend="aot_eager")(X, Y)
    compiled.backward()
    torch.testing.assert_close(compiled, plain)


@pytest.mark.slow
def test_a_run_that_saves_memory_is_resumed_exactly(tiny: TrainConfig, tmp_path: Path) -> None:
    config = replace(tiny, activation_checkpointing=True, loss_chunk=5, dropout=0.1)
    undisturbed = replace(config, out_dir=str(tmp_path / "undisturbed"))
    assert ranks.train(undisturbed, 3, tmp_path / "undisturbed.log", []).is_done
    fault = Fault("forward", 11, 1, tmp_path / "fired")
    assert not ranks.train(config, 3, tmp_path / "killed.log", [fault]).is_done
    again = ranks.train(config, 3, tmp_path / "again.log", [fault])
    assert again.is_done, again.said
    assert tensors_equal(final_state(config.out_dir), final_state(undisturbed.out_dir))


def huge_pages() -> str:
    try:
        return Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    except OSError:
        return "[never]"


@pytest.mark.skipif("[never]" in huge_pages(), reason="this kernel gives no huge pages")
@pytest.mark.parametrize(
    "first", [pytest.param("import torch, orchestrator", marks=pytest.mark.slow), "import orchestrator.worker"]
)
def test_large_tensors_lie_in_huge_pages(first: str) -> None:
    program = f"""{first}
import re, torch
before = torch.zeros(1)
large = torch.zeros(64 * 2**20, dtype=torch.uint8)
print(re.findall(r"AnonHugePages: +(\\d+)", open("/proc/self/smaps_rollup").read())[0])"""
    environment = {key: value for key, value in os.environ.items() if key != "THP_MEM_ALLOC_ENABLE"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    assert int(done.stdout) > 32 * 1024
