"""Readings of a state's files that break off."""

from __future__ import annotations

import os
from typing import Any

from orchestrator.checkpoint.restore import read_once as reading
from orchestrator.errors import StorageUnavailableError


def break_off_first_readings(rank: int) -> None:
    """Let a process read wrong numbers at first, from a storage that stops answering at the end of the file."""
    read, begun = reading.stream_tensors, set[str]()

    def breaking(fs: Any, path: str, *rest: Any) -> Any:
        is_first = path not in begun
        begun.add(path)
        for name, tensor in read(fs, path, *rest):
            if is_first:
                tensor.add_(1)
            yield name, tensor
        if is_first:
            os.write(1, f"\nrank {rank} is broken off in {path}\n".encode())
            raise StorageUnavailableError(f"{path} cannot be read: broken off")

    reading.stream_tensors = breaking
