"""What fits small GPUs: how well `orchestrator plan` foretells a step's memory, and adapters beside all weights.

plan_error         the largest error of 12 configurations, each trained here on a CPU: the peak of what PyTorch's
                   allocator gives out for a step, beside the plan's formulas for a CPU; at most 0.05
plan_s             `orchestrator plan` for gpt2-xl from command to exit, in seconds; at most 5
lora_state_ratio   and the others of adapters: see lora.py
"""

from __future__ import annotations

import argparse
from typing import Any

from benchmarks.small_gpus.lora import run_lora
from benchmarks.small_gpus.plan import run_plan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare this benchmark's options."""
    parser.add_argument("--only", choices=("plan", "lora"), help="one half of the figures (default: both)")
    parser.add_argument("--steps", type=int, default=6, help="iterations of each side that are timed (default: 6)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, print and return the figures."""
    found: dict[str, Any] = {}
    if args.only != "lora":
        found |= run_plan()
    if args.only != "plan":
        found |= run_lora(args.steps)
    return found


def exit_code(result: dict[str, Any]) -> int:
    """Return 1 where steps were repeated: figures of speed are for people to judge."""
    return int(result.get("steps_repeated", 0) != 0)
