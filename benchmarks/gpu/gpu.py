"""Whether this machine's GPU keeps what orchestrator promises: bits, rescues, pauses, memory, speed; under six minutes.

Every section is a process of its own with a limit of its own; one that hangs or fails takes nothing with it. What is
right or wrong runs side by side, what is timed alone, afterwards. It trains small models in temporary folders, needs no
Ray, no data and no network, and one GPU; sections that need more say so and are passed over.

The exit code is 0 if all claims that were tested hold, 1 if one does not or could not be tested, and 2 if no GPU can
be used here.

--device=cpu tries the program itself, with tiny shapes: it says nothing of a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from benchmarks.gpu.child import Child, Setting, cache_in
from benchmarks.gpu.sections import ENVIRONMENT, SECTIONS, Section

Result = dict[str, Any]
_FILE = "gpu.json"
_MEMORY = "/dev/shm"
_TELL_EVERY_S = 15.0
_ROOM_GB = 20
_FREE = 0.95  # of the GPU's memory
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_PATIENCE_ON_CPU = 5  # limits are those of a machine with a GPU
_LEAST = 0.5  # of what a section is expected to take has to be left, or it is not begun


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare this benchmark's options."""
    names = ", ".join(section.name for section in SECTIONS)
    parser.add_argument("--out", dest="json", type=Path, metavar="FILE", help=f"the same as --json (default: {_FILE})")
    parser.add_argument("--only", type=_chosen, default=SECTIONS, metavar="A,B", help=f"of {names} (default: all)")
    parser.add_argument("--budget", type=_seconds, default=345.0, help="seconds for all (default: %(default).0f)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try this program, tiny")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes on a GPU: to try this program")
    parser.set_defaults(json=Path(_FILE))


def _file(path: Path) -> Path:
    """Return where the result goes; in a folder it is called gpu.json.

    Raises:
        SystemExit: 2, it cannot be written there.
    """
    path = path / _FILE if path.is_dir() else path
    if not path.parent.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        print(f"error: --out={path} cannot be written: give a file in a folder of yours", file=sys.stderr)
        raise SystemExit(2)
    return path


def _chosen(text: str) -> tuple[Section, ...]:
    wanted, known = text.split(","), {section.name for section in SECTIONS}
    if unknown := [name for name in wanted if name not in known]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(sorted(known))}")
    return tuple(section for section in SECTIONS if section.name in wanted)


def _seconds(text: str) -> float:
    with suppress(ValueError):
        if 0 < (seconds := float(text)) < float("inf"):
            return seconds
    raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds above 0")


def run(args: argparse.Namespace) -> Result:
    """Check this machine, print a line for each claim as it comes, and return what was found.

    Raises:
        SystemExit: 2, no GPU can be used here, or the result cannot be written; 128 and more: a signal has ended it.
    """
    args.json = _file(args.json)
    is_on_cpu = args.device == "cpu"
    patience = _PATIENCE_ON_CPU if is_on_cpu else 1
    acceptance = Acceptance(args.device, is_on_cpu or args.tiny, args.budget, args.json, patience)
    with ended_in_order():
        if unfit := acceptance.ask_environment():
            print(f"error: {unfit}", file=sys.stderr)
            raise SystemExit(2)
        acceptance.run(args.only)
    _say(acceptance.verdict())
    return acceptance.result


def exit_code(result: Result) -> int:
    """Return 0 if all that was tested holds, else 1."""
    return 0 if result["holds"] else 1


@contextmanager
def ended_in_order() -> Iterator[None]:
    """Let no section be left behind when a signal ends this process."""

    def end(number: int, _frame: Any) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, end) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Running:
    """A section that runs, in folders of its own that are deleted after it."""

    def __init__(self, section: Section, device: str, is_tiny: bool, limit_s: float) -> None:
        self.section, self._limit_s = section, limit_s
        self._folder = Path(tempfile.mkdtemp(prefix=f"gpu-{section.name}-"))
        self._memory = Path(tempfile.mkdtemp(prefix="gpu-", dir=_MEMORY if Path(_MEMORY).is_dir() else None))
        setting = Setting(device, is_tiny, self._folder, str(self._memory))
        # compiled in its own folder, so that the first time is what it says, and nothing is left in the user's
        cache = cache_in(self._folder / "cache")
        self._child = Child(setting, section.where, "section", cache, is_leader=True)

    @property
    def is_over(self) -> bool:
        """Whether it has ended, or is to be ended."""
        return self._child.is_over or self._child.seconds > self._limit_s

    def finish(self) -> Result:
        """Wait for it, end it at its limit, and return what it has found."""
        try:
            return self._child.finish(self._limit_s).to_json()
        finally:
            self.close()

    def close(self) -> None:
        """End it and delete its folders."""
        self._child.end()
        for folder in (self._folder, self._memory):
            shutil.rmtree(folder, ignore_errors=True)


class Acceptance:
    """One check of this machine. result: what was found so far, which a file gets as it grows.

    patience: what sections' limits are multiplied by.
    """

    def __init__(self, device: str, is_tiny: bool, budget_s: float, file: Path, patience: float = 1) -> None:
        self._device, self._is_tiny, self._file, self._patience = device, is_tiny, file, patience
        self._began_s, self._budget_s = time.monotonic(), budget_s
        self._running: list[Running] = []
        self._told_s = 0.0
        self.result: Result = {"device": device, "is_tiny": is_tiny, "holds": False, "environment": {}, "sections": {}}

    def ask_environment(self) -> str:
        """Print what this machine is; return why it cannot be checked, "" if it can."""
        found = Running(ENVIRONMENT, self._device, self._is_tiny, self._patience * ENVIRONMENT.limit_s).finish()
        figures = self.result["environment"] = found["figures"]
        for name, value in figures.items():
            _say(f"{name:>24}  {value}")
        if found["failed"]:
            return f"this machine could not be looked at: {found['failed']}\n{found['tail']}"
        if self._device != "cpu" and figures.get("memory_dir_gb", _ROOM_GB) < _ROOM_GB:
            _say(f"warning: {_MEMORY} has less than {_ROOM_GB} GB: sections may fail (docker run --shm-size)")
        if figures.get("gpu_memory_free", 1) < _FREE:
            _say("warning: another process uses this GPU: sections may fail, and what is timed says nothing")
        return str(figures.get("unfit", ""))

    def run(self, sections: Sequence[Section]) -> None:
        """Run sections, those that are not timed side by side, and see whether all that they claim holds."""
        is_fit = [self._device != "cpu" or section.on_cpu for section in sections]
        for section in (section for section, fits in zip(sections, is_fit, strict=True) if not fits):
            self._told(section, {"skipped": "needs a GPU"})
        fit = [section for section, fits in zip(sections, is_fit, strict=True) if fits]
        timed = [section for section in fit if section.is_timed]
        try:
            others = [section for section in fit if not section.is_timed]
            self._run(others, _at_once(self.result["environment"]), sum(section.expected_s for section in timed))
            self._run(timed, 1, 0.0)
        finally:
            for running in self._running:
                running.close()
        found = self.result["sections"].values()
        claims = [claim["holds"] for each in found for claim in each.get("claims", [])]
        self.result["holds"] = all(claims) and not any(each.get("failed") for each in found)
        self.result["seconds"] = round(time.monotonic() - self._began_s, 1)
        self._write()

    def verdict(self) -> str:
        """Return the last line."""
        found = self.result["sections"]
        claims = [claim["holds"] for each in found.values() for claim in each.get("claims", [])]
        lines = [f"{sum(claims)} claims hold, {len(claims) - sum(claims)} do not"]
        if failed := [name for name, each in found.items() if each.get("failed")]:
            lines.append(f"without an end: {', '.join(failed)}")
        lines.append(f"{self.result['seconds']:.0f} s; all figures are in {self._file}")
        if self._is_tiny:
            lines.append(f"tiny shapes on {self._device}: this says that the program works, and nothing of a GPU")
        return "\n".join(lines)

    def _run(self, sections: Sequence[Section], at_once: int, reserved_s: float) -> None:
        """Run so many sections at once; reserved_s: what the budget keeps for others."""
        waiting = list(sections)
        while waiting or self._running:
            while waiting and len(self._running) < at_once:
                self._begin(waiting.pop(0), reserved_s)
            for running in [each for each in self._running if each.is_over]:
                self._running.remove(running)
                self._told(running.section, running.finish())
            self._tell_of_waiting()
            time.sleep(0.02)

    def _begin(self, section: Section, reserved_s: float) -> None:
        left_s = self._budget_s - reserved_s - (time.monotonic() - self._began_s)
        if left_s < section.expected_s * _LEAST:
            self._told(section, {"failed": f"not begun, too little of --budget={self._budget_s:.0f} is left"})
            return
        _say(f"    ... {section.name}")
        self._told_s = time.monotonic()
        limit_s = min(self._patience * section.limit_s, left_s)
        self._running.append(Running(section, self._device, self._is_tiny, limit_s))

    def _tell_of_waiting(self) -> None:
        if self._running and time.monotonic() - self._told_s > _TELL_EVERY_S:
            self._told_s = time.monotonic()
            names = ", ".join(running.section.name for running in self._running)
            _say(f"    {self._told_s - self._began_s:.0f} s: waiting for {names}")

    def _told(self, section: Section, found: Result) -> None:
        """Print what a section has found, and keep it."""
        self.result["sections"][section.name] = found
        for line in _lines(section.name, found):
            _say(line)
        self._write()

    def _write(self) -> None:
        self._file.write_text(json.dumps(self.result, indent=2) + "\n", encoding="utf-8")


def _say(text: str) -> None:
    """Print a line; where nobody reads any more, as behind `| head`, the check goes on: its file gets all."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _at_once(environment: dict[str, Any]) -> int:
    """Return how many sections run side by side: each needs about two processors, and at most 8 GB of the GPU."""
    return max(1, int(min(environment.get("cores", 2) // 2, environment.get("gpu_memory_gb", _ROOM_GB) // 8)))


def _lines(name: str, found: Result) -> Iterator[str]:
    """Yield the table's lines for one section."""
    for claim in found.get("claims", []):
        saw = f"  [{claim['saw']}]" if claim["saw"] else ""
        yield f"{'pass' if claim['holds'] else 'FAIL'}  {name:<24}  {claim['claim']}{saw}"
    if found.get("failed"):
        tail = "".join(f"\n      | {line}" for line in found.get("tail", "").splitlines()[-12:])
        yield f"FAIL  {name:<24}  {found['failed']}{tail}"
    elif found.get("skipped"):
        yield f"skip  {name:<24}  {found['skipped']}"
    if figures := _flat(found.get("figures", {})):
        yield f"      {'':<24}  {', '.join(figures)}"


def _flat(figures: dict[str, Any], prefix: str = "") -> list[str]:
    """Return `name=value` of all figures, those in others with both names."""
    flat = []
    for name, value in figures.items():
        if isinstance(value, dict):
            flat += _flat(value, f"{prefix}{name}.")
        else:
            flat.append(f"{prefix}{name}={value:.4g}" if isinstance(value, float) else f"{prefix}{name}={value}")
    return flat
