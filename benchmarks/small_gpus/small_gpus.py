"""What fits small GPUs: how well `orchestrator plan` foretells the memory of a step.

plan_error   the largest error of 12 configurations, each trained here on a CPU: the peak of what PyTorch's
             allocator gives out for a step, beside the plan's formulas for a CPU; at most 0.05
plan_s       `orchestrator plan` for gpt2-xl from command to exit, in seconds; at most 5
"""

from __future__ import annotations

import argparse
from typing import Any

from benchmarks.small_gpus.plan import run_plan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare this benchmark's options: none."""


def run(args: argparse.Namespace) -> dict[str, Any]:  # noqa: ARG001
    """Measure, print and return the figures."""
    return run_plan()
