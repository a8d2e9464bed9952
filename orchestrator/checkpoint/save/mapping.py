"""Maps files of a memory file system, with all of their pages reserved and touched.

The first touch of a page costs far more than later ones. Python's own ways to touch all pages (`mmap` with
MAP_POPULATE, `mmap.madvise`) hold its lock meanwhile, 0.3 to 0.6 s for a gigabyte. In that time this process would
launch no step and answer no question, so the others would take it for one that stands still.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from pathlib import Path

import numpy as np

_PIECE_BYTES = 64 * 2**20  # in between, other threads can map something
_PAGE_BYTES = 4096  # the smallest that there is
_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE, of Linux 5.14; Source: linux/mman-common.h


def mapped(path: Path, size_bytes: int) -> mmap.mmap:
    """Make a file of zeros and map it. Its room is reserved: no write into it can fail later.

    Raises:
        OSError: it is there, or there is no room.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.posix_fallocate(descriptor, 0, size_bytes)
        content = mmap.mmap(descriptor, size_bytes, flags=mmap.MAP_SHARED)
    finally:
        os.close(descriptor)
    pages = np.frombuffer(content, np.uint8)
    for start in range(0, size_bytes, _PIECE_BYTES):
        zeros = pages[start : start + _PIECE_BYTES]
        if not (sys.platform == "linux" and _populate(zeros)):
            np.copyto(zeros[::_PAGE_BYTES], 0)  # without Python's lock as well, but twice as slow
    return content


def _populate(memory: np.ndarray) -> bool:
    """Let the kernel touch pages; return whether it can do that."""
    libc = ctypes.CDLL(None)  # whose calls are made without Python's lock
    address, size_bytes = ctypes.c_void_p(memory.ctypes.data), ctypes.c_size_t(memory.nbytes)
    return int(libc.madvise(address, size_bytes, _POPULATE_WRITE)) == 0
