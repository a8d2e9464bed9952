"""The quickstart run's final weights, of this tree and of another commit: whether a change has kept every bit.

For changes that should change nothing: `python -m benchmarks same_bits --against=HEAD~1`. Each tree trains with its own
code, in the plain loop on two ranks; what is compared is one checksum over the names and bytes of all tensors. The
exit code is 1 where they differ. `--expect=CHECKSUM`, as an earlier run has printed it, saves the other tree's run;
checksums of different processors or versions of PyTorch are not comparable.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    other = parser.add_mutually_exclusive_group()
    other.add_argument("--against", metavar="COMMIT", help="compare with the code of this commit")
    other.add_argument("--expect", metavar="CHECKSUM", help="compare with this checksum")
    parser.add_argument("--max_iters", type=int, help="instead of quickstart's own")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Return {checksum: of this tree's weights, expected: the other's, or None}."""
    expected = args.expect
    if args.against:
        with checked_out(args.against) as other:
            expected = final_checksum(other, args.max_iters)
            print(f"{args.against:24} {expected}")
    found = final_checksum(ROOT, args.max_iters)
    verdict = "" if expected is None else "  the same bits" if found == expected else f"  OTHER BITS than {expected}"
    print(f"{'this tree':24} {found}{verdict}")
    return {"checksum": found, "expected": expected}


def exit_code(result: dict[str, Any]) -> int:
    return int(result["expected"] not in (None, result["checksum"]))


@contextmanager
def checked_out(commit: str) -> Iterator[Path]:
    """Lend the tree of a commit, in a folder for this time."""
    with tempfile.TemporaryDirectory(prefix="same-bits-") as folder:
        archive = subprocess.run(["git", "archive", commit], cwd=ROOT, stdout=subprocess.PIPE, check=True)
        subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)
        yield Path(folder)


def final_checksum(tree: Path, max_iters: int | None) -> str:
    """Train quickstart with the code in a folder, and return the checksum of the weights that it ends with."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    python = [sys.executable, "-m"]
    torchrun = [*python, "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"]
    with tempfile.TemporaryDirectory(prefix="same-bits-run-") as folder:
        data, out = f"--data_dir={folder}/data", f"--out_dir={folder}/run"
        node = f"--memory_dir={folder}/memory"
        Path(folder, "memory").mkdir()
        train = [*torchrun, "orchestrator.loop", "configs/quickstart.py", data, out, node, "--device=cpu"]
        if max_iters is not None:
            train.append(f"--max_iters={max_iters}")
        for command in ([*python, "orchestrator", "prepare", "quickstart", data], train):
            subprocess.run(command, cwd=tree, env=environment, stdout=subprocess.DEVNULL, check=True)
        return checksum_of(newest_checkpoint(Path(folder, "run")))


def newest_checkpoint(run_folder: Path) -> Path:
    return max(file.parent for file in run_folder.glob("checkpoint_*/state.json"))


def checksum_of(checkpoint: Path) -> str:
    """Return a checksum over the model's tensors, whatever files they lie in."""
    from safetensors import safe_open

    found: dict[str, bytes] = {}
    for file in checkpoint.glob("model-*.safetensors"):
        with safe_open(file, framework="np") as tensors:
            found |= {name: tensors.get_tensor(name).tobytes() for name in tensors.keys()}  # noqa: SIM118
    total = hashlib.sha256()
    for name, content in sorted(found.items()):
        total.update(name.encode() + content)
    return total.hexdigest()[:16]
