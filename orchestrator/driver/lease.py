"""Lease: one driver at a time works on an out_dir. A second is refused; one that was cut off finds it out and stops.

    <out_dir>/driver.json    who the driver is, and a count that goes up at every beat

Storage is asked for no more than read, write and delete: conditional writes differ too much between object stores. And
no clocks are compared: a newcomer watches whether the file changes. The wait is saved where it is certain that the
process is gone, which only its own machine can tell. Of two that begin at the same moment the
last writer stays: each reads again before it touches anything else (`confirm`), and again at every beat.

Knows storage, and no Ray.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import platform
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from orchestrator.checkpoint.store import CheckpointStore
from orchestrator.errors import CheckpointError, ConfigError
from orchestrator.host.machine import boot_id
from orchestrator.storage.reasons import reason_of

logger = logging.getLogger(__name__)

LEASE_FILE = "driver.json"
_BEAT_INTERVAL_S = 5.0
_MISSED_BEATS = 3  # a driver that is silent for so many intervals is taken for dead
_MAX_BEAT_INTERVAL_S = 60.0  # of what others wrote, no more is believed
_POLLS_PER_BEAT = 5
_READ_TIMEOUT_S = 10.0
_GIVEN_BACK = {"given_back": True}
_END_TIMEOUT_S = 10.0  # for a beat that hangs in storage when the run ends


@dataclass(frozen=True)
class Holder:
    """What driver.json says of a driver.

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
        return _MISSED_BEATS * self.beat_interval_s

    def is_gone(self) -> bool:
        """Return whether the process has certainly ended; False also where this process cannot know."""
        if self.machine is None or (self.host, self.machine) != (platform.node(), _machine()):
            return False
        try:
            os.kill(self.pid, 0)
            return self.process_started not in (None, _process_started(self.pid))
        except ProcessLookupError:
            return True
        except OSError:  # somebody else's process
            return False


class Lease:
    """This driver's claim to an out_dir. Use: `wait_until_free`, then within `held` first `confirm`, then work.

    successor: who has replaced this driver, once that is known; nothing may be written from then on.
    """

    def __init__(
        self,
        store: CheckpointStore,
        beat_interval_s: float = _BEAT_INTERVAL_S,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._store, self._clock, self._sleep = store, clock, sleep
        self._me = Holder(
            driver=uuid.uuid4().hex,
            host=platform.node(),
            pid=os.getpid(),
            machine=_machine(),
            process_started=_process_started(os.getpid()),
            started_at=datetime.now(UTC).isoformat(timespec="seconds"),
            beat_interval_s=beat_interval_s,
        )
        self.successor: str | None = None
        self._beats = 0
        self._claimed_at_s = 0.0
        self._start_before: str | None = None
        self._is_failing = False
        self._ending = threading.Event()

    @property
    def start_id(self) -> str:
        """What run.json must say while this driver works."""
        return self._me.driver

    @property
    def cut_off(self) -> str:
        """Say why this driver has to stop."""
        return (
            f"out_dir={self._store.out_dir} was taken over by {self.successor}, because this driver showed no life "
            f"for {self._me.patience_s:g} s: its process or its storage stood still. It stops, that one goes on"
        )

    def wait_until_free(self) -> None:
        """Return when no driver works here: at once, or after watching for as long as a living one may be silent.

        Raises:
            ConfigError: one does; says which, and what to do.
            CheckpointError: storage cannot be read.
        """
        found = self._read(LEASE_FILE)
        if found is None or _is_given_back(found):
            return
        holder = _parse(found)
        if holder and holder.is_gone():
            logger.info("%s is gone: taking over at once", holder)
            return
        self._watch(found, holder)

    def _watch(self, found: bytes, holder: Holder | None) -> None:
        who = str(holder) if holder else f"a driver that a damaged {LEASE_FILE} does not name"
        patience_s = (holder or self._me).patience_s
        logger.warning(
            "out_dir=%s is in use by %s: waiting up to %g s to see whether it is alive",
            self._store.out_dir,
            who,
            patience_s,
        )
        polls = _MISSED_BEATS * _POLLS_PER_BEAT
        for _ in range(polls):  # not until some time: if both stood still in one machine, it has its chance afterwards
            self._sleep(patience_s / polls)
            now = self._read(LEASE_FILE)
            if now is None or _is_given_back(now) or (holder and holder.is_gone()):
                logger.info("%s has ended", who)
                return
            if now != found:
                raise self._in_use(str(_parse(now) or who))
        logger.warning("%s has shown no life for %g s: taking over", who, patience_s)

    def _in_use(self, who: str) -> ConfigError:
        return ConfigError(
            f"out_dir={self._store.out_dir} is in use by {who}, which is alive: wait until it ends, stop it "
            "(Ctrl-C or `kill PID` there, `ray job stop ID`), or give another --out_dir"
        )

    @contextmanager
    def held(self) -> Iterator[None]:
        """Claim the out_dir, show life while the block runs, and give it back however the block ends.

        Raises:
            CheckpointError: storage cannot be written.
        """
        made = self._missing_folders()
        self._start_before = self._start_in_run_json()
        self._write()
        self._claimed_at_s = self._clock()
        thread = threading.Thread(target=self._keep_beating, name="lease", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._ending.set()
            thread.join(_END_TIMEOUT_S)
            if thread.is_alive():
                logger.warning("storage does not answer: %s stays behind", LEASE_FILE)
            else:
                self._release()
            for folder in made:
                with suppress(OSError):  # what has something in it stays
                    folder.rmdir()

    def confirm(self) -> None:
        """Make sure that no other driver began at the same moment: give its write time to arrive, and read again.

        Raises:
            ConfigError: one did.
        """
        settle_s = min(1.0, self._me.beat_interval_s / _POLLS_PER_BEAT)
        self._sleep(max(0.0, self._claimed_at_s + settle_s - self._clock()))
        if self.check():
            raise self._in_use(str(self.successor))

    def check(self) -> str | None:
        """Read again, and return who has replaced this driver: None too while storage does not answer."""
        self._tolerate(self._look)
        return self.successor

    def beat(self) -> None:
        """Show life, unless this driver was replaced. Storage that fails does not stop it: the next may pass."""

        def look_and_write() -> None:
            self._look()
            if not self.successor:
                self._write()

        self._tolerate(look_and_write)

    def _keep_beating(self) -> None:
        # Signals are for the main thread, which holds them back while Ray starts: in between, Ray would abort for one.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
        while not self.successor and not self._ending.wait(self._me.beat_interval_s):
            self.beat()

    def _look(self) -> None:
        holder = _parse(self._read(LEASE_FILE))
        if holder and holder.driver != self._me.driver:
            self.successor = str(holder)
        elif not holder and self._start_in_run_json() not in (None, self._me.driver, self._start_before):
            self.successor = "a driver that has ended since"  # a file that is merely lost or damaged is written again

    def _tolerate(self, act: Callable[[], None]) -> None:
        try:
            self._store.insisting(act, tells=False)
        except CheckpointError as error:
            if not self._is_failing:
                logger.warning("the run goes on, but its driver cannot show that it is alive: %s", error)
            self._is_failing = True
            return
        if self._is_failing:
            logger.info("storage answers again: the driver shows that it is alive")
        self._is_failing = False

    def _release(self) -> None:
        try:
            self._store.insisting(self._give_back, tells=False)
        except CheckpointError as error:  # the run has ended all the same
            logger.warning("%s stays behind, the next driver may wait %g s: %s", LEASE_FILE, self._me.patience_s, error)

    def _give_back(self) -> None:
        holder = _parse(self._read(LEASE_FILE))
        if not holder or holder.driver != self._me.driver:
            return
        self._store.fs.invalidate_cache()  # a listing from before would hide the file
        if not self._store.delete_file(LEASE_FILE):
            self._store.write_json(LEASE_FILE, _GIVEN_BACK, is_lasting=False)  # storage in which nothing can be deleted

    def _missing_folders(self) -> list[Path]:
        """Return what a claim makes on a disk, the deepest first, so that a run refused later leaves nothing behind."""
        folder = Path(self._store.root)
        is_local = isinstance(self._store.fs, LocalFileSystem)
        return [path for path in (folder, *folder.parents) if is_local and not path.exists()]

    def _write(self) -> None:
        self._beats += 1
        beat = {**asdict(self._me), "beat": self._beats}
        self._store.write_json(LEASE_FILE, beat, is_lasting=False)  # after a power cut no driver runs

    def _start_in_run_json(self) -> str | None:
        try:
            known = json.loads(self._read("run.json") or b"{}")
        except ValueError:
            return None
        return known.get("start_id") if isinstance(known, dict) else None

    def _read(self, name: str) -> bytes | None:
        """Return a file's content, None where there is none.

        Raises:
            CheckpointError: storage does not say.
        """
        fs, path = self._store.fs, self._store.path(name)
        try:
            return _cat(fs, path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except Exception as error:  # every storage has exceptions of its own
            raise CheckpointError(f"{path} cannot be read: {reason_of(error)}") from error


def _cat(fs: Any, path: str) -> bytes:
    limit = {"timeout": _READ_TIMEOUT_S} if fs.async_impl else {}
    try:
        return bytes(fs.cat_file(path, **limit))
    except OSError as error:
        if error.errno != errno.ESTALE:  # NFS: replaced by its driver while it was being opened
            raise
        return bytes(fs.cat_file(path, **limit))


def _is_given_back(text: bytes) -> bool:
    try:
        return bool(json.loads(text) == _GIVEN_BACK)
    except ValueError:
        return False


def _parse(text: bytes | None) -> Holder | None:
    """Return what driver.json says, None where it is missing or damaged."""
    try:
        known = json.loads(text or b"")
        holder = Holder(**{field.name: known[field.name] for field in fields(Holder)})
        is_sane = 0 < holder.pid < 2**31 and 0 < holder.beat_interval_s <= _MAX_BEAT_INTERVAL_S
    except (ValueError, TypeError, KeyError):
        return None
    return holder if is_sane else None


def _machine() -> str | None:
    """Return what two processes share that can see each other by pid, None where that cannot be told.

    Containers on one machine share its boot, and often a host name, but not the numbers of processes.
    """
    try:
        return f"{booted} {Path('/proc/self/ns/pid').readlink()}" if (booted := boot_id()) else None
    except OSError:
        return None


def _process_started(pid: int) -> int | None:
    """Return when a process of this machine was started, in ticks since boot; None where it has ended.

    Source: proc_pid_stat(5), fields 3 and 22, counted behind the name, which may have blanks in it.
    """
    try:
        values = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if values[0] in "ZX" else int(values[19])
