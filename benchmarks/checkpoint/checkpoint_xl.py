"""Peak resident size of saving and restoring a state as large as gpt2-xl's (18.7 GB) on a machine of 24 GB.

There is no room for it in node memory: the Saver notices and writes straight from the live tensors, and training waits
for that. Saving and restoring are a process each, and both end with the same bits. It takes some minutes and needs
room on the disk for the state; that it is not part of any test is for that.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks.checkpoint.ranks import open_saver, peak_bytes, prepare, ranks, restore, save
from benchmarks.checkpoint.state import SIZES, Size, forget_cached, new_folder, used_bytes

AT_MOST = 1.15  # times the state
_PYTHON_BYTES = 600_000_000  # of a process that has imported PyTorch, and of its buffers


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare this benchmark's options."""
    parser.add_argument("--size", choices=SIZES, default="gpt2-xl", help="of the model (default: %(default)s)")
    parser.add_argument("--out_dir", help="folder on the disk to measure (default: where temporary files go)")
    parser.add_argument("--memory_dir", default="/dev/shm", help="memory file system (default: %(default)s)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Save, restore, print and return the peaks over the state's size.

    Raises:
        RuntimeError: the machine's memory is not free.
    """
    size = SIZES[args.size]
    state_bytes = _state_bytes(size)
    needed_bytes, free_bytes = state_bytes + _PYTHON_BYTES, _available_bytes()
    if free_bytes < needed_bytes:
        raise RuntimeError(f"{needed_bytes / 1e9:.1f} GB of memory are needed, {free_bytes / 1e9:.1f} GB are free")
    # A folder of its own: to make room, what ended runs have left in one is deleted.
    with new_folder(args.out_dir) as out_dir, new_folder(args.memory_dir) as memory_dir:
        result = _measure(size, out_dir, memory_dir, state_bytes)
    for name, value in result.items():
        goal = f"at most {AT_MOST}" if name.startswith("peak") else ""
        print(f"{name:<24} {value:9.4g}   {goal}".rstrip())
    return result


def _measure(size: Size, out_dir: Path, memory_dir: Path, state_bytes: int) -> dict[str, Any]:
    url = str(out_dir / "run")
    with ranks(1, size, out_dir) as alone:
        (bits,) = alone.do(prepare)
        alone.do(open_saver, url, str(memory_dir))
        (save_s,) = alone.do(save, url)
        (save_peak_bytes,) = alone.do(peak_bytes)
    stored_bytes = used_bytes(out_dir)
    forget_cached(out_dir)
    with ranks(1, size, out_dir) as alone:
        (found,) = alone.do(restore, url, bits)
    return {
        "peak_ratio_save": save_peak_bytes / state_bytes,
        "peak_ratio_restore": found["peak_bytes"] / state_bytes,
        "save_s": save_s,
        "restore_s": found["seconds"],
        "state_gb": state_bytes / 1e9,
        "stored_gb": stored_bytes / 1e9,
    }


def _state_bytes(size: Size) -> int:
    """Return the bytes of weights and AdamW's moments, which are three times the weights."""
    C = size.n_embd
    block = 12 * C * C + 2 * C  # attention 4 C^2, feed-forward 8 C^2, two norms
    parameters = (size.vocab_size + size.block_size) * C + size.n_layer * block + C
    return 3 * 4 * parameters


def _available_bytes() -> int:
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024
