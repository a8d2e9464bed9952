"""A part of the acceptance in a process of its own: what it is told, what it has found, and how it is ended.

    python -m benchmarks.gpu.child benchmarks.gpu.kernels:attention SETTING MORE

What has been found is written to a file at once: whatever ends the process takes none of it away. Must not know what
is measured, and imports nothing that has to be installed, so that a machine's lack of packages can be told.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from orchestrator.worker.environment import DEFAULTS

ROOT = Path(__file__).resolve().parents[2]
LONG_S = 600.0  # for parts of a section: its own limit comes first
_LAST_S = 10.0  # in which a process that was killed is gone, unless the driver of its GPU holds it
_TAIL_CHARACTERS = 2000


def cache_in(folder: Path) -> dict[str, str]:
    """Return the variables by which PyTorch keeps what it has compiled in a folder, and finds there what it had."""
    return {"TORCHINDUCTOR_CACHE_DIR": str(folder), "TRITON_CACHE_DIR": str(folder / "triton")}


class Report:
    """What a process has found: claims that hold or do not, figures, or why it was not to be found here."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._found: dict[str, Any] = {"claims": [], "figures": {}, "skipped": ""}
        self._write()

    @property
    def figures(self) -> dict[str, Any]:
        """What was noted so far."""
        return dict(self._found["figures"])

    def claim(self, text: str, holds: bool, saw: str = "") -> None:
        """Note whether a claim holds, and by what."""
        self._found["claims"].append({"claim": text, "holds": bool(holds), "saw": saw})
        self._write()

    def figure(self, name: str, value: Any) -> None:
        """Note a JSON value."""
        self._found["figures"][name] = value
        self._write()

    def skip(self, why: str) -> None:
        """Note why this machine cannot tell."""
        self._found["skipped"] = why
        self._write()

    def _write(self) -> None:
        scratch = self._path.with_suffix(".scratch")
        scratch.write_text(json.dumps(self._found), encoding="utf-8")
        scratch.replace(self._path)


@dataclass(frozen=True)
class Found:
    """What has become of a process. failed: why it did not come to its end, "" if it did."""

    claims: list[dict[str, Any]]
    figures: dict[str, Any]
    skipped: str
    failed: str
    exit_code: int | None
    seconds: float
    tail: str

    def to_json(self) -> dict[str, Any]:
        """Return it as a JSON value; the tail of the log only where something is wrong."""
        value = asdict(self)
        if not self.failed and all(claim["holds"] for claim in self.claims):
            del value["tail"]
        return value


@dataclass(frozen=True)
class Setting:
    """Where a part runs.

    device: cuda or cpu. is_tiny: with tiny shapes, to try the program itself. folder: the part's own, deleted after
    it; memory_dir: the same in a memory file system.
    """

    device: str
    is_tiny: bool
    folder: Path
    memory_dir: str

    @property
    def is_on_gpu(self) -> bool:
        return self.device != "cpu"

    def start(self, where: str, name: str, variables: Mapping[str, str] | None = None, **more: Any) -> Child:
        """Start a part of this part, which ends with it at the latest; name: what no other of its folder has."""
        return Child(self, where, name, variables, more)

    def call(self, where: str, name: str, limit_s: float, **more: Any) -> Found:
        """Start a part of this part and wait for it."""
        return self.start(where, name, None, **more).finish(limit_s)


class Child:
    """A process that runs `where` (module:function) with a setting, a report and what else it is given.

    is_leader: it gets a process group of its own, which ends with it.
    """

    def __init__(
        self,
        setting: Setting,
        where: str,
        name: str,
        variables: Mapping[str, str] | None = None,
        more: Mapping[str, Any] | None = None,
        is_leader: bool = False,
    ) -> None:
        self._report, self._log = setting.folder / f"{name}.json", setting.folder / f"{name}.log"
        self._is_leader = is_leader
        words = {**asdict(setting), "folder": str(setting.folder), "report": str(self._report)}
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        command = [sys.executable, "-m", "benchmarks.gpu.child", where, json.dumps(words), json.dumps(more or {})]
        self._began_s, self._over_s = time.monotonic(), 0.0
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**DEFAULTS, **os.environ, "PYTHONPATH": os.pathsep.join(paths), **(variables or {})},
                start_new_session=is_leader,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_over(self) -> bool:
        """Whether it has ended. We reap it only in `end`: until then no other process gets its group's number."""
        if self._process.returncode is None and not self._over_s:
            ended = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            self._over_s = time.monotonic() if ended else 0.0
        return self._process.returncode is not None or bool(self._over_s)

    @property
    def seconds(self) -> float:
        """For how long it has run."""
        return (self._over_s or time.monotonic()) - self._began_s

    @property
    def is_ready(self) -> bool:
        """Whether its report says so."""
        return bool(self._found()["figures"].get("ready"))

    def finish(self, limit_s: float) -> Found:
        """Wait until it ends; end it after limit_s, counted from its start."""
        while not self.is_over and time.monotonic() - self._began_s < limit_s:
            time.sleep(0.01)
        return self.end("" if self.is_over else f"more than {limit_s:.0f} s")

    def end(self, failed: str = "") -> Found:
        """End it, where it has not ended yet, with its group, and return what it has found."""
        seconds = self.seconds
        if self._process.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL) if self._is_leader else self._process.kill()
        exit_code: int | None = None
        try:
            exit_code = self._process.wait(_LAST_S)
        except subprocess.TimeoutExpired:
            failed = f"{failed or 'killed'}, and cannot be ended: process {self.pid}"
        if exit_code and not failed:
            failed = f"exit code {exit_code}"
        tail = self._log.read_text(encoding="utf-8", errors="replace")[-_TAIL_CHARACTERS:]
        return Found(**self._found(), failed=failed, exit_code=exit_code, seconds=round(seconds, 2), tail=tail)

    def _found(self) -> dict[str, Any]:
        try:
            return dict(json.loads(self._report.read_text(encoding="utf-8")))
        except FileNotFoundError:  # it has not come so far
            return {"claims": [], "figures": {}, "skipped": ""}


def main(where: str, setting: str, more: str) -> None:
    """Run a part in this process, and end it with all its threads: one of them may be stuck."""
    words = json.loads(setting)
    report = Report(Path(words.pop("report")))
    module, _, function = where.partition(":")
    call = getattr(importlib.import_module(module), function)
    call(Setting(**{**words, "folder": Path(words["folder"])}), report, **json.loads(more))
    leave(0)


def leave(exit_code: int) -> None:
    """End this process at once."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


if __name__ == "__main__":
    main(*sys.argv[1:])
