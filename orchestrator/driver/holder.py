"""Holder: which process a driver is, as driver.json names it, and whether that process has certainly ended."""

from __future__ import annotations

import json
import os
import platform
import uuid
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from pathlib import Path

from orchestrator.host.machine import boot_id

MISSED_BEATS = 3  # a driver that is silent for so many intervals is taken for dead
_MAX_BEAT_INTERVAL_S = 60.0  # of others' files, we believe no more


@dataclass(frozen=True)
class Holder:
    """A driver, as driver.json names it.

    driver: an id that no two starts share.
    machine, process_started: with host and pid, they name the process for whoever can see it (`is_gone`).
    started_at: for people only.
    """

    driver: str
    host: str
    pid: int
    machine: str | None
    process_started: int | None
    started_at: str
    beat_interval_s: float

    def __str__(self) -> str:
        return f"the driver on {self.host} (pid {self.pid}, started {self.started_at})"

    @property
    def patience_s(self) -> float:
        return MISSED_BEATS * self.beat_interval_s

    def is_gone(self) -> bool:
        """Return whether the process has certainly ended; False also where this process cannot know."""
        if self.machine is None or (self.host, self.machine) != (platform.node(), machine()):
            return False
        try:
            os.kill(self.pid, 0)
            return self.process_started not in (None, process_started(self.pid))
        except ProcessLookupError:
            return True
        except OSError:  # somebody else's process
            return False


def this_driver(beat_interval_s: float) -> Holder:
    """Return this process as a driver, with a new id."""
    return Holder(
        driver=uuid.uuid4().hex,
        host=platform.node(),
        pid=os.getpid(),
        machine=machine(),
        process_started=process_started(os.getpid()),
        started_at=datetime.now(UTC).isoformat(timespec="seconds"),
        beat_interval_s=beat_interval_s,
    )


def parse(text: bytes | None) -> Holder | None:
    """Return the driver that the content of driver.json names, None where it is missing or damaged."""
    try:
        known = json.loads(text or b"")
        holder = Holder(**{field.name: known[field.name] for field in fields(Holder)})
        is_sane = 0 < holder.pid < 2**31 and 0 < holder.beat_interval_s <= _MAX_BEAT_INTERVAL_S
    except (ValueError, TypeError, KeyError):
        return None
    return holder if is_sane else None


def machine() -> str | None:
    """Return a name that processes share if they can see each other by pid, None where that cannot be told.

    Containers on one machine share its boot, and often a host name, but not the numbers of processes.
    """
    try:
        return f"{booted} {Path('/proc/self/ns/pid').readlink()}" if (booted := boot_id()) else None
    except OSError:
        return None


def process_started(pid: int) -> int | None:
    """Return when a process of this machine was started, in ticks since boot; None where it has ended.

    Source: proc_pid_stat(5), fields 3 and 22, counted behind the name, which may have blanks in it.
    """
    try:
        values = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if values[0] in "ZX" else int(values[19])
