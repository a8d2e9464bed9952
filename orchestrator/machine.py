"""This machine among others: what tells it from them, and which files are its own."""

from __future__ import annotations

import socket
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
