"""The plan beside what was measured: how far it is off, and how long it takes."""

from __future__ import annotations

import subprocess
import sys
import time
from typing import Any

from benchmarks.small_gpus.step import CONFIGURATIONS, measure

_PLAN = ("plan", "configs/finetune_gpt2_xl.py", "--num_workers=2-8", "--gpu=A10G")


def run_plan() -> dict[str, Any]:
    """Measure, print and return `plan_error`, the largest of all configurations, and `plan_s`, of the whole command."""
    found: dict[str, Any] = {"configurations": {}}
    print(f"{'configuration':<30} {'planned':>9} {'measured':>9} {'off by':>8}   MB of a step, beyond the state")
    for name in CONFIGURATIONS:
        measured = measure(name)
        found["configurations"][name] = {
            "planned_bytes": measured.planned_step_bytes,
            "measured_bytes": measured.step_bytes,
            "error": measured.error,
        }
        sizes = f"{measured.planned_step_bytes / 1e6:9.1f} {measured.step_bytes / 1e6:9.1f}"
        print(f"{name:<30} {sizes} {measured.error:8.2%}", flush=True)
    found["plan_error"] = max(abs(each["error"]) for each in found["configurations"].values())
    began_s = time.perf_counter()
    subprocess.run([sys.executable, "-m", "orchestrator", *_PLAN], check=True, capture_output=True)
    found["plan_s"] = time.perf_counter() - began_s
    print(f"plan_error {found['plan_error']:.4f} (at most 0.05), plan_s {found['plan_s']:.1f} (at most 5)")
    return found
