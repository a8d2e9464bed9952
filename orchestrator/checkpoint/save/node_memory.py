"""NodeMemory: the newest states in the memory of this node. They outlive every process on it, but not the node.

    <memory_dir>/nanogpt-orchestrator-<uid>/<run_id>/checkpoint_<iter_num>_<attempt>.0-of-2/state.json, *.safetensors
                                                    /.slot-<random>/          a share that is being written
                                                    /.alive-<attempt>-<share>     locked while its process lives

The ranks of a node share a state between them: each keeps a share, a folder with the files and the format of a
checkpoint in storage. A share is renamed once it is written. A state is whole once all its shares are here. Nothing
here waits for another process. Knows nothing of ranks on other nodes or of live models.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from orchestrator.checkpoint.store import Checkpoint, iter_num_of, parse_state
from orchestrator.errors import CheckpointError

logger = logging.getLogger(__name__)

_SHARE = re.compile(r"(checkpoint_\d{8,}_\w+)\.(\d+)-of-(\d+)")
_RUN_ID = re.compile(r"\w{1,64}")
_SPARE_FRACTION = 0.1  # of the machine's memory stays free: Ray kills workers when 5% are left
_LOCK = ".lock"


class NodeMemory:
    """The states of one run in the memory file system of this node.

    Raises:
        OSError: there is no such folder, or it cannot be written.
        CheckpointError: it belongs to another user.
    """

    def __init__(self, memory_dir: str, run_id: str) -> None:
        if not Path(memory_dir).is_dir():
            raise CheckpointError(f"memory_dir={memory_dir} is no folder on this node")
        self.path = run_path(memory_dir, run_id)
        self.root = self.path.parent
        _make_private(self.root)
        self._lock = -1  # of the run's folder: all its processes share it until they end
        while self._lock < 0:
            _make_private(self.path)
            with suppress(FileNotFoundError):  # somebody who needed the room has just deleted it
                self._lock = _locked(self.path / _LOCK, fcntl.LOCK_SH)
        self._alive: int | None = None
        self._stood_in: list[int] = []  # locks, kept until this process ends
        for path in self.path.glob(".slot-*"):  # half-written by a process that was killed: no rank writes this early
            shutil.rmtree(path, ignore_errors=True)
        self._older = {path.name for path in _listed(self.path)}
        self.node_id = _written_once(self.root / ".node", os.urandom(8).hex())

    def is_whole(self, name: str, shares: int) -> bool:
        """Return whether all shares of a state are here; they may be damaged."""
        return all(share_path(self.path, name, share, shares).exists() for share in range(shares))

    def shares_of_earlier(self, attempt: str) -> list[Path]:
        """Return where the shares of attempts before this one lie."""
        found = []
        for path in _listed(self.path):
            match = _SHARE.fullmatch(path.name)
            if match and path.name in self._older and not match[1].endswith(f"_{attempt}"):
                found.append(path)
        return found

    def forget_other_than(self, attempt: str, keep: str = "") -> None:
        """Delete the states of earlier attempts but one. A process that still has one of them open keeps its memory.

        States of later attempts stay: this may be an attempt that was given up, and comes back.
        """
        for path in self.shares_of_earlier(attempt):
            if not path.name.startswith(f"{keep}."):
                shutil.rmtree(path, ignore_errors=True)

    def hold_liveness_lock(self, attempt: str, share: int) -> None:
        """Hold a file lock for this share, until it is released or the process ends: the others see that it lives."""
        for path in self.path.glob(".alive-*"):
            if not path.name.startswith(f".alive-{attempt}-"):
                path.unlink(missing_ok=True)
        self._alive = _locked(self._alive_path(attempt, share), fcntl.LOCK_EX)

    def release_liveness_lock(self) -> None:
        """Release the lock: from now on another process of this node may write this share."""
        if self._alive is not None:
            os.close(self._alive)
            self._alive = None

    def try_stand_in(self, attempt: str, share: int) -> bool:
        """Return whether the process that kept a share is gone, and this process now stands in for it."""
        try:
            self._stood_in.append(_locked(self._alive_path(attempt, share), fcntl.LOCK_EX | fcntl.LOCK_NB))
        except OSError:
            return False
        return True

    def has_newer(self, iter_num: int, attempt: str) -> bool:
        """Return whether a share of a later state of this attempt is here."""
        names = (match[1] for path in _listed(self.path) if (match := _SHARE.fullmatch(path.name)))
        return any(name.endswith(f"_{attempt}") and iter_num_of(name) > iter_num for name in names)

    def _alive_path(self, attempt: str, share: int) -> Path:
        return self.path / f".alive-{attempt}-{share}"

    def close(self, is_finished: bool) -> None:
        """Leave the run's folder; if the run is finished, the last process of this node to leave deletes it."""
        self.release_liveness_lock()
        os.close(self._lock)
        if is_finished:
            _delete_unused(self.path)

    def check_room(self, wanted_bytes: int) -> None:
        """Check that this run can have so much here in all; if it cannot, delete the states of ended runs.

        Raises:
            CheckpointError: it does not fit, by the file system or by the machine's memory.
        """
        missing_bytes = wanted_bytes - self._room_bytes()
        others = [path for path in _listed(self.root) if path.is_dir() and path != self.path]
        if 0 < missing_bytes <= sum(map(_used_bytes, others)):  # else to delete them would not help
            self._delete_ended_runs()
        if (room_bytes := self._room_bytes()) < wanted_bytes:
            raise CheckpointError(
                f"two states are {wanted_bytes / 1e9:.2f} GB, and memory_dir={self.root.parent} has room for "
                f"{room_bytes / 1e9:.2f} GB: enlarge it (docker run --shm-size, an emptyDir with medium: Memory in "
                "Kubernetes), or give another --memory_dir"
            )

    def _room_bytes(self) -> int:
        stat = os.statvfs(self.path)
        free_bytes = max(0, min(stat.f_bavail * stat.f_frsize, spare_memory_bytes()))
        return free_bytes + _used_bytes(self.path)

    def _delete_ended_runs(self) -> None:
        for path in _listed(self.root):
            if path.is_dir() and path != self.path and _delete_unused(path):
                logger.warning("node memory was needed: the states of the ended run %s were deleted there", path.name)


def run_path(memory_dir: str, run_id: str) -> Path:
    """Return where a node keeps the states of a run.

    Raises:
        CheckpointError: run_id, which comes from storage, is no plain word.
    """
    if not _RUN_ID.fullmatch(run_id):
        raise CheckpointError(f"run_id={run_id!r} in run.json is no id of a run")
    return Path(memory_dir, f"nanogpt-orchestrator-{os.getuid()}", run_id)


def share_path(folder: Path, name: str, share: int, shares: int) -> Path:
    """Return where in a run's folder a share of a state lies."""
    return folder / f"{name}.{share}-of-{shares}"


def states_in(folder: Path) -> dict[str, dict[int, Checkpoint]]:
    """Return the states that are whole in a run's folder: name -> share -> its description.

    Damaged shares are left out. Changes nothing.
    """
    found: dict[str, dict[int, Checkpoint]] = {}
    shares_of: dict[str, int] = {}
    for path in _listed(folder):
        if not (match := _SHARE.fullmatch(path.name)):
            continue
        try:
            state = parse_state((path / "state.json").read_bytes(), str(path / "state.json"))
        except (OSError, CheckpointError) as error:
            logger.warning("a state in node memory is passed over: %s", error)
            continue
        found.setdefault(match[1], {})[int(match[2])] = Checkpoint(match[1], state)
        shares_of[match[1]] = int(match[3])
    return {name: shares for name, shares in found.items() if len(shares) == shares_of[name]}


def spare_memory_bytes() -> int:
    """Return the memory that this machine or container can give without coming near its limit."""
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    total, available = (int(fields[key].split()[0]) * 1024 for key in ("MemTotal", "MemAvailable"))
    with suppress(OSError, ValueError):  # no limit, or none that is told this way
        limit, used = (int(Path("/sys/fs/cgroup", name).read_text()) for name in ("memory.max", "memory.current"))
        total, available = min(total, limit), min(available, limit - used)
    return int(available - total * _SPARE_FRACTION)


def _make_private(path: Path) -> None:
    """Make a folder for this user alone: memory file systems are open to all users of a machine.

    Raises:
        CheckpointError: it is there, and another user's.
    """
    with suppress(FileExistsError):
        path.mkdir(mode=0o700)
    found = path.lstat()
    if found.st_uid != os.getuid() or path.is_symlink() or found.st_mode & 0o022:
        raise CheckpointError(f"{path} belongs to another user, or others may write to it: delete it")


def _locked(path: Path, how: int) -> int:
    """Return a lock.

    Raises:
        FileNotFoundError: it was deleted before it could be had.
        OSError: somebody else has it, and how says not to wait.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, how)
        if not os.path.samestat(os.fstat(descriptor), path.stat()):
            raise FileNotFoundError(errno.ENOENT, "deleted and made anew", str(path))
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _delete_unused(path: Path) -> bool:
    """Delete a run's folder unless a process uses it; return whether it is gone."""
    try:
        lock = _locked(path / _LOCK, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    shutil.rmtree(path, ignore_errors=True)
    os.close(lock)
    return True


def _written_once(path: Path, text: str) -> str:
    """Return the content of a file: `text`, if this process is the one that makes it."""
    scratch = path.with_name(f"{path.name}-{os.getpid()}")
    scratch.write_text(text)
    with suppress(FileExistsError):
        os.link(scratch, path)
    scratch.unlink()
    return path.read_text()


def _listed(path: Path) -> Iterator[Path]:
    with suppress(FileNotFoundError):
        yield from sorted(path.iterdir())


def _used_bytes(folder: Path) -> int:
    """Return the memory that a folder's files take, but for files that another rank deletes at the same time."""
    used_bytes = 0
    for path, _, files in os.walk(folder):
        for file in files:
            with suppress(FileNotFoundError):
                used_bytes += Path(path, file).stat().st_blocks * 512
    return used_bytes
