"""Saving to a disk and restoring from it with two ranks, beside torch.save and torch.load in one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

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
    Figures,
    Plan,
    forget_cached,
    new_state,
    settle,
    size_bytes,
    torch_save,
    used_bytes,
)
from orchestrator.checkpoint.state import TrainState


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
