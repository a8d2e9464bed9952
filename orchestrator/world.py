"""World: this process among the others of the run, and the few collectives that the program needs.

Works without a process group too, as a world of one. Only JSON and tensors travel: nothing is unpickled. JSON and
votes go through host memory (the gloo half of the process group), so they never wait for a GPU.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from orchestrator import errors
from orchestrator.errors import UserError

T = TypeVar("T")


class Vote:
    """An all-reduce on its way: has any rank said yes?"""

    def __init__(self, flag: Tensor, work: dist.Work | None) -> None:
        self._flag, self._work = flag, work

    def passed(self) -> bool:
        """Wait for all ranks' answers and return whether one was yes: the same on all ranks."""
        if self._work:
            self._work.wait()
        return bool(self._flag.item())


@dataclass(frozen=True)
class World:
    """Rank, size and device of this process; attempt names this start of the process group, the same on all ranks."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    attempt: str = "local"

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def broadcast(self, tensor: Tensor, source: int) -> None:
        """Overwrite tensor on every rank with the one of the source rank."""
        if self.size > 1:
            dist.broadcast(tensor, source)

    def broadcast_json(self, value: Any) -> Any:
        """Return rank 0's value on every rank."""
        return self.gather_json(value if self.is_main else None)[0]

    def gather_json(self, value: Any) -> list[Any]:
        """Return every rank's value, by rank, on every rank."""
        if self.size == 1:
            return [value]
        mine = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = torch.zeros(self.size, dtype=torch.int64)
        lengths[self.rank] = len(mine)
        dist.all_reduce(lengths)
        sizes = lengths.tolist()
        padded = torch.zeros(max(sizes), dtype=torch.uint8)
        padded[: len(mine)] = mine
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        return [json.loads(bytes(part[:size].numpy())) for part, size in zip(parts, sizes, strict=True)]

    def together(self, call: Callable[[], T]) -> T:
        """Return call()'s value, unless it is a user's mistake on any rank: then raise that one on all ranks.

        Raises:
            UserError: the first rank's, so that none waits in a collective for one that has left.
        """
        value, mine = None, None
        try:
            value = call()
        except UserError as error:
            mine = [type(error).__name__, str(error)]
        for rank, found in enumerate(self.gather_json(mine)):
            if found:
                name, text = found
                raise getattr(errors, name)(text if rank == 0 else f"rank {rank}: {text}")
        return cast(T, value)

    def sum(self, tensor: Tensor) -> Tensor:
        """Add up a tensor over all ranks, in place, and return it."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def vote(self, yes: bool) -> Vote:
        """Ask all ranks, without waiting for them."""
        flag = torch.tensor(int(yes))
        return Vote(flag, dist.all_reduce(flag, async_op=True) if self.size > 1 else None)
