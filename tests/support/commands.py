"""Words for the command line, and a look at everything that a command may have changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from orchestrator.config import TrainConfig

Refused = Callable[..., str]  # gives words to the command line and returns why it refuses them
Say = Callable[..., str]  # the same, and returns what it prints


def flags(config: TrainConfig, **changes: Any) -> list[str]:
    """Return settings as the command line takes them."""
    return [f"--{key}={value}" for key, value in asdict(replace(config, **changes)).items()]


def everything_in(folder: Path) -> dict[str, bytes | None]:
    """Return path -> content of every file in a folder, and None for every folder."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}
