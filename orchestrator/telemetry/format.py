"""Records as lines of text: nanoGPT's, where nanoGPT has one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Record = dict[str, Any]


def line_of(record: Record) -> str | None:
    """Return the line of a record, None for one that is for machines only."""
    line = _LINES.get(record["kind"])
    return line(record) if line else None


def stopped_line(iter_num: int, max_iters: int, out_dir: str, *, eval_only: bool) -> str:
    """Return what is said of a run that was asked to stop, before its iteration iter_num."""
    if eval_only:
        return "the evaluation was stopped; nothing in out_dir was changed"
    if not iter_num:
        return "stopped before the first iteration: the same command begins it"
    return f"stopped at iteration {iter_num} of {max_iters}, saved in {out_dir}; the same command goes on from there"


def print_record(record: Record) -> None:
    """Print the line of a record to stdout."""
    if line := line_of(record):
        print(line, flush=True)


def _step(r: Record) -> str:
    computed = ""
    if r["mfu"] is not None:
        computed = f", mfu {r['mfu'] * 100:.2f}%"
    elif r["tflops"] is not None:
        computed = f", {r['tflops']:.1f} TFLOP/s"
    return f"iter {r['iter']}: loss {r['loss']:.4f}, time {r['dt_s'] * 1000:.2f}ms{computed}"


def _eval(r: Record) -> str:
    more = f", perplexity {r['perplexity']:.3f}" if "perplexity" in r else ""
    more += f", {r['bits_per_byte']:.4f} bits per byte" if "bits_per_byte" in r else ""
    return f"step {r['iter']}: train loss {r['train_loss']:.4f}, val loss {r['val_loss']:.4f}{more}"


def _begin(r: Record) -> str:
    origin = f"resuming {r['from']} ({_source(r)})" if r["from"] else "beginning"
    return (
        f"{origin} at iteration {r['iter']} of {r['max_iters']}: {r['num_params'] / 1e6:.2f}M parameters, "
        f"{r['tokens_per_iter']:,} tokens per iteration, {r['world_size']} worker(s) on {r['device']}, {r['dtype']}"
    )


def _source(r: Record) -> str:
    memory_bytes = r["size_bytes"] - r["from_storage_bytes"]
    parts = {"node memory": max(0, memory_bytes), "storage": r["from_storage_bytes"]}
    read = " and ".join(f"{size / 1e6:.1f} MB of {place}" for place, size in parts.items() if size)
    return f"{read} in {r['restore_s']:.2f} s"


def _checkpoint(r: Record) -> str:
    return f"saved {r['name']} in {r['seconds']:.2f} s, training paused for {r['pause_s'] * 1000:.0f} ms"


_LINES: dict[str, Callable[[Record], str]] = {
    "step": _step,
    "eval": _eval,
    "begin": _begin,
    "checkpoint": _checkpoint,
    "checkpoint_skipped": lambda r: f"skipped {r['name']}: {r['why']}",
    "checkpoint_failed": lambda r: f"{r['name']} was not saved: {r['why']}",
    "step_skipped": lambda r: (
        f"iter {r['iter']}: step skipped, {r['why']} ({r['in_a_row']} in a row, {r['skipped']} in all)"
    ),
    "rollback": lambda r: (
        f"going back to iteration {r['to_iter']}, skipping the data of {r['skipped_iters']}: {r['why']}"
    ),
    "note": lambda r: r["text"],
}
