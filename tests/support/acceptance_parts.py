"""Sections that do what real ones do when something is wrong with a machine."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from benchmarks.gpu.child import Report, Setting
from benchmarks.gpu.sections import Section


def part(name: str, limit_s: float = 60.0) -> Section:
    """Return one of the sections below."""
    return Section(name, f"{__name__}:{name}", 1, limit_s, on_cpu=True)


def hang(setting: Setting, report: Report) -> None:
    """Start another process, tell its id, and never end."""
    report.claim("it has begun", True)
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    Path(setting.memory_dir, "state").write_bytes(b"a state")
    report.figure("folders", [str(setting.folder), setting.memory_dir])
    report.figure("other", other.pid)
    time.sleep(600)


def crash(_setting: Setting, report: Report) -> None:
    """Find something, then fail."""
    report.figure("found", 1)
    raise ValueError("the driver went away")


def hold(_setting: Setting, report: Report) -> None:
    """Claim what is so."""
    report.claim("two and two are four", True, "4")


def fail(_setting: Setting, report: Report) -> None:
    """Claim what is not so."""
    report.claim("two and two are five", False, "4")


def unfit(_setting: Setting, report: Report) -> None:
    """Tell that this machine cannot tell."""
    report.skip("needs two GPUs")


def nest(setting: Setting, report: Report) -> None:
    """Have a part of its own that fails, and one that hangs, and go on."""
    report.figure("crashed", setting.call(f"{__name__}:crash", "one", 60).exit_code)
    report.figure("hung", setting.call(f"{__name__}:hang", "two", 1).failed)
