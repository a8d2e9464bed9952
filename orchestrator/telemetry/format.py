"""Records as lines of text: nanoGPT's, where nanoGPT has one."""

from __future__ import annotations

from orchestrator.telemetry.records import (
    Begin,
    CheckpointFailed,
    CheckpointSaved,
    CheckpointSkipped,
    Evaluation,
    LanesChanged,
    Note,
    Record,
    RollingBack,
    Step,
    StepSkipped,
)


def line_of(record: Record) -> str | None:
    """Return the line of a record, None for one that is for machines only."""
    match record:
        case Step():
            return _step(record)
        case Evaluation():
            return _evaluation(record)
        case Begin():
            return _begin(record)
        case CheckpointSaved(name=name, seconds=seconds, pause_s=pause_s):
            return f"saved {name} in {seconds:.2f} s, training paused for {pause_s * 1000:.0f} ms"
        case CheckpointSkipped(name=name, why=why):
            return f"skipped {name}: {why}"
        case CheckpointFailed(name=name, why=why):
            return f"{name} was not saved: {why}"
        case LanesChanged(iter=it, lanes=lanes, before=before):
            order = f"in {lanes} lanes" if lanes else "in DDP's order"
            was = f"in {before}" if before else "in DDP's order"
            return f"iter {it}: gradients are summed {order} instead of {was}: from here on the run has other bits"
        case StepSkipped(iter=it, why=why, in_a_row=in_a_row, skipped=skipped):
            return f"iter {it}: step skipped, {why} ({in_a_row} in a row, {skipped} in all)"
        case RollingBack(to_iter=to_iter, skipped_iters=skipped, why=why):
            return f"going back to iteration {to_iter}, skipping the data of {skipped}: {why}"
        case Note(text=text):
            return text
    return None


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


def _step(r: Step) -> str:
    computed = ""
    if r.mfu is not None:
        computed = f", mfu {r.mfu * 100:.2f}%"
    elif r.tflops is not None:
        computed = f", {r.tflops:.1f} TFLOP/s"
    return f"iter {r.iter}: loss {r.loss:.4f}, time {r.dt_s * 1000:.2f}ms{computed}"


def _evaluation(r: Evaluation) -> str:
    more = f", perplexity {r.perplexity:.3f}" if r.perplexity is not None else ""
    more += f", {r.bits_per_byte:.4f} bits per byte" if r.bits_per_byte is not None else ""
    return f"step {r.iter}: train loss {r.train_loss:.4f}, val loss {r.val_loss:.4f}{more}"


def _begin(r: Begin) -> str:
    origin = f"resuming {r.from_} ({_source(r)})" if r.from_ else "beginning"
    trained = f" ({r.num_trained / 1e6:.2f}M of them trained)" if r.num_trained is not None else ""
    return (
        f"{origin} at iteration {r.iter} of {r.max_iters}: {r.num_params / 1e6:.2f}M parameters{trained}, "
        f"{r.tokens_per_iter:,} tokens per iteration, {r.world_size} worker(s) on {r.device}, {r.dtype}"
    )


def _source(r: Begin) -> str:
    size_bytes, from_storage_bytes = r.size_bytes or 0, r.from_storage_bytes or 0
    parts = {"node memory": max(0, size_bytes - from_storage_bytes), "storage": from_storage_bytes}
    read = " and ".join(f"{size / 1e6:.1f} MB of {place}" for place, size in parts.items() if size)
    return f"{read} in {r.restore_s or 0.0:.2f} s"
