"""What the acceptance asks of a GPU's memory: gradients under DDP, and a step of GPT-2 XL."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from benchmarks.gpu.child import Report, Setting
from model import GPT, GPTConfig

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


def _step(setting: Setting, model: GPT, optimizer: torch.optim.Optimizer, idx: Tensor) -> dict[str, float]:
    if setting.is_on_gpu:
        torch.cuda.reset_peak_memory_stats()
    began_s = time.perf_counter()
    with torch.autocast(setting.device, torch.bfloat16):
        _, loss = model(idx, idx)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    found = {"loss": loss.item(), "step_s": time.perf_counter() - began_s}
    return found | ({"peak_gb": torch.cuda.max_memory_allocated() / 1e9} if setting.is_on_gpu else {})
