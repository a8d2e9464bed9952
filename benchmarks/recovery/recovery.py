"""Time from a loss to the next completed optimizer step: ours against plain Ray Train with its defaults.

    worker_kill    one of two workers gets SIGKILL
    node_crash     one of two nodes: its raylet and its worker are killed; a third node is free
    silent_node    one of two nodes is cut off the network and nobody is told; training goes on with one (elastic)
    hang           one of two workers gets SIGSTOP (ours alone: plain Ray Train waits for ever)

Both sides train the same model on the same batches, with a checkpoint every 20 iterations, each run in a new cluster on
this machine; the two take turns and medians are compared. silent_node needs root and the script of a test bed that
makes hosts of network namespaces (--hosts FILE). Every incident of ours is printed by phase.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.topics import prepare_topics
from orchestrator.config import TrainConfig
from orchestrator.telemetry.goodput import PHASES

GOALS = {"worker_kill_speedup": 4.0, "node_crash_speedup": 4.0}  # at least
SILENT_NODE_S = 15.0  # at most
CASES = ("worker_kill", "node_crash", "silent_node", "hang")
STRIKES = {"worker_kill": "worker", "node_crash": "node", "silent_node": "cut", "hang": "hang"}
HANG_TIMEOUT_S = 5.0
_STRUCK_AT, _ITERS = 300, 360
_NODES = {"worker_kill": 1, "node_crash": 3, "silent_node": 0, "hang": 1}
_TIMEOUT_S = 400.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare this benchmark's options."""
    parser.add_argument("--repeats", type=int, default=3, help="runs of each side (default: %(default)s)")
    usual = ["worker_kill", "node_crash", "hang"]
    parser.add_argument("--cases", nargs="+", choices=CASES, default=usual, help="which (default: all but silent_node)")
    parser.add_argument(
        "--hosts", type=Path, metavar="FILE", help="makes hosts: up, ray, exec, cut, down (silent_node)"
    )
    parser.add_argument("--sides", nargs="+", choices=("ours", "plain"), default=["ours", "plain"], help="which")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, print and return seconds, steps repeated and speed-ups."""
    found: dict[str, Any] = {}
    for case in args.cases:
        runs: dict[str, list[dict[str, Any]]] = {"ours": [], "plain": []}
        for _ in range(args.repeats):
            for side in args.sides:
                if side == "plain" and case in ("hang", "silent_node"):
                    continue
                result = measure(case, side, args.hosts)
                runs[side].append(result)
                print(f"{case:<12} {side:<6} {result['seconds']:7.2f} s, {result['steps_repeated']} steps repeated")
                for incident in result.get("incidents", []):
                    phases = (f"{phase} {incident[phase]:.2f}" for phase in PHASES if phase in incident)
                    print(f"{'':<12} {incident['cause']}: {', '.join(phases)}", flush=True)
        found |= summed_up(case, runs)
    for name, value in found.items():
        print(f"{name:<28} {value:8.2f}{_verdict(name, value)}")
    return found


def summed_up(case: str, runs: dict[str, list[dict[str, Any]]]) -> dict[str, float]:
    """Return a case's figures: medians, the most steps repeated, and the speed-up where both sides ran."""
    medians = {side: median(run["seconds"] for run in done) for side, done in runs.items() if done}
    figures = {f"{case}_{side}_s": seconds for side, seconds in medians.items()}
    for side, done in runs.items():
        if done:
            figures[f"{case}_{side}_repeated"] = max(run["steps_repeated"] for run in done)
    if len(medians) == 2:
        figures[f"{case}_speedup"] = medians["plain"] / medians["ours"]
    return figures


def _verdict(name: str, value: float) -> str:
    if name in GOALS:
        return f"  goal: at least {GOALS[name]:g}, {'reached' if value >= GOALS[name] else 'MISSED'}"
    if name == "silent_node_ours_s":
        return f"  goal: at most {SILENT_NODE_S:g}, {'reached' if value <= SILENT_NODE_S else 'MISSED'}"
    if name.endswith("ours_repeated"):
        return f"  goal: 0, {'reached' if value == 0 else 'MISSED'}"
    return ""


def measure(case: str, side: str, hosts: Path | None) -> dict[str, Any]:
    """Run one case on one side and return what it printed last."""
    with tempfile.TemporaryDirectory() as folder:
        config = settings(Path(folder), "1-2" if case == "silent_node" else 2)
        marker = f"{folder}/struck"
        strike = {"kind": STRIKES[case], "rank": 1, "iter_num": _STRUCK_AT, "marker": marker}
        command = command_of({"side": side, "nodes": _NODES[case], "config": asdict(config), "strike": strike})
        if case == "silent_node":
            return _with_hosts(hosts, command, Path(marker))
        done = subprocess.run(command, timeout=_TIMEOUT_S, capture_output=True, text=True, check=False)
    return last_line(done.returncode, done.stdout, done.stderr)


def command_of(case: dict[str, Any]) -> list[str]:
    """Return the command that runs a case."""
    job = json.dumps({"strike": None, "every_s": None, "for_s": None, "timed": None, **case})
    return [sys.executable, "-m", "benchmarks.recovery.one_run", job]


def last_line(code: int, out: str, err: str) -> dict[str, Any]:
    """Return what a case has printed last."""
    if code:
        raise RuntimeError(f"the run failed:\n{out[-2000:]}\n{err[-4000:]}")
    return dict(json.loads(out.splitlines()[-1]))


def _with_hosts(hosts: Path | None, command: list[str], marker: Path) -> dict[str, Any]:
    """Run on a head and two nodes with networks of their own; cut the second when the marker says so."""
    if not hosts:
        raise SystemExit("silent_node needs --hosts FILE")
    environment = {**os.environ, "RAY": str(Path(sys.executable).with_name("ray")), "RAY_AUTH_MODE": "disabled"}

    def do(*words: str) -> None:
        subprocess.run(["bash", str(hosts), *words], check=True, env=environment, timeout=120)

    do("up", "2")
    try:
        do("ray")
        driver = subprocess.Popen(
            ["bash", str(hosts), "exec", "head", *command],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        deadline_s = time.monotonic() + _TIMEOUT_S
        while not marker.exists() and driver.poll() is None and time.monotonic() < deadline_s:
            time.sleep(0.02)
        if driver.poll() is None:
            do("cut", _host_of(marker))
        out, err = driver.communicate(timeout=_TIMEOUT_S)
        return last_line(driver.returncode, out, err)
    finally:
        do("down")


def _host_of(marker: Path) -> str:
    return marker.with_suffix(".host").read_text()


def settings(folder: Path, num_workers: int | str, **changes: Any) -> TrainConfig:
    """Return a run of about 50 ms per iteration on two cores, and make its dataset."""
    prepare_topics("topics", folder)
    config = TrainConfig(
        out_dir=str(folder / "run"),
        data_dir=str(folder),
        dataset="topics",
        n_layer=4,
        n_head=4,
        n_embd=128,
        block_size=64,
        batch_size=8,
        gradient_accumulation_steps=4,
        learning_rate=1e-3,
        max_iters=_ITERS,
        lr_decay_iters=_ITERS,
        eval_interval=10**6,
        eval_iters=2,
        checkpoint_interval=20,
        num_workers=num_workers,
        hang_timeout_s=HANG_TIMEOUT_S,
        device="cpu",
        compile=False,
    )
    return replace(config, **changes)
