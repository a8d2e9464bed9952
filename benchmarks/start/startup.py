"""From the command to the first optimizer step: on a running cluster, on a fresh one, and under torchrun.

The same loop, model and number of workers in all three. `ratio` is a running cluster's time over torchrun's,
`fresh_ratio` that of a cluster which is started for the run. Phases, by the run's events: `check` until the settings
are checked and the driver begins, `cluster` until Ray has been joined and asked for workers, `place` until their
processes are there, `start` until they have met, `set_up` until model and data are there, `first_step`. Medians.
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from benchmarks.topics import prepare_topics
from orchestrator.storage.run_folder import RunFolder
from orchestrator.telemetry.metrics import read_events, read_metrics
from orchestrator.telemetry.records import AttemptPlaced, AttemptRunning, AttemptStarting, Begin, DriverStarted, Step

PHASES = {  # each lasts until this record
    "check": DriverStarted,
    "cluster": AttemptStarting,
    "place": AttemptPlaced,
    "start": AttemptRunning,
    "set_up": Begin,
    "first_step": Step,
}
SETTINGS = (
    *("--n_layer=4", "--n_head=4", "--n_embd=128", "--block_size=64", "--batch_size=8"),
    *("--gradient_accumulation_steps=2", "--max_iters=2", "--eval_interval=1000", "--eval_iters=1"),
    *("--device=cpu", "--compile=False", "--dataset=topics"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=3, help="how often each is started")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Return {running, fresh, torchrun: {total_s, phases}, ratio, fresh_ratio}."""
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"}
    train = [sys.executable, "-m", "orchestrator", "train"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    taken: dict[str, list[dict[str, float]]] = {"running": [], "fresh": [], "torchrun": []}
    with tempfile.TemporaryDirectory(prefix="startup-", ignore_cleanup_errors=True) as folder:
        Path(folder, "data").mkdir()
        prepare_topics("topics", Path(folder, "data"))
        settings = [*SETTINGS, f"--data_dir={folder}/data"]
        for number in range(args.rounds):
            out = f"--out_dir={folder}/{number}"
            plain = [*torchrun, "-m", "orchestrator.loop", *settings]
            taken["torchrun"].append(phases_of([*plain, f"{out}-torchrun"], environment))
            ours = [*train, *settings, "--num_workers=2"]
            taken["fresh"].append(phases_of([*ours, f"{out}-fresh"], environment | {"RAY_ADDRESS": "local"}))
            with running_cluster(folder, environment) as address:
                taken["running"].append(phases_of([*ours, f"{out}-running"], environment | {"RAY_ADDRESS": address}))
    result: dict[str, Any] = {name: summed_up(rounds) for name, rounds in taken.items()}
    result["ratio"] = result["running"]["total_s"] / result["torchrun"]["total_s"]
    result["fresh_ratio"] = result["fresh"]["total_s"] / result["torchrun"]["total_s"]
    show(result)
    return result


def phases_of(command: list[str], environment: dict[str, str]) -> dict[str, float]:
    """Start a run; return how long each phase took until its first step, in seconds."""
    began_s = time.time()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    out_dir = command[-1].partition("=")[2]
    stamped = [*read_events(RunFolder(out_dir)), *read_metrics(RunFolder(out_dir))]
    phases, last_s = {}, began_s
    for phase, its_type in PHASES.items():
        times = [each.time_s for each in stamped if isinstance(each.record, its_type)]
        if times:  # torchrun has no driver
            phases[phase], last_s = min(times) - last_s, min(times)
    return phases


@contextmanager
def running_cluster(folder: str, environment: dict[str, str]) -> Iterator[str]:
    """Start a head with two CPUs, as on a cluster that has been up for a while; lend its address."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    command = [
        *(str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--num-cpus=2", f"--port={port}"),
        *("--include-dashboard=false", "--object-store-memory=100000000", f"--temp-dir={folder}/ray"),
        *("--min-worker-port=0", "--max-worker-port=0"),
    ]
    variables = {"RAY_API_SERVER_ADDRESS": "http://127.0.0.1:9"}  # no dashboard runs: Ray need not wait for one
    with Path(folder, "head.log").open("w") as log:
        head = subprocess.Popen(command, env=environment | variables, stdout=log, stderr=log)
    try:
        time.sleep(20)  # its first idle processes are there by then
        assert head.poll() is None, Path(folder, "head.log").read_text()
        yield f"127.0.0.1:{port}"
    finally:
        started = psutil.Process(head.pid).children(recursive=True)
        head.kill()
        head.wait()
        for process in started:
            with suppress(psutil.NoSuchProcess):
                process.kill()


def summed_up(rounds: list[dict[str, float]]) -> dict[str, Any]:
    phases = {phase: median(each[phase] for each in rounds) for phase in PHASES if phase in rounds[0]}
    return {"total_s": median(sum(each.values()) for each in rounds), "phases": phases}


def show(result: dict[str, Any]) -> None:
    print("from the command to the first step, in seconds")
    print(f"{'':10}{'total':>8}", *(f"{phase:>11}" for phase in PHASES))
    for name in ("running", "fresh", "torchrun"):
        phases = result[name]["phases"]
        cells = (f"{phases[phase]:11.2f}" if phase in phases else f"{'':11}" for phase in PHASES)
        print(f"{name:10}{result[name]['total_s']:8.2f}", *cells)
    print(f"ratio {result['ratio']:.2f} on a running cluster, {result['fresh_ratio']:.2f} on a fresh one")
