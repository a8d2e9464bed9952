"""Checkpoints: the pause and slowdown of training, bandwidth, memory and restore, beside torch.save and PyTorch's DCP.

All sides take turns in one process tree, and medians are compared. Every figure is printed beside its goal:

pause_ratio            what training waits for a checkpoint in storage, over nanoGPT's torch.save to the same disk.
                       Each around the same training step, with a spare core; whatever runs behind the step is no pause
dcp_async_pause_ratio  the same for torch.distributed.checkpoint.async_save: the best of three ways of staging
slowdown               of training with states in node memory, as often as the Saver chooses, over training without
slowdown_busy          the same where training keeps all cores busy
save_bandwidth_ratio   two ranks, until the checkpoint is announced, over one torch.save. Ours waits until the disk has
                       the bytes, torch.save does not: `_synced` compares with torch.save and fsync, `_unsynced` ours
                       without any; `_direct` is straight from the live tensors instead of through node memory
load_bandwidth_ratio   two ranks, until both have the state in place and verified, over torch.load, which fills nothing.
                       From the disk; `_cached` from the page cache; `_filled` with nanoGPT's load_state_dict; `_both`
                       with that, by two processes at once, which is what nanoGPT does under torchrun
extra_memory_ratio     a generation in node memory and what the processes need besides while they save, over the state
memory_vs_s3_restore   how much faster two ranks restore from node memory than from an S3 server on this machine
read_amplification     bytes that the S3 server sent for a restore, counted by a proxy, over the state; worst of 1, 2, 4

Where a machine is a virtual one, memory that nobody uses may lie with its host, and the first use of a page costs many
times as much as copying into it does. So the same torch.save takes 0.7 to 3.9 s, by what ran before it: who goes first
in a round alternates, loads are of new processes on all sides, and the figures of a few rounds still scatter.
"""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Callable
from dataclasses import asdict
from statistics import median, quantiles
from typing import Any

import torch

from benchmarks.checkpoint.disk import disk
from benchmarks.checkpoint.pause import DCP, measure_pauses, measure_slowdown
from benchmarks.checkpoint.s3 import s3
from benchmarks.checkpoint.state import SIZES, Figures, Plan, new_folder

AT_MOST = {
    "pause_ratio": 0.02,
    "slowdown": 1.01,
    "extra_memory_ratio": 1.05,
    "read_amplification": 1.001,  # 1.0 plus headers
}
AT_LEAST = {"save_bandwidth_ratio": 1.5, "load_bandwidth_ratio": 1.5, "memory_vs_s3_restore": 5.0}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare this benchmark's options."""
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all")
    parser.add_argument("--size", choices=SIZES, default="gpt2", help="of the model (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=128, help="in a batch of one (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="of pauses, saves, restores: 2 or more (%(default)s)")
    parser.add_argument(
        "--pairs", type=int, default=12, help="of blocks with and without states (default: %(default)s)"
    )
    parser.add_argument("--out_dir", help="folder on the disk to measure (default: where temporary files go)")
    parser.add_argument("--memory_dir", default="/dev/shm", help="memory file system (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a tiny model, to see that everything works")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure the chosen parts, print every figure beside its goal and return all."""
    size, small = (SIZES["tiny"], SIZES["tiny"]) if args.quick else (SIZES[args.size], SIZES["small"])
    figures: Figures = {}
    details: dict[str, Any] = {
        "machine": {"cores": os.cpu_count(), "processor": platform.machine(), "torch": torch.__version__},
        "size": asdict(size),
        "load_average": os.getloadavg(),  # before: others on the machine show here
    }
    with new_folder(args.out_dir) as out_dir, new_folder(args.memory_dir) as memory_dir:
        plan = Plan(size, small, args.tokens, args.rounds, args.pairs, out_dir, memory_dir)
        for name in args.parts:
            found, details[name] = PARTS[name](plan)
            show(found)
            figures |= found
    return {**figures, "details": details}


def show(figures: Figures) -> None:
    """Print figures, those that have a goal with it."""
    for name, value in figures.items():
        goal = ""
        if name in AT_MOST:
            goal = f"at most {AT_MOST[name]:<6g} {'reached' if value <= AT_MOST[name] else 'MISSED'}"
        elif name in AT_LEAST:
            goal = f"at least {AT_LEAST[name]:<5g} {'reached' if value >= AT_LEAST[name] else 'MISSED'}"
        print(f"{name:<36} {value:9.4f}   {goal}".rstrip(), flush=True)


def pauses(plan: Plan) -> tuple[Figures, dict[str, Any]]:
    """Compare what training waits for."""
    found = measure_pauses(plan.size, plan.n_tokens, plan.rounds, plan.out_dir, plan.memory_dir)
    pauses_s: dict[str, list[float]] = found.pop("pauses_s")
    base_s = median(pauses_s["torch_save"])
    ratios = {side: median(taken) / base_s for side, taken in pauses_s.items()}
    p90_s = quantiles(pauses_s["ours"], n=10, method="inclusive")[-1]
    figures = {
        "pause_ratio": ratios["ours"],
        "pause_ratio_p90": p90_s / base_s,
        "pause_ratio_max": max(pauses_s["ours"]) / base_s,
        "dcp_async_pause_ratio": min(ratios[kind] for kind in DCP.kinds),
        **{f"dcp_async_pause_ratio_{kind}": ratios[kind] for kind in DCP.kinds},
        "step_while_uploading_ratio": found["step_while_uploading_s"] / found["step_s"],
    }
    medians_ms = {side: median(taken) * 1e3 for side, taken in pauses_s.items()}
    print(f"pauses in ms: {', '.join(f'{side} {ms:.1f}' for side, ms in medians_ms.items())}", end="; ")
    print(f"a step takes {found['step_s'] * 1e3:.0f}")
    return figures, {**found, "pauses_s": pauses_s, "median_pauses_ms": medians_ms}


def slowdowns(plan: Plan) -> tuple[Figures, dict[str, Any]]:
    """Compare training with and without states in node memory."""
    figures, details = {}, {}
    for name, threads in (("slowdown", max(1, (os.cpu_count() or 1) - 1)), ("slowdown_busy", os.cpu_count() or 1)):
        found = measure_slowdown(plan.size, plan.n_tokens, threads, plan.pairs, plan.out_dir / name, plan.memory_dir)
        figures[name] = found["slowdown"]
        details[name] = found
        low, high = found["slowdown_quartiles"]
        print(
            f"{name}, {threads} threads: a state every {found['interval']} steps of {found['step_s'] * 1e3:.0f} ms",
            end="",
        )
        print(f" costs {found['cost_of_a_state_s'] * 1e3:.0f} ms (quartiles of the slowdown {low:.4f} to {high:.4f})")
    return figures, details


PARTS: dict[str, Callable[[Plan], tuple[Figures, dict[str, Any]]]] = {
    "pauses": pauses,
    "slowdowns": slowdowns,
    "disk": disk,
    "s3": s3,
}
