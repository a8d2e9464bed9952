"""This machine: what tells it from others, which files are its own, and how much of it this process may use."""

from __future__ import annotations

import math
import os
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

_DISKS = {"apfs", "btrfs", "ext2", "ext3", "ext4", "f2fs", "overlay", "tmpfs", "xfs", "zfs"}


def boot_id() -> str | None:
    """Return what Linux has drawn for this start of the machine, the same in all of its containers; else None."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return None


def seen_as(path: str) -> str | None:
    """Return a name for a file or folder that all have in common who see this very one, None where there is none.

    On a disk of this machine that is machine, device and inode; elsewhere, as on a file server, the path.
    """
    try:
        place = Path(path).resolve()
        found = place.stat()
    except OSError:
        return None
    above = [mount for mount in psutil.disk_partitions(all=True) if place.is_relative_to(mount.mountpoint)]
    above.reverse()  # of several at one mount point the last is the one that is seen
    if above and max(above, key=lambda mount: len(mount.mountpoint)).fstype in _DISKS:
        return f"{boot_id() or socket.gethostname()}:{found.st_dev}:{found.st_ino}"
    return str(place)


def usable_cpus(root: str = "/") -> int:
    """Return how many processors this process may use: by its affinity and by the limits of its control groups.

    A container's limit of two on a machine of 64 is two; a part of a processor counts as one. root: for tests.
    """
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([cpus, *(math.ceil(quota) for quota in _cpu_quotas(Path(root)))]))


def _cpu_quotas(root: Path) -> Iterator[float]:
    """Yield the limits, in processors, of this process's control group and of those above it.

    Source: https://docs.kernel.org/admin-guide/cgroup-v2.html (cpu.max), and for version 1
    https://docs.kernel.org/scheduler/sched-bwc.html.
    """
    groups = root / "sys/fs/cgroup"
    for controllers, path in _control_groups(root):
        hierarchy = groups / controllers if controllers else groups
        above = [hierarchy]
        for part in Path(path).parts[1:]:
            above.append(above[-1] / part)
        for folder in above:  # a container may see its own alone, at the top
            with suppress(OSError, ValueError):  # no limit, or none that is told this way
                if controllers:
                    names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
                    quota_us, period_us = (int((folder / name).read_text()) for name in names)
                else:
                    quota_us, period_us = map(int, (folder / "cpu.max").read_text().split())
                if quota_us > 0 and period_us > 0:
                    yield quota_us / period_us


def _control_groups(root: Path) -> Iterator[tuple[str, str]]:
    """Yield (controllers, path) of this process's groups that may limit processors; controllers: "" in version 2."""
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers or "cpu" in controllers.split(","):
                yield controllers, path
