"""Two runs in one report: one whose workers are killed five times, and a calm one. Their curves lie on each other.

Both runs are `orchestrator train configs/quickstart.py` on a Ray cluster of their own on this machine. Of one we kill a
worker (SIGKILL) each time it has come another sixth of its way. The exit code is 1 unless every loss and every byte of
the final weights is the same.

    python -m benchmarks loss_curves --out=docs      (the README's pictures; pip install -e '.[report]', and chromium)
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from benchmarks.browser import Browser
from benchmarks.processes import workers_of
from benchmarks.same_bits import ROOT, checksum_of, newest_checkpoint
from orchestrator.telemetry.records import Step, from_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare this benchmark's options."""
    parser.add_argument("--out", type=Path, help="write pictures of the report into this folder")
    parser.add_argument("--log", type=Path, help="write what the killed run prints here")
    parser.add_argument("--kills", type=int, default=5, help="workers to kill (default: %(default)s)")
    parser.add_argument("--max_iters", type=int, default=600, help="iterations of each run (default: %(default)s)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Train both, and return {calm, killed: iteration -> loss, kills: iterations, seconds and checksums}."""
    marks = [args.max_iters * (n + 1) // (args.kills + 1) for n in range(args.kills)]
    with tempfile.TemporaryDirectory(prefix="loss-curves-") as folder:
        command = [sys.executable, "-m", "orchestrator", "prepare", "quickstart", f"--data_dir={folder}/data"]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        killed, calm = Path(folder, "killed"), Path(folder, "calm")
        began_s = time.monotonic()
        kills = train(killed, args.max_iters, marks, args.log)
        killed_s, began_s = time.monotonic() - began_s, time.monotonic()
        train(calm, args.max_iters, [], None)
        result: dict[str, Any] = {"kills": kills, "killed_s": killed_s, "calm_s": time.monotonic() - began_s}
        for name, out_dir in (("calm", calm), ("killed", killed)):
            result[name] = losses_of(out_dir)
            result[f"{name}_checksum"] = checksum_of(newest_checkpoint(out_dir))
        if args.out:
            take_pictures(calm, killed, args.out)
    print(
        f"killed at iterations {', '.join(map(str, kills))}; {result['killed_s']:.0f} s, calm {result['calm_s']:.0f} s"
    )
    print("every loss and every byte of the final weights is the same" if is_same(result) else "THE RUNS DIFFER")
    return result


def exit_code(result: dict[str, Any]) -> int:
    return int(not is_same(result))


def is_same(result: dict[str, Any]) -> bool:
    """Return whether both runs have the same losses and weights."""
    return bool(result["calm"] == result["killed"] and result["calm_checksum"] == result["killed_checksum"])


def train(out_dir: Path, max_iters: int, marks: Sequence[int], log: Path | None) -> list[int]:
    """Train, kill a worker at each iteration of marks, and return the iterations at which it was killed."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    data, iterations = f"--data_dir={out_dir.parent}/data", f"--max_iters={max_iters}"
    flags = [data, f"--out_dir={out_dir}", iterations, f"--lr_decay_iters={max_iters}", "--log_interval=1"]
    command = [sys.executable, "-m", "orchestrator", "train", "configs/quickstart.py", *flags]
    kills, remaining = [], list(marks)
    with (log or out_dir.with_suffix(".log")).open("w") as lines:
        driver = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=lines, stderr=subprocess.STDOUT)
        while driver.poll() is None:
            time.sleep(0.05)
            done = max(losses_of(out_dir), default=0) if remaining else 0
            if remaining and done >= remaining[0] and kill_one(driver.pid):
                kills.append(done)
                remaining.pop(0)
    if driver.returncode or remaining:
        raise RuntimeError(f"a run ended with exit code {driver.returncode}, {len(remaining)} kills before its time")
    return kills


def kill_one(driver_pid: int) -> bool:
    """Kill one of a driver's workers, if there are two; the driver may be gone."""
    try:
        workers = workers_of(driver_pid)
    except psutil.NoSuchProcess:
        return False
    if len(workers) == 2:
        random.choice(workers).kill()
    return len(workers) == 2


def losses_of(out_dir: Path) -> dict[int, float]:
    """Return iteration -> loss, from metrics.jsonl; its last line may be half written."""
    try:
        lines = (out_dir / "metrics.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    except FileNotFoundError:
        return {}
    records = (from_json(json.loads(line)) for line in lines)
    return {record.iter: record.loss for record in records if isinstance(record, Step)}


def take_pictures(calm: Path, killed: Path, folder: Path) -> None:
    """Write pictures of the report of both runs: their losses, and the timeline of the killed one; light and dark."""
    command = [sys.executable, "-m", "orchestrator", "report", f"--out_dir={calm.name}", f"--compare={killed.name}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([*command, "--html=report.html"], cwd=calm.parent, env=environment, check=True)
    browser = Browser(calm.parent / "browser")
    for scheme in ("light", "dark"):
        page = browser.open(calm.parent / "report.html", width=1000, height=4000, is_dark=scheme == "dark", density=1.6)
        page.screenshot(folder / f"report_loss_{scheme}.png", "document.querySelector('#loss')")
        timeline = "[...document.querySelectorAll('.timeline')].at(-1)"
        page.screenshot(folder / f"report_timeline_{scheme}.png", timeline)
        page.close()
    browser.close()
