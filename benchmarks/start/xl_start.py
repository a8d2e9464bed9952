"""Start of a run from GPT-2 XL's weights (1,558M parameters) on local disk: ours against nanoGPT's from_pretrained.

    ours        what `train --init_from=FOLDER` does, in one process: a model that is not drawn, filled tensor by tensor
    receiving   the same with two processes, seen from the one that reads nothing
    nanogpt     transformers' GPT2LMHeadModel.from_pretrained, a second model, and the weights copied into it

The weights are random and lie in one model.safetensors of 6.2 GB, which is written first, so that all sides find it in
the page cache as far as there is room. Each side runs in a process of its own. `speedup` is nanogpt's seconds over
ours; `rss_ratio` and `receiving_rss_ratio` the peak of the resident memory, beyond that of the process before, over the
size of the weights.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

from orchestrator.storage.run_folder import RunFolder

AT_LEAST, AT_MOST = {"speedup": 3.0}, {"rss_ratio": 1.15, "receiving_rss_ratio": 1.05}
SIZES = {"xl": "gpt2-xl", "124M": "gpt2"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare this benchmark's options."""
    parser.add_argument("--size", choices=SIZES, default="xl", help="default: %(default)s")
    parser.add_argument("--folder", type=Path, help="where 6.2 GB fit for a while (default: that of temporary files)")
    parser.add_argument("--repeats", type=int, default=2, help="runs of each side (default: %(default)s)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, print and return seconds and ratios."""
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        size_bytes = write_weights(Path(folder), SIZES[args.size])
        runs: dict[str, list[dict[str, float]]] = {"ours": [], "receiving": [], "nanogpt": []}
        for _ in range(args.repeats):
            for side, done in runs.items():
                done.append(measure(side, folder))
                taken, peak = done[-1]["seconds"], done[-1]["peak_bytes"] / size_bytes
                print(f"{side:<10} {taken:6.1f} s, {peak:.3f} times the weights", flush=True)
    seconds = {side: median(each["seconds"] for each in done) for side, done in runs.items()}
    peaks = {side: max(each["peak_bytes"] for each in done) / size_bytes for side, done in runs.items()}
    found = {
        "speedup": seconds["nanogpt"] / seconds["ours"],
        "rss_ratio": peaks["ours"],
        "receiving_rss_ratio": peaks["receiving"],
        "nanogpt_rss_ratio": peaks["nanogpt"],
    }
    for name, value in found.items():
        goal = ""
        if name in AT_LEAST:
            goal = f"  goal: at least {AT_LEAST[name]:g}, {'reached' if value >= AT_LEAST[name] else 'MISSED'}"
        if name in AT_MOST:
            goal = f"  goal: at most {AT_MOST[name]:g}, {'reached' if value <= AT_MOST[name] else 'MISSED'}"
        print(f"{name:<20} {value:7.3f}{goal}")
    return {**found, "seconds": seconds, "size_bytes": size_bytes}


def write_weights(folder: Path, name: str) -> int:
    """Write config.json and model.safetensors with random weights; return the size of the weights in bytes."""
    import torch
    from safetensors.torch import save_file

    from model import GPT, GPTConfig, huggingface_config, read_pretrained_args, to_huggingface

    config = GPTConfig(**read_pretrained_args(name))
    model = GPT.empty(config)
    torch.manual_seed(1337)
    for parameter in model.parameters():
        parameter.data.uniform_(-0.03, 0.03)
    (folder / "config.json").write_text(json.dumps(huggingface_config(config)))
    save_file(to_huggingface(model.state_dict()), folder / "model.safetensors", {"format": "pt"})
    return sum(parameter.nbytes for parameter in model.parameters())


def measure(side: str, folder: str) -> dict[str, float]:
    """Run one side in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.start.xl_start", side, folder]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{side} failed:\n{done.stderr[-3000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def nanogpt(folder: str) -> dict[str, float]:
    """Start as nanoGPT's GPT.from_pretrained does."""
    import torch
    from transformers import GPT2LMHeadModel

    from model import GPT, GPTConfig, read_pretrained_args, transpose_if_linear

    before_bytes, began_s = _memory("VmRSS"), time.perf_counter()
    model = GPT(GPTConfig(**read_pretrained_args(folder)))
    theirs = GPT2LMHeadModel.from_pretrained(folder).state_dict()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.copy_(transpose_if_linear(name, theirs[name]))
    return {"seconds": time.perf_counter() - began_s, "peak_bytes": _memory("VmHWM") - before_bytes}


def ours(folder: str, rank: int = 0, world_size: int = 1, meeting: str = "") -> dict[str, float]:
    """Start as a rank of a run does; out_dir is empty, and node memory is not used."""
    import torch.distributed as dist

    from orchestrator.checkpoint.restore.restore import restore_or_initialize
    from orchestrator.checkpoint.save.node_topology import NodeTopology
    from orchestrator.checkpoint.store import CheckpointStore
    from orchestrator.config import TrainConfig
    from orchestrator.distributed.world import World

    if world_size > 1:
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world_size)
    config = TrainConfig(init_from=folder, out_dir=f"{folder}/run", device="cpu", dtype="float32")
    before_bytes, began_s = _memory("VmRSS"), time.perf_counter()
    restore_or_initialize(
        config,
        World(rank, world_size),
        CheckpointStore(RunFolder(config.out_dir)),
        NodeTopology(None, ("here",) * world_size, rank),
        {"vocab_size": 50257},  # the dataset's: GPT-2's
    )
    found = {"seconds": time.perf_counter() - began_s, "peak_bytes": float(_memory("VmHWM") - before_bytes)}
    if rank:
        print(json.dumps(found), flush=True)
    return found


def receiving(folder: str) -> None:
    """Start with two ranks; the second prints what it took."""
    with tempfile.TemporaryDirectory() as meeting:
        context = get_context("spawn")
        ranks = [context.Process(target=ours, args=(folder, rank, 2, f"{meeting}/store")) for rank in range(2)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        if any(process.exitcode for process in ranks):
            raise SystemExit("a rank has failed")


def _memory(key: str) -> int:
    return 1024 * int(re.findall(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())[0])


if __name__ == "__main__":
    if sys.argv[1] == "receiving":
        receiving(sys.argv[2])
    else:
        print(json.dumps({"ours": ours, "nanogpt": nanogpt}[sys.argv[1]](sys.argv[2])))
