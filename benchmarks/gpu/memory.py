"""What the acceptance asks of a GPU's memory: gradients under DDP, and a step of GPT-2 XL."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from benchmarks.gpu.child import Report, Setting
from model import GPT, GPTConfig, LoRAConfig
from orchestrator.capacity.gpu import MARGIN, gpu_memory
from orchestrator.capacity.shape import shape_of
from orchestrator.config import TrainConfig

_XL_BYTES, _XL_GB = 40e9, 34.0  # what a card needs to be asked, and what a step may take


def ddp_memory(setting: Setting, report: Report) -> None:
    """Peak of an iteration with micro-steps under DDP, beyond the weights and in their size: gradients to None or 0."""
    store = f"file://{setting.folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    torch.manual_seed(0)
    model = GPT(GPTConfig(256, 50304, 12, 12, 768, dropout=0.0)).to(setting.device)
    net = DistributedDataParallel(model, device_ids=[0], gradient_as_bucket_view=True, init_sync=False)
    X = torch.randint(50257, (1, 256), device=setting.device)
    weights_bytes = sum(p.nbytes for p in model.parameters())
    peaks = {}
    for to_none in (True, False):
        for _ in range(3):
            torch.cuda.reset_peak_memory_stats()
            for micro_step in range(4):
                net.require_backward_grad_sync = micro_step == 3
                with torch.autocast("cuda", torch.bfloat16):
                    _, loss = net(X, X)
                loss.backward()
            del loss
            net.zero_grad(set_to_none=to_none)
        peaks[to_none] = (torch.cuda.max_memory_allocated() - weights_bytes) / weights_bytes
    report.figure("to_none", peaks[True])
    report.figure("to_zero", peaks[False])
    saved = peaks[True] - peaks[False]
    text = "gradients that stay in DDP's buckets take one copy of the weights less"
    report.claim(text, 0.8 < saved < 1.2, f"{saved:.2f} times the weights")


def xl(setting: Setting, report: Report) -> None:
    """Memory and time of a step of GPT-2 XL on this GPU, plain and with both ways to save."""
    if setting.is_on_gpu and torch.cuda.get_device_properties(0).total_memory < _XL_BYTES:
        report.skip(f"needs {_XL_BYTES / 1e9:.0f} GB on the GPU")
        return
    config = GPTConfig(32, 64, 2, 2, 32) if setting.is_tiny else GPTConfig(1024, 50257, 48, 25, 1600, dropout=0.1)
    model = GPT.empty(config, setting.device)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.02)
    optimizer = model.configure_optimizers(0.1, 1e-5, (0.9, 0.95), setting.device)
    X = torch.randint(config.vocab_size, (1, config.block_size), device=setting.device)
    for name, recompute, chunk in (("plain", False, 0), ("both_savings", True, 256)):
        model.transformer.recompute, model.loss_chunk = recompute, chunk
        report.figure(name, [_step(setting, model, optimizer, X) for _ in range(3)][-1])
    if setting.is_on_gpu and not setting.is_tiny:
        peak_gb = report.figures["plain"]["peak_gb"]
        report.claim(f"a step of GPT-2 XL takes less than {_XL_GB:.0f} GB", peak_gb < _XL_GB, f"{peak_gb:.1f} GB")


def xl_adapters(setting: Setting, report: Report) -> None:
    """Memory and time of a step of GPT-2 XL that trains adapters, beside what `orchestrator plan` says of it."""
    tiny = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 32, "vocab_size": 64}
    args: dict[str, Any] = (
        tiny if setting.is_tiny else {"n_layer": 48, "n_head": 25, "n_embd": 1600, "vocab_size": 50257}
    )
    lora = LoRAConfig(8, base_dtype="bfloat16")
    model = GPT.empty(GPTConfig(**args, dropout=0.1), setting.device, lora)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.02)
    optimizer = model.configure_optimizers(0.1, 1e-5, (0.9, 0.95), setting.device)
    for name, batch_size, savings in (("plain", 1, False), ("four_sequences", 4, False), ("both_savings", 4, True)):
        model.transformer.recompute, model.loss_chunk = savings, 256 * savings
        idx = torch.randint(model.config.vocab_size, (batch_size, model.config.block_size), device=setting.device)
        report.figure(name, found := [_step(setting, model, optimizer, idx) for _ in range(3)][-1])
        config = replace(
            TrainConfig(init_from="gpt2-xl", lora_rank=8, lora_base_dtype="bfloat16", dtype="bfloat16", dropout=0.1),
            activation_checkpointing=savings,
            loss_chunk=256 * savings,
            batch_size=batch_size,
            block_size=model.config.block_size,
            gradient_accumulation_steps=1,
        )
        planned = gpu_memory(config, shape_of(config, {**args, "bias": True}))
        planned_gb = (planned.total - planned.items["CUDA (estimate)"]) / 1e9
        report.figure(f"{name}_planned_gb", planned_gb)
        if setting.is_on_gpu and not setting.is_tiny:
            holds = found["peak_gb"] < planned_gb * (1 + MARGIN)
            text = f"{name} takes no more than the plan says, and a tenth"
            report.claim(text, holds, f"{found['peak_gb']:.2f} GB, planned {planned_gb:.2f}")


def _step(setting: Setting, model: GPT, optimizer: torch.optim.Optimizer, idx: Tensor) -> dict[str, float]:
    if setting.is_on_gpu:
        torch.cuda.reset_peak_memory_stats()
    began_s = time.perf_counter()
    with torch.autocast(setting.device, torch.bfloat16):
        loss = model(idx, idx)[1]  # as in the loop: a name for the logits would keep them
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    found = {"loss": loss.item(), "step_s": time.perf_counter() - began_s}
    return found | ({"peak_gb": torch.cuda.max_memory_allocated() / 1e9} if setting.is_on_gpu else {})
