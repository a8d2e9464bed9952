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
import importlib
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch

from benchmarks.checkpoint.pause import DCP, measure_pauses, measure_slowdown
from benchmarks.checkpoint.ranks import (
    Ranks,
    load_as_nanogpt,
    open_saver,
    prepare,
    ranks,
    restore,
    save,
    watched_memory,
)
from benchmarks.checkpoint.state import (
    SIZES,
    Size,
    forget_cached,
    new_folder,
    new_state,
    settle,
    size_bytes,
    torch_save,
    used_bytes,
)
from orchestrator.checkpoint.state import TrainState

Figures = dict[str, float]

AT_MOST = {
    "pause_ratio": 0.02,
    "slowdown": 1.01,
    "extra_memory_ratio": 1.05,
    "read_amplification": 1.001,  # 1.0 plus headers
}
AT_LEAST = {"save_bandwidth_ratio": 1.5, "load_bandwidth_ratio": 1.5, "memory_vs_s3_restore": 5.0}


@dataclass(frozen=True)
class Plan:
    """What is measured and where."""

    size: Size
    small: Size  # of the state that goes through the proxy
    n_tokens: int
    rounds: int
    pairs: int
    out_dir: Path
    memory_dir: Path


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


def disk(plan: Plan) -> tuple[Figures, dict[str, Any]]:
    """Compare saving and restoring with two ranks to torch.save and torch.load in one process."""
    in_memory, direct = str(plan.out_dir / "in_memory"), str(plan.out_dir / "direct")
    state = new_state(plan.size)
    state_bytes = size_bytes(state)
    seconds: dict[str, list[float]] = {}
    with ranks(2, plan.size, plan.out_dir) as pair:
        bits = pair.do(prepare)[0]
        with watched_memory(pair) as growth_bytes:
            pair.do(open_saver, in_memory, str(plan.memory_dir))
            for _ in range(2):
                pair.do(save, in_memory)
        memory_bytes = used_bytes(plan.memory_dir)
        if not memory_bytes:
            raise RuntimeError(f"{plan.memory_dir} has no room for two generations of {state_bytes} bytes")
        with watched_memory(pair) as direct_growth_bytes:
            pair.do(open_saver, direct, "")
            pair.do(save, direct)
        for is_odd in (k % 2 == 1 for k in range(plan.rounds)):
            for name, taken_s in _saves(plan, pair, state, (in_memory, direct), is_odd):
                seconds.setdefault(name, []).append(taken_s)
            for name, taken_s in _loads(plan, bits, direct):
                seconds.setdefault(name, []).append(taken_s)
    medians_s = {name: median(taken) for name, taken in seconds.items()}
    print("medians in s: " + ", ".join(f"{name} {taken:.2f}" for name, taken in medians_s.items()))
    figures = _bandwidths(medians_s) | {
        "extra_memory_ratio": (memory_bytes / 2 + growth_bytes[0]) / state_bytes,
        "extra_memory_ratio_both_generations": (memory_bytes + growth_bytes[0]) / state_bytes,
        "extra_memory_ratio_direct": direct_growth_bytes[0] / state_bytes,
    }
    return figures, {"seconds": seconds, "medians_s": medians_s, "state_bytes": state_bytes}


def _saves(
    plan: Plan, pair: Ranks, state: TrainState, out_dirs: tuple[str, str], is_backwards: bool
) -> Iterator[tuple[str, float]]:
    """Yield the seconds of every kind of saving once, each with a disk that has nothing left to do.

    is_backwards: who goes first finds other pages free in memory than who goes last, which matters much.
    """
    file = plan.out_dir / "ckpt.pt"
    in_memory, direct = out_dirs
    kinds: dict[str, Callable[[], float]] = {
        "save_torch": lambda: torch_save(state, file),
        "save_memory": lambda: max(pair.do(save, in_memory)),
        "save_direct": lambda: max(pair.do(save, direct)),
        "save_torch_synced": lambda: torch_save(state, file, is_synced=True),
        "save_memory_unsynced": lambda: max(pair.do(save, in_memory, False)),
        "save_direct_unsynced": lambda: max(pair.do(save, direct, False)),
    }
    for name in sorted(kinds, reverse=is_backwards):
        yield name, kinds[name]()
        settle(plan.out_dir)


def _loads(plan: Plan, bits: str, out_dir: str) -> Iterator[tuple[str, float]]:
    """Yield the seconds of every kind of loading once, each in new processes: who resumes has just begun."""
    file = plan.out_dir / "ckpt.pt"

    def torch_loads(count: int) -> tuple[float, float]:
        with ranks(count, plan.size, plan.out_dir) as members:
            loaded_s, filled_s = zip(*members.do(load_as_nanogpt, file), strict=True)
            return max(loaded_s), max(filled_s)

    def our_load() -> float:
        with ranks(2, plan.size, plan.out_dir) as members:
            return max(float(found["seconds"]) for found in members.do(restore, out_dir, bits))

    for suffix in ("", "_cached"):  # what the first has read is cached for the second
        if not suffix:
            forget_cached(plan.out_dir)
        yield f"load{suffix}", our_load()
        loaded_s, filled_s = torch_loads(1)
        yield f"load_torch{suffix}", loaded_s
        yield f"load_torch_filled{suffix}", filled_s
    yield "load_torch_both_cached", torch_loads(2)[1]


def _bandwidths(seconds: dict[str, float]) -> Figures:
    """Return the ratios of bandwidths: the same state, so those of the times."""
    return {
        "save_bandwidth_ratio": seconds["save_torch"] / seconds["save_memory"],
        "save_bandwidth_ratio_direct": seconds["save_torch"] / seconds["save_direct"],
        "save_bandwidth_ratio_synced": seconds["save_torch_synced"] / seconds["save_memory"],
        "save_bandwidth_ratio_direct_synced": seconds["save_torch_synced"] / seconds["save_direct"],
        "save_bandwidth_ratio_unsynced": seconds["save_torch"] / seconds["save_memory_unsynced"],
        "save_bandwidth_ratio_direct_unsynced": seconds["save_torch"] / seconds["save_direct_unsynced"],
        "load_bandwidth_ratio": seconds["load_torch"] / seconds["load"],
        "load_bandwidth_ratio_filled": seconds["load_torch_filled"] / seconds["load"],
        "load_bandwidth_ratio_cached": seconds["load_torch_cached"] / seconds["load_cached"],
        "load_bandwidth_ratio_both_cached": seconds["load_torch_both_cached"] / seconds["load_cached"],
        "load_bandwidth_ratio_filled_cached": seconds["load_torch_filled_cached"] / seconds["load_cached"],
    }


def s3(plan: Plan) -> tuple[Figures, dict[str, Any]]:
    """Compare restoring from node memory and from S3, and count what is asked of S3."""
    with _s3_server(plan.out_dir / "s3") as servers:
        if not servers:
            return {}, {}
        module, server = servers
        speed, seconds = _memory_against_s3(plan, server)
        amplification = _amplification(plan, module, server)
    worst = max(amplification[f"read_amplification_{count}_ranks"] for count in (1, 2, 4))
    return {**speed, "read_amplification": worst, **amplification}, seconds


@contextmanager
def _s3_server(folder: Path) -> Iterator[tuple[Any, Any] | None]:
    """Lend the module of the test servers and an S3 server; None, and a line that says why, where there is none."""
    try:
        module = importlib.import_module("tests.support.servers")
    except ImportError as error:
        print(f"memory_vs_s3_restore and read_amplification are left out: {error}; run it in the repository's root")
        yield None
        return
    folder.mkdir()
    (folder / "weed").mkdir()
    try:
        server = module.S3Server(folder / "weed")
    except module.ServerMissingError as missing:
        print(f"memory_vs_s3_restore and read_amplification are left out: {missing}")
        yield None
        return
    try:
        yield module, server
    finally:
        server.kill()


def _memory_against_s3(plan: Plan, server: Any) -> tuple[Figures, dict[str, Any]]:
    url = f"{server.url}/full"
    seconds: dict[str, list[float]] = {"memory": [], "s3": []}
    with ranks(2, plan.size, plan.out_dir, server.environment) as pair:
        bits = pair.do(prepare)[0]
        pair.do(open_saver, url, str(plan.memory_dir))
        saved_s = max(pair.do(save, url))
    for _ in range(2 * plan.rounds - 1):  # what new memory costs scatters most here
        for place, taken in seconds.items():
            memory_dir = str(plan.memory_dir) if place == "memory" else ""
            with ranks(2, plan.size, plan.out_dir, server.environment) as pair:
                found = pair.do(restore, url, bits, memory_dir)
            taken.append(max(each["seconds"] for each in found))
            if (found[0]["from_storage_bytes"] == 0) != (place == "memory"):
                raise RuntimeError(f"{found[0]['from_storage_bytes']} bytes were read of S3, asked was {place}")
    medians_s = {place: median(taken) for place, taken in seconds.items()}
    print(f"medians in s: restore from memory {medians_s['memory']:.2f}, from S3 {medians_s['s3']:.2f}", end="; ")
    print(f"save to S3 {saved_s:.2f}")
    figures = {"memory_vs_s3_restore": medians_s["s3"] / medians_s["memory"]}
    return figures, {"restore_s": seconds, "save_to_s3_s": saved_s}


def _amplification(plan: Plan, module: Any, server: Any) -> Figures:
    """Return the bytes that S3 sent for restores, over the state's, for several world sizes and from node memory."""
    proxy = module.FaultyProxy(server)
    url = f"{server.url}/small"
    figures = {}
    try:
        with ranks(2, plan.small, plan.out_dir, proxy.environment) as pair:
            bits = pair.do(prepare)[0]
            pair.do(open_saver, url, str(plan.memory_dir))
            pair.do(save, url)
        for name, count, memory_dir in (
            ("1_ranks", 1, ""),
            ("2_ranks", 2, ""),
            ("4_ranks", 4, ""),
            ("in_memory", 2, str(plan.memory_dir)),
        ):
            with ranks(count, plan.small, plan.out_dir, proxy.environment) as members:
                before_bytes = proxy.traffic.bytes_down
                found = members.do(restore, url, bits, memory_dir)
                sent_bytes = proxy.traffic.bytes_down - before_bytes
            figures[f"read_amplification_{name}"] = sent_bytes / found[0]["size_bytes"]
    finally:
        proxy.close()
    return figures


PARTS: dict[str, Callable[[Plan], tuple[Figures, dict[str, Any]]]] = {
    "pauses": pauses,
    "slowdowns": slowdowns,
    "disk": disk,
    "s3": s3,
}
