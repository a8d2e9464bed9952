"""Two optimizer steps of GPT-2 XL (1,558M parameters) at full size on one machine: saved, killed, resumed.

`train --init_from=FOLDER --num_workers=1` on random weights, one sequence of 1,024 tokens per step, with
activation_checkpointing and loss_chunk. It is run twice: undisturbed, and with its worker killed as soon as the first
step's checkpoint is whole. `is_equal` tells whether both end with the same bits, weights and moments.

Weights, gradients and AdamW's two moments are 16 bytes per parameter, 24.9 GB, and a step takes up to 2.5 GB besides:
where memory ends before that, swap has to take what is over (fallocate -l 8G FILE; mkswap FILE; swapon FILE). It takes
half an hour on two cores, and 45 GB on the disk; that it is not part of any test is for that.

With `--lora_rank=8` the steps train adapters beside frozen weights, in memory and without swap, with 7 GB on the disk.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.processes import workers_of
from benchmarks.start.xl_start import SIZES, write_weights
from model.config import GPT2_VOCAB_SIZE
from model.lora import BASE_DTYPES
from orchestrator.checkpoint.store import Checkpoint, CheckpointStore
from orchestrator.storage.run_folder import RunFolder
from orchestrator.telemetry.metrics import read_metrics
from orchestrator.telemetry.records import Begin, CheckpointSaved, Step

SETTINGS = (
    *("--batch_size=1", "--block_size=1024", "--gradient_accumulation_steps=1", "--learning_rate=1e-5"),
    *("--decay_lr=False", "--max_iters=2", "--checkpoint_interval=1", "--keep_checkpoints=1", "--eval_interval=1000"),
    *("--eval_iters=1", "--log_interval=1", "--activation_checkpointing=True", "--loss_chunk=256"),
    *("--num_workers=1", "--cpus_per_worker=2", "--warm_spares=False", "--hang_timeout_s=3600"),
    *("--device=cpu", "--dtype=float32", "--compile=False", "--dataset=random"),
)
_OTHERS_BYTES = 4_500_000_000  # Python and PyTorch, the step itself, Ray and the driver


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare this benchmark's options."""
    parser.add_argument("--size", choices=SIZES, default="xl", help="of the model (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="where 45 GB fit (default: that of temporary files)")
    parser.add_argument("--lora_rank", type=int, default=0, help="train adapters of this rank (default: all weights)")
    parser.add_argument("--lora_base_dtype", choices=BASE_DTYPES, default="float32", help="default: %(default)s")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Train twice, print and return the figures.

    Raises:
        RuntimeError: memory and swap are too small, or a run has failed.
    """
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="xl-step-") as name:
        folder = Path(name)
        weights = folder / "weights"
        weights.mkdir()
        weights_bytes = write_weights(weights, SIZES[args.size])
        floats = 4 if not args.lora_rank else BASE_DTYPES[args.lora_base_dtype].itemsize / 4  # that a weight takes
        needed_bytes = floats * weights_bytes + _OTHERS_BYTES
        free_bytes = psutil.virtual_memory().available + psutil.swap_memory().free
        if free_bytes < needed_bytes:
            raise RuntimeError(
                f"{needed_bytes / 1e9:.1f} GB of memory are needed, {free_bytes / 1e9:.1f} GB are free: add swap"
            )
        write_tokens(folder / "data" / "random")
        lora = (f"--lora_rank={args.lora_rank}", f"--lora_base_dtype={args.lora_base_dtype}") if args.lora_rank else ()
        sides = {side: train(folder, side, lora, is_killed=side == "killed") for side in ("undisturbed", "killed")}
    sums = [side.pop("checksums") for side in sides.values()]  # of whole files: equal states are equal files
    result = {**sides, "is_equal": sums[0] == sums[1], "weights_bytes": weights_bytes}
    for side, found in sides.items():
        print(f"{side}: " + ", ".join(f"{key} {value:.2f}" for key, value in found.items()))
    print(f"the same bits: {result['is_equal']}; 4 bytes per parameter are {weights_bytes / 1e9:.2f} GB")
    return result


def train(folder: Path, side: str, lora: Sequence[str] = (), *, is_killed: bool) -> dict[str, Any]:
    """Run one side, which leaves nothing behind; return its figures, peak_gb of the worker with what is swapped out.

    lora: the settings of adapters.
    """
    out_dir = str(folder / side)
    command = [sys.executable, "-m", "orchestrator", "train", *SETTINGS, *lora, f"--init_from={folder / 'weights'}"]
    # Ray's monitor knows no swap: it would end the worker as soon as memory alone is full
    variables = {"RAY_AUTH_MODE": "disabled", "RAY_ADDRESS": "local", "RAY_memory_monitor_refresh_ms": "0"}
    store, peak_bytes, killed_at_s = CheckpointStore(RunFolder(out_dir)), 0, 0.0
    with Path(folder, "log").open("w+") as log:
        driver = subprocess.Popen(
            [*command, f"--data_dir={folder / 'data'}", f"--out_dir={out_dir}"],
            env={**os.environ, **variables},
            stdout=log,
            stderr=log,
        )
        while driver.poll() is None:
            time.sleep(0.5)
            for worker in workers_of(driver.pid):
                peak_bytes = max(peak_bytes, used_bytes(worker))
                if is_killed and not killed_at_s and newest(store):
                    worker.kill()
                    killed_at_s = time.time()
        log.seek(0)
        said = log.read()
    if driver.returncode:
        raise RuntimeError(f"{side} has failed:\n{said[-5000:]}")
    records = read_metrics(RunFolder(out_dir))
    steps = {each.record.iter: each.record for each in records if isinstance(each.record, Step)}
    found: dict[str, Any] = {
        "peak_gb": peak_bytes / 1e9,
        "step_s": max(step.dt_s for step in steps.values()),
        "save_s": max(each.record.seconds for each in records if isinstance(each.record, CheckpointSaved)),
    }
    if is_killed:
        begun = [each.record for each in records if isinstance(each.record, Begin)]
        if not killed_at_s or len(begun) != 2 or begun[-1].iter != 1:
            raise RuntimeError(f"the worker was not killed between its steps: {begun}")
        [step_s] = [each.time_s for each in records if each.record is steps[1]]
        found |= {"restore_s": begun[-1].restore_s, "kill_to_next_step_s": step_s - killed_at_s}
        if told := re.search(r"the base model .* read and compared in ([0-9.]+) s", said):
            found["base_s"] = float(told[1])
    last = newest(store)
    if not last or last.iter_num != 2:
        raise RuntimeError(f"{side} has not saved its second step")
    found["state_gb"] = last.size_bytes / 1e9
    found["checksums"] = {file: record.xxh3_128 for file, record in last.files.items()}
    for checkpoint in store.newest_first():
        store.folder.fs.rm(store.folder.path(checkpoint.name), recursive=True)
    return found


def write_tokens(folder: Path) -> None:
    """Write token files as nanoGPT's prepare.py does, with random tokens of GPT-2's vocabulary."""
    folder.mkdir(parents=True)
    draw = np.random.default_rng(1337)
    for split in ("train", "val"):
        draw.integers(0, GPT2_VOCAB_SIZE, 20_000, dtype=np.uint16).tofile(folder / f"{split}.bin")


def newest(store: CheckpointStore) -> Checkpoint | None:
    """Return the newest checkpoint that is whole."""
    return next(store.newest_first(), None)


def used_bytes(process: psutil.Process) -> int:
    """Return what a process has in memory of its own, and what of it is swapped out."""
    try:
        status = Path(f"/proc/{process.pid}/status").read_text()
    except OSError:  # it has ended
        return 0
    return sum(1024 * int(kilobytes) for kilobytes in re.findall(r"(?:RssAnon|VmSwap):\s+(\d+) kB", status))
