"""Base models of adapters, and what ranks do with theirs."""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass, field
from typing import Any

import xxhash

from model.lora import frozen_parameters
from tests.support.ranks import Ended

CHARS = "abcdefghijk"  # of a base model's tokenizer


@dataclass(frozen=True)
class WatchBase:
    """Let every rank print each file of weights that it opens below a folder, and a hash of its frozen weights.

    environment: variables that the process gets first.
    """

    folder: str = ""
    environment: dict[str, str] = field(default_factory=dict)

    def __call__(self, rank: int) -> None:
        from orchestrator import loop

        os.environ.update(self.environment)

        def hear(event: str, args: tuple[Any, ...]) -> None:
            if self.folder and event == "open" and _is_weights(path := str(args[0])) and path.startswith(self.folder):
                os.write(1, f"\nrank {rank} opens {path}\n".encode())

        sys.addaudithook(hear)
        original = loop.parallelize

        def parallelize(model: Any, *args: Any) -> Any:
            held = xxhash.xxh3_128()
            for name, weight in sorted(frozen_parameters(model.named_parameters()).items()):
                held.update(f"{name} {weight.dtype}".encode() + weight.float().numpy().tobytes())
            os.write(1, f"\nrank {rank} holds {held.hexdigest()}\n".encode())
            return original(model, *args)

        loop.parallelize = parallelize


def readers(ended: Ended) -> set[int]:
    """Return the ranks that have opened a file of the base model."""
    return {int(rank) for rank in re.findall(r"^rank (\d+) opens ", ended.said, re.MULTILINE)}


def held(ended: Ended) -> list[str]:
    """Return the hash of the frozen weights of every rank."""
    return re.findall(r"^rank \d+ holds (\w+)$", ended.said, re.MULTILINE)


def _is_weights(path: str) -> bool:
    return "model" in path.rpartition("/")[2]
