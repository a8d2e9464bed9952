"""Memory of a training step of GPT-2 124M, block 1024, with and without each saving.

    plain         batch_size=2, nothing saved
    activations   activation_checkpointing=True
    loss          loss_chunk=256
    both          both of them
    copies        both, and gradients are averaged from copies (DDP with gradient_as_bucket_view=False)
    twice         both, and gradients are averaged in place, but set to None after each step, as in nanoGPT
    ddp           both, and DDP as the loop has it: gradients are averaged in place and stay there

Each runs in a process of its own, for three steps, those with DDP of two micro-steps: gradients accumulate. What is
compared is the step's own memory: the process's peak less what weights, gradients and moments take (16 bytes per
parameter) and an empty process; of `ddp` over `copies`, and over `twice`, the peak less an empty process. `..._time` is
the fastest step's time over plain's.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

CASES = ("plain", "activations", "loss", "both", "copies", "twice", "ddp")
BATCH_SIZE, BLOCK_SIZE, STEPS, LOSS_CHUNK = 2, 1024, 3, 256
_STATE_BYTES = 16  # per parameter: weight, gradient and two moments in float32


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare this benchmark's options."""
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="default: %(default)s")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, print and return bytes, seconds and ratios."""
    # freed tensors go back to the system at once, in all cases alike: the peak is what is in use
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    found: dict[str, Any] = {}
    for case in CASES:
        command = [sys.executable, "-m", "benchmarks.model.step_memory", case, args.dtype]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        found[case] = json.loads(done.stdout.splitlines()[-1])
        size = found[case]
        print(
            f"{case:<12} peak {size['peak_bytes'] / 1e9:6.2f} GB, of the step {size['step_bytes'] / 1e9:6.2f} GB",
            end="",
        )
        print(f", {size['seconds']:6.2f} s per step", flush=True)
    plain = found["plain"]
    for case in ("activations", "loss", "both"):
        found[f"{case}_ratio"] = found[case]["step_bytes"] / plain["step_bytes"]
        found[f"{case}_time"] = found[case]["seconds"] / plain["seconds"]
        print(f"{case:<12} memory {found[f'{case}_ratio']:.2f}, time {found[f'{case}_time']:.2f}")
    for other in ("copies", "twice"):
        found[f"ddp_over_{other}"] = found["ddp"]["peak_bytes"] / found[other]["peak_bytes"]
        print(f"{'ddp':<12} memory {found[f'ddp_over_{other}']:.2f} of that of {other}")
    return found


def measure(case: str, dtype: str) -> dict[str, float]:
    """Train for a few steps in this process; return its peak, the step's part of it, and the fastest time."""
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    from model import GPT, GPTConfig
    from orchestrator.distributed.ddp import wrap
    from orchestrator.distributed.world import World

    empty_bytes = _peak_bytes()
    model = GPT(GPTConfig(block_size=BLOCK_SIZE, vocab_size=50304, dropout=0.0))
    model.transformer.recompute = case not in ("plain", "loss")
    model.loss_chunk = LOSS_CHUNK if case not in ("plain", "activations") else 0
    optimizer = model.configure_optimizers(0.1, 1e-4, (0.9, 0.95), "cpu")
    net: torch.nn.Module = model
    micro_steps = 2 if case in ("copies", "twice", "ddp") else 1
    if micro_steps > 1:
        dist.init_process_group("gloo", init_method=f"file://{tempfile.mkdtemp()}/store", rank=0, world_size=1)
        plain = partial(DistributedDataParallel, model, init_sync=False)
        net = wrap(model, World()) if case == "ddp" else plain(gradient_as_bucket_view=case == "twice")
    X = torch.randint(50257, (BATCH_SIZE, BLOCK_SIZE))
    times = []
    for _ in range(STEPS):
        Path("/proc/self/clear_refs").write_text("5")  # the peak is the last step's, with gradients and moments there
        began_s = time.perf_counter()
        for micro_step in range(micro_steps):
            if isinstance(net, DistributedDataParallel):
                net.require_backward_grad_sync = micro_step == micro_steps - 1
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
                loss = net(X, X)[1]
            loss.backward()
            del loss
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=case != "ddp")
        times.append(time.perf_counter() - began_s)
    peak_bytes = _peak_bytes() - empty_bytes
    state_bytes = _STATE_BYTES * sum(parameter.numel() for parameter in model.parameters())
    return {"peak_bytes": peak_bytes, "step_bytes": peak_bytes - state_bytes, "seconds": min(times)}


def _peak_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0])


if __name__ == "__main__":
    print(json.dumps(measure(*sys.argv[1:])))
