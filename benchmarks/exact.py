"""The same bits on any number of workers: whether it holds, and what it costs beside DDP.

Bits: runs in 8 lanes on 1, 2, 3 and 4 ranks, and one that is killed four times and goes on with another number each
time (4, 3, 1, 2, 4), all in the plain loop under torchrun. Counted are the elements of weights and moments that differ
from those of the run on one rank; with DDP's reduction, beside it, they do differ.

Cost: two models train in the same processes, one in lanes and one with DDP, an iteration each in turn. The ratio is of
the medians of whole iterations, of the slowest rank.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.same_bits import ROOT
from model import GPT, GPTConfig
from orchestrator.checkpoint.store import CheckpointStore
from orchestrator.config import TrainConfig
from orchestrator.distributed.lanes import Lanes, default_lanes
from orchestrator.distributed.parallelism import Parallelism, parallelize
from orchestrator.distributed.world import World
from orchestrator.storage.run_folder import RunFolder
from orchestrator.training.step import set_learning_rate

SIZES, LANES, MICRO_STEPS = (1, 2, 3, 4), 8, 12
DISTURBED = (4, 3, 1, 2, 4)
ITERS, ITERS_EACH = 60, 12  # of a run; until it is killed
RANGE = (2, 8)
GOALS = {"differing_elements": 0, "step_ratio_equal": 1.05, "step_ratio_uneven": 1.15, "balance": 1.2}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare this benchmark's options."""
    parser.add_argument("--steps", type=int, default=15, help="iterations of each kind that are timed (default: 15)")
    parser.add_argument("--only", choices=["bits", "cost"], help="leave the other part out")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Print and return what the module's docstring names."""
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="exact-") as folder:
        if args.only != "cost":
            result |= compare_bits(Path(folder))
        if args.only != "bits":
            result["step_ratio_equal"] = step_ratio(2, 2, 4, args.steps, Path(folder))
            result["step_ratio_uneven"] = step_ratio(3, 8, 8, args.steps, Path(folder))
    fewest, most = RANGE
    lanes = Lanes(default_lanes(fewest, most, 40), 40)
    result["balance"] = max(lanes.balance(size) for size in range(fewest, most + 1))
    result["lane_buffers"] = {size: lanes.most_held_sums(size) for size in range(1, most + 1)}
    for name, value in result.items():
        goal = f"   (goal: at most {GOALS[name]})" if name in GOALS else ""
        print(f"{name:24} {value if not isinstance(value, float) else round(value, 3)}{goal}")
    return result


def exit_code(result: dict[str, Any]) -> int:
    """Return 1 where bits differ: figures of speed are for people to judge."""
    return int(result.get("differing_elements", 0) != 0)


# bits


@dataclass(frozen=True)
class Runs:
    """Runs of one small model; folder: theirs."""

    folder: Path

    def prepare(self) -> None:
        """Prepare the data."""
        command = [sys.executable, "-m", "orchestrator", "prepare", "quickstart", f"--data_dir={self.folder}/data"]
        subprocess.run(command, cwd=ROOT, env=_environment(), stdout=subprocess.DEVNULL, check=True)

    def train(self, name: str, size: int, *more: str, kill_at: int | None = None) -> None:
        """Train a run on so many ranks to its end, or kill all of them when it has come so far."""
        out, memory = self.folder / name, self.folder / f"{name}-memory"
        memory.mkdir(exist_ok=True)
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={size}", "-m"]
        settings = {
            "data_dir": self.folder / "data",
            "out_dir": out,
            "memory_dir": memory,
            "n_layer": 2,
            "n_embd": 96,
            "block_size": 64,
            "batch_size": 4,
            "gradient_accumulation_steps": MICRO_STEPS,
            "dropout": 0.1,
            "max_iters": ITERS,
            "lr_decay_iters": ITERS,
            "eval_interval": 20,
            "eval_iters": 6,
            "log_interval": 1,
            "device": "cpu",
        }
        flags = [f"--{key}={value}" for key, value in settings.items()]
        command = [*launch, "orchestrator.loop", "configs/quickstart.py", *flags, *more]
        process = subprocess.Popen(
            command, cwd=ROOT, env=_environment(), stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        assert process.stdout
        for line in process.stdout:
            if kill_at is not None and line.startswith(f"iter {kill_at}:"):
                os.killpg(process.pid, signal.SIGKILL)
        code = process.wait()
        if kill_at is None and code:
            raise RuntimeError(f"{name} on {size} ranks ended with {code}")

    def final_state(self, name: str) -> dict[str, Tensor]:
        """Return weights and moments by name."""
        store = CheckpointStore(RunFolder(str(self.folder / name)))
        state = store.read(store.select("latest"))
        return {**state.model, **state.optimizer}


def compare_bits(folder: Path) -> dict[str, Any]:
    """Return differing_elements, ddp_differing_elements and elements: those of one state."""
    runs = Runs(folder)
    runs.prepare()
    in_lanes = f"--lanes={LANES}"
    for size in SIZES:
        print(f"{size} rank(s), undisturbed", flush=True)
        runs.train(f"on-{size}", size, in_lanes)
    for number, size in enumerate(DISTURBED):
        is_last = number + 1 == len(DISTURBED)
        print(f"disturbed, {size} rank(s)", flush=True)
        runs.train("disturbed", size, in_lanes, kill_at=None if is_last else (number + 1) * ITERS_EACH)
    for size in (1, 3):
        print(f"{size} rank(s), DDP's reduction", flush=True)
        runs.train(f"ddp-{size}", size, "--deterministic=False")
    alone = runs.final_state("on-1")
    others = [*(f"on-{size}" for size in SIZES[1:]), "disturbed"]
    return {
        "elements": sum(tensor.numel() for tensor in alone.values()),
        "differing_elements": sum(differing(alone, runs.final_state(name)) for name in others),
        "ddp_differing_elements": differing(runs.final_state("ddp-1"), runs.final_state("ddp-3")),
    }


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> int:
    """Return how many elements differ, in any bit."""
    if one.keys() != other.keys():
        raise RuntimeError(f"states of other tensors: {sorted(one.keys() ^ other.keys())}")
    return sum(int((_bits(one[name]) != _bits(other[name])).sum()) for name in one)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.int32)


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


# cost


def step_ratio(size: int, lanes: int, micro_steps: int, steps: int, folder: Path) -> float:
    """Return an iteration's time in lanes over DDP's, on so many ranks of this machine."""
    start = multiprocessing.get_context("spawn")
    queue: Any = start.SimpleQueue()
    meeting = (folder / f"meeting-{size}-{time.monotonic_ns()}").as_uri()
    processes = [
        start.Process(target=_time_steps, args=(rank, size, lanes, micro_steps, steps, meeting, queue))
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    found: list[tuple[list[float], list[float]]] = [queue.get() for _ in processes]
    for process in processes:
        process.join()
    ours, ddps = ([max(times) for times in zip(*(each[kind] for each in found), strict=True)] for kind in (0, 1))
    print(
        f"{size} ranks, {lanes} lanes, {micro_steps} micro-steps: {median(ours) * 1000:.1f} ms an iteration, "
        f"DDP {median(ddps) * 1000:.1f} ms",
        flush=True,
    )
    return float(median(ours) / median(ddps))


def _time_steps(rank: int, size: int, lanes: int, micro_steps: int, steps: int, meeting: str, queue: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=size)
    world = World(rank, size)
    config = TrainConfig(
        device="cpu", dtype="float32", compile=False, gradient_accumulation_steps=micro_steps, backend="gloo"
    )
    args = GPTConfig(n_layer=6, n_head=6, n_embd=384, block_size=256, vocab_size=1024, bias=False, dropout=0.0)
    config = replace(config, batch_size=4, block_size=args.block_size)
    kinds = [_iteration(config, args, world, count) for count in (lanes, 0)]
    times: tuple[list[float], list[float]] = ([], [])
    for step in range(steps + 3):
        for kind, iterate in enumerate(kinds):
            dist.barrier()
            t0 = time.perf_counter()
            iterate()
            if step >= 3:  # warm by then
                times[kind].append(time.perf_counter() - t0)
    queue.put(times)
    dist.destroy_process_group()


def _iteration(config: TrainConfig, args: GPTConfig, world: World, lanes: int) -> Callable[[], None]:
    """Return one whole iteration of a new model, in so many lanes or, for 0, with DDP."""
    torch.manual_seed(1)
    gpt = GPT(args)
    optimizer = gpt.configure_optimizers(0.1, 1e-4, (0.9, 0.95), "cpu")
    return partial(_iterate, parallelize(gpt, config, world, lanes), optimizer, config)


def _iterate(model: Parallelism, optimizer: torch.optim.Optimizer, config: TrainConfig) -> None:
    batch = torch.randint(0, 1024, (config.batch_size, config.block_size + 1))
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    set_learning_rate(optimizer, config, 10)
    for micro_step in model.micro_steps:
        with model.accumulate(micro_step):
            _, loss = model(batch[:, :-1], batch[:, 1:])
            (loss * model.weight).backward()  # type: ignore[no-untyped-call]
    model.clip(optimizer, scaler, config.grad_clip)
    optimizer.step()
    model.zero_grad(optimizer)
