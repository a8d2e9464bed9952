"""Own functions, files and classes that a run of the plain loop enters, from argv to its first saved checkpoint.

It is a measure of how far a reader has to jump: nanoGPT enters 16 functions in 2 files. A tiny run trains in a process
of its own with a profile hook in all threads; we stop counting when the first `state.json` is there.
Comprehensions and generated methods of dataclasses do not count as functions. A class counts when one of its methods is
entered, or when a dataclass is made.
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import subprocess
import sys
import tempfile
import threading
from inspect import CO_OPTIMIZED
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ROOMS = (f"{ROOT}/orchestrator/", f"{ROOT}/model/")
NOT_COUNTED = ("<module>", "<listcomp>", "<setcomp>", "<dictcomp>", "<genexpr>")
GOAL = 230  # functions, at most


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare this benchmark's options."""
    parser.add_argument("--functions", action="store_true", help="name every function, not only files")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Trace, print and return {functions: {file: [names]}, classes: [names]}."""
    with tempfile.TemporaryDirectory(prefix="entered-") as folder:
        found = trace(Path(folder))
    for file, names in sorted(found["functions"].items()):
        print(f"{len(names):4} {file}{': ' + ', '.join(names) if args.functions else ''}")
    functions, files = sum(map(len, found["functions"].values())), len(found["functions"])
    print(f"{functions} functions (goal: at most {GOAL}) in {files} files; {len(found['classes'])} classes")
    return found


def trace(folder: Path) -> dict[str, Any]:
    """Return {functions, classes} of a tiny run, whose files lie in a folder."""
    data, out, memory = folder / "data", folder / "out", folder / "memory"
    memory.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    prepare = [sys.executable, "-m", "orchestrator", "prepare", "quickstart", f"--data_dir={data}"]
    traced = [sys.executable, "-m", "benchmarks.entered", str(folder / "entered.json"), str(out)]
    settings = ["--n_layer=1", "--n_embd=16", "--eval_iters=1", "--eval_interval=4", "--max_iters=40"]
    train = [*traced, "configs/quickstart.py", f"--data_dir={data}", f"--out_dir={out}", f"--memory_dir={memory}"]
    for command in (prepare, [*train, *settings, "--device=cpu"]):
        subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads((folder / "entered.json").read_text())
    return found


class Entered:
    """The own functions and classes that this process has entered until a folder held a checkpoint."""

    def __init__(self, out_dir: Path) -> None:
        self.functions, self.classes = set[CodeType](), set[str]()
        self._out_dir, self._is_over = out_dir, False

    def hook(self, frame: FrameType, event: str, _: Any) -> None:
        """Note a function at its first call, for sys.setprofile."""
        code = frame.f_code
        if event != "call" or self._is_over or code in self.functions:
            return
        is_dataclass = code.co_filename == "<string>" and code.co_name == "__init__"
        is_ours = code.co_filename.startswith(ROOMS) and code.co_name not in NOT_COUNTED
        if not is_dataclass and not (is_ours and code.co_flags & CO_OPTIMIZED):  # else it is the body of a class
            return
        if any(self._out_dir.glob("checkpoint_*/state.json")):
            self._is_over = True
            return
        owner = next(iter(frame.f_locals.values()), None) if code.co_varnames[:1] in (("self",), ("cls",)) else None
        kind = owner if isinstance(owner, type) else type(owner)
        if kind.__module__.partition(".")[0] in ("orchestrator", "model"):
            self.classes.add(f"{kind.__module__}.{kind.__qualname__}")
        if not is_dataclass:
            self.functions.add(code)

    def as_json(self) -> dict[str, Any]:
        """Return {functions: {file: [names]}, classes: [names]}."""
        files = {code.co_filename for code in self.functions}
        names = {
            file: sorted(code.co_qualname for code in self.functions if code.co_filename == file) for file in files
        }
        return {
            "functions": {str(Path(file).relative_to(ROOT)): found for file, found in names.items()},
            "classes": sorted(self.classes),
        }


def main(report: str, out_dir: str, *argv: str) -> None:
    """Train in this process under the hook, and write a report."""
    entered = Entered(Path(out_dir))
    sys.argv[1:] = argv
    threading.setprofile(entered.hook)
    sys.setprofile(entered.hook)
    try:
        runpy.run_module("orchestrator.loop", run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
    finally:
        sys.setprofile(None)
    Path(report).write_text(json.dumps(entered.as_json()))


if __name__ == "__main__":
    main(*sys.argv[1:])
