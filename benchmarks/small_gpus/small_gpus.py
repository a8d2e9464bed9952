"""What fits small GPUs: adapters beside all weights. Each part explains its figures at the head of its file."""

from __future__ import annotations

import argparse
from typing import Any

from benchmarks.small_gpus.lora import run_lora


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare this benchmark's options."""
    parser.add_argument("--steps", type=int, default=6, help="iterations of each side that are timed (default: 6)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, print and return the figures."""
    return run_lora(args.steps)


def exit_code(result: dict[str, Any]) -> int:
    """Return 1 where steps were repeated: figures of speed are for people to judge."""
    return int(result["steps_repeated"] != 0)
