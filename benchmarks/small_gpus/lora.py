"""Adapters beside all weights: GPT-2 124M, random weights, through the real loop, in float32 on a CPU.

lora_state_ratio   bytes of a checkpoint of adapters (rank 8, c_attn) over those of one of all weights; at most 0.01
lora_step_ratio    time of an iteration that trains adapters over one that trains all weights, medians; at most 0.85.
                   Both runs live in one process and take turns, an iteration each. `..._cpu` is of processor time
lora_peak_ratio    the step's peak of a process that trains adapters, less an empty one's, over one that trains all
steps_repeated     after a worker of three is killed that train small adapters on a Ray cluster; 0

An iteration has two micro-steps of a sequence of 1,024 tokens.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.model.xl_step import write_tokens
from benchmarks.recovery.recovery import command_of, last_line, settings
from benchmarks.start.xl_start import write_weights
from orchestrator.checkpoint.store import CheckpointStore
from orchestrator.config import TrainConfig
from orchestrator.distributed.device import resolve
from orchestrator.distributed.world import World
from orchestrator.loop import train
from orchestrator.storage.run_folder import RunFolder
from orchestrator.telemetry.records import Record, Step
from orchestrator.training.attempt import Callbacks

GOALS = {"lora_state_ratio": 0.01, "lora_step_ratio": 0.85, "steps_repeated": 0}  # at most
SIDES: dict[str, dict[str, Any]] = {"full": {}, "lora": {"lora_rank": 8}}
_WARM_UP = 1  # iterations that are not timed
_KILLED_AT, _ITERS = 40, 60


def run_lora(steps: int = 6) -> dict[str, Any]:
    """Measure, print and return the figures; steps: iterations of each side that are timed."""
    with tempfile.TemporaryDirectory(prefix="small-gpus-") as name:
        folder = Path(name)
        (folder / "weights").mkdir()
        write_weights(folder / "weights", "gpt2")
        write_tokens(folder / "data" / "random")
        found = {**peaks(folder), **step_ratios(folder, steps)}
    with tempfile.TemporaryDirectory(prefix="small-gpus-") as name:
        found["steps_repeated"] = steps_repeated(Path(name))
    for name, value in found.items():
        goal = (
            f"  goal: at most {GOALS[name]:g}, {'reached' if value <= GOALS[name] else 'MISSED'}"
            if name in GOALS
            else ""
        )
        print(f"{name:<20} {value:10.4g}{goal}", flush=True)
    return found


def config_of(side: str, folder: Path, max_iters: int) -> TrainConfig:
    """Return the settings of a run that neither evaluates nor saves before its end."""
    config = TrainConfig(
        out_dir=str(folder / side),
        init_from=str(folder / "weights"),
        data_dir=str(folder / "data"),
        dataset="random",
        batch_size=1,
        gradient_accumulation_steps=2,
        learning_rate=1e-5,
        decay_lr=False,
        max_iters=max_iters,
        eval_interval=10**6,
        eval_iters=1,
        memory_dir="",
        device="cpu",
        dtype="float32",
        compile=False,
    )
    return replace(config, **SIDES[side])


# memory and bytes


def peaks(folder: Path) -> dict[str, float]:
    """Return both sides' peaks and checkpoints in bytes, and their ratios."""
    # freed tensors go back to the system at once, on both sides alike: the peak is what is in use
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    peak, state = dict[str, float](), dict[str, int]()
    for side in SIDES:
        command = [sys.executable, "-m", "benchmarks.small_gpus.lora", side, str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        peak[side] = last_line(done.returncode, done.stdout, done.stderr)["peak_bytes"]
        store = CheckpointStore(RunFolder(str(folder / side)))
        state[side] = store.select("latest").size_bytes
        store.delete_checkpoint(store.select("latest").name)
        print(f"{side}: peak {peak[side] / 1e9:.2f} GB, checkpoint {state[side] / 1e6:.2f} MB", flush=True)
    return {
        **{f"{side}_peak_bytes": value for side, value in peak.items()},
        **{f"{side}_state_bytes": value for side, value in state.items()},
        "lora_peak_ratio": peak["lora"] / peak["full"],
        "lora_state_ratio": state["lora"] / state["full"],
    }


def measure_peak(side: str, folder: Path) -> dict[str, int]:
    """Train for three iterations in this process; return the peak of the later ones, beyond an empty process."""
    empty_bytes, peak_bytes = _peak_bytes(), 0

    def record(each: Record) -> None:
        nonlocal peak_bytes
        if isinstance(each, Step):
            peak_bytes = _peak_bytes() - empty_bytes
            Path("/proc/self/clear_refs").write_text("5")  # the peak is the next step's, with the moments there

    train(resolve(config_of(side, folder, max_iters=3)), World(), Callbacks(record))
    return {"peak_bytes": peak_bytes}


def _peak_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0])


# time


@dataclass
class Turns:
    """Whose iteration it is, of runs in threads of one process."""

    waiting: list[str]
    changed: threading.Condition = field(default_factory=threading.Condition)

    def wait_for(self, side: str) -> None:
        with self.changed:
            self.changed.wait_for(lambda: self.waiting[0] == side)

    def pass_on(self, side: str, *, is_over: bool = False) -> None:
        with self.changed:
            self.waiting.remove(side)
            if not is_over:
                self.waiting.append(side)
            self.changed.notify_all()


@dataclass
class Timed:
    """A run whose iterations are timed, each in its turn.

    steps: seconds and seconds of the processor, of each iteration.
    """

    side: str
    config: TrainConfig
    turns: Turns
    steps: list[tuple[float, float]] = field(default_factory=list)
    began: tuple[float, float] = (0.0, 0.0)

    def train(self) -> None:
        """Train to the end; in a thread."""
        self.turns.wait_for(self.side)
        try:
            train(
                resolve(self.config), World(attempt=self.side), Callbacks(self.record, stop_request=self.stop_request)
            )
        finally:
            self.turns.pass_on(self.side, is_over=True)

    def stop_request(self) -> int:
        """Begin an iteration when it is this run's turn."""
        self.turns.wait_for(self.side)
        self.began = (time.perf_counter(), time.process_time())
        return 0

    def record(self, record: Record) -> None:
        """End an iteration."""
        if isinstance(record, Step):
            self.steps.append((time.perf_counter() - self.began[0], time.process_time() - self.began[1]))
            self.turns.pass_on(self.side)


def step_ratios(folder: Path, steps: int) -> dict[str, float]:
    """Return the median times of an iteration of both sides, and their ratios."""
    turns = Turns([*SIDES])
    runs = {side: Timed(side, config_of(side, folder, steps + _WARM_UP), turns) for side in SIDES}
    threads = [threading.Thread(target=timed.train) for timed in runs.values()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found: dict[str, float] = {}
    for kind, name in enumerate(("step_s", "step_cpu_s")):
        for side, timed in runs.items():
            found[f"{side}_{name}"] = median(each[kind] for each in timed.steps[_WARM_UP:])
    return {
        **found,
        "lora_step_ratio": found["lora_step_s"] / found["full_step_s"],
        "lora_step_ratio_cpu": found["lora_step_cpu_s"] / found["full_step_cpu_s"],
    }


# recovery


def steps_repeated(folder: Path) -> int:
    """Return how many steps are computed again after one of three workers was killed that train adapters."""
    base = settings(folder, 1, max_iters=2, out_dir=str(folder / "base"), memory_dir="")
    train(resolve(base), World())
    lora = {"init_from": base.out_dir, "lora_rank": 8, "lora_dropout": 0.1, "max_iters": _ITERS}
    config = settings(folder, 3, cpus_per_worker=0.5, **lora)
    strike = {"kind": "worker", "rank": 1, "iter_num": _KILLED_AT, "marker": str(folder / "struck")}
    command = command_of({"side": "ours", "nodes": 1, "config": asdict(config), "strike": strike})
    done = subprocess.run(command, timeout=600, capture_output=True, text=True, check=False)
    return int(last_line(done.returncode, done.stdout, done.stderr)["steps_repeated"])


if __name__ == "__main__":
    print(json.dumps(measure_peak(sys.argv[1], Path(sys.argv[2]))))
