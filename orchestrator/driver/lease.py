"""Lease: one driver at a time works on an out_dir. A second is refused; one that was cut off finds it out and stops.

    <out_dir>/driver.json    the driver, and a count that goes up at every beat

We ask storage for no more than read, write and delete: conditional writes differ too much between object stores. We
compare no clocks either: a newcomer watches whether the file changes. It need not wait if the process is certainly
gone, which only that process's own machine can tell. Of two that begin at the same moment the last writer stays: each
reads again before it touches anything else (`confirm`), and again at every beat.

Knows storage, and no Ray.
"""

from __future__ import annotations

import json
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict

from orchestrator.driver.holder import MISSED_BEATS, Holder, parse, this_driver
from orchestrator.errors import CheckpointError, ConfigError, UndeletableError
from orchestrator.host.signals import STOP_SIGNALS
from orchestrator.storage.run_folder import RUN_FILE, RunFolder
from orchestrator.storage.transfer import removing_new_folders

logger = logging.getLogger(__name__)

LEASE_FILE = "driver.json"
_BEAT_INTERVAL_S = 5.0
_POLLS_PER_BEAT = 5
_READ_TIMEOUT_S = 10.0
_GIVEN_BACK = {"given_back": True}
_END_TIMEOUT_S = 10.0  # for a beat that hangs in storage when the run ends


class Lease:
    """This driver's claim to an out_dir. Use: `wait_until_free`, then within `held` first `confirm`, then work.

    successor: the driver that has replaced this one, once we know; nothing may be written from then on.
    """

    def __init__(
        self,
        folder: RunFolder,
        beat_interval_s: float = _BEAT_INTERVAL_S,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.folder, self._clock, self._sleep = folder, clock, sleep
        self._me = this_driver(beat_interval_s)
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
            f"out_dir={self.folder.out_dir} was taken over by {self.successor}, because this driver showed no life "
            f"for {self._me.patience_s:g} s: its process or its storage stood still. It stops, that one goes on"
        )

    def wait_until_free(self) -> None:
        """Return when no driver works here: at once, or after watching for as long as a living one may be silent.

        Raises:
            ConfigError: one does; says which, and what to do.
            CheckpointError: storage cannot be read.
        """
        found = self._read()
        if found is None or _is_given_back(found):
            return
        holder = parse(found)
        if holder and holder.is_gone():
            logger.info("%s is gone: taking over at once", holder)
            return
        _watch(self.folder, found, holder, (holder or self._me).patience_s, self._sleep)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Claim the out_dir, show life while the block runs, and give it back however the block ends.

        Raises:
            CheckpointError: storage cannot be written.
        """
        with removing_new_folders(self.folder.fs, self.folder.root):  # a run refused later leaves nothing behind
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

    def confirm(self) -> None:
        """Make sure that no other driver began at the same moment: give its write time to arrive, and read again.

        Raises:
            ConfigError: one did.
        """
        settle_s = min(1.0, self._me.beat_interval_s / _POLLS_PER_BEAT)
        self._sleep(max(0.0, self._claimed_at_s + settle_s - self._clock()))
        if self.check():
            raise _in_use(self.folder, str(self.successor))

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
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        while not self.successor and not self._ending.wait(self._me.beat_interval_s):
            self.beat()

    def _look(self) -> None:
        holder = parse(self._read())
        if holder and holder.driver != self._me.driver:
            self.successor = str(holder)
        elif not holder and self._start_in_run_json() not in (None, self._me.driver, self._start_before):
            self.successor = "a driver that has ended since"  # a file that is merely lost or damaged is written again

    def _tolerate(self, act: Callable[[], None]) -> None:
        try:
            act()
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
            holder = parse(self._read())
            if holder and holder.driver == self._me.driver:
                self._give_back()
        except CheckpointError as error:  # the run has ended all the same
            logger.warning("%s stays behind, the next driver may wait %g s: %s", LEASE_FILE, self._me.patience_s, error)

    def _give_back(self) -> None:
        try:
            self.folder.delete(LEASE_FILE)
        except UndeletableError:
            self.folder.write_json(LEASE_FILE, _GIVEN_BACK, is_lasting=False)

    def _write(self) -> None:
        self._beats += 1
        beat = {**asdict(self._me), "beat": self._beats}
        self.folder.write_json(LEASE_FILE, beat, is_lasting=False)  # after a power cut no driver runs

    def _read(self) -> bytes | None:
        return self.folder.read(LEASE_FILE, _READ_TIMEOUT_S)

    def _start_in_run_json(self) -> str | None:
        return self.folder.read_json(RUN_FILE, _READ_TIMEOUT_S).get("start_id")


def _watch(
    folder: RunFolder, found: bytes, holder: Holder | None, patience_s: float, sleep: Callable[[float], None]
) -> None:
    """Return when a driver has ended, or has shown no life for patience_s; found: the content of its driver.json.

    Raises:
        ConfigError: it is alive.
    """
    who = str(holder) if holder else f"a driver that a damaged {LEASE_FILE} does not name"
    told = folder.out_dir, who, patience_s
    logger.warning("out_dir=%s is in use by %s: waiting up to %g s to see whether it is alive", *told)
    polls = MISSED_BEATS * _POLLS_PER_BEAT
    for _ in range(polls):  # not until some time: if both stood still in one machine, it has its chance afterwards
        sleep(patience_s / polls)
        now = folder.read(LEASE_FILE, _READ_TIMEOUT_S)
        if now is None or _is_given_back(now) or (holder and holder.is_gone()):
            logger.info("%s has ended", who)
            return
        if now != found:
            raise _in_use(folder, str(parse(now) or who))
    logger.warning("%s has shown no life for %g s: taking over", who, patience_s)


def _in_use(folder: RunFolder, who: str) -> ConfigError:
    return ConfigError(
        f"out_dir={folder.out_dir} is in use by {who}, which is alive: wait until it ends, stop it "
        "(Ctrl-C or `kill PID` there, `ray job stop ID`), or give another --out_dir"
    )


def _is_given_back(text: bytes) -> bool:
    try:
        return bool(json.loads(text) == _GIVEN_BACK)
    except ValueError:
        return False
