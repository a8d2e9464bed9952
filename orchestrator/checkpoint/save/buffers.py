"""BufferPool: the two buffers of a rank in node memory, which take turns; on a GPU they are pinned.

Knows no live model. If node memory has no room, or fails, the run goes on without it.
"""

from __future__ import annotations

import logging
import time
from operator import attrgetter

from orchestrator.checkpoint.save.node_topology import NodeTopology
from orchestrator.checkpoint.save.pinning import Pinned
from orchestrator.checkpoint.save.snapshot_buffer import SnapshotBuffer
from orchestrator.checkpoint.tensor_file import Layout
from orchestrator.distributed.world import World
from orchestrator.errors import CheckpointError

logger = logging.getLogger(__name__)

_OTHERS_S = 10.0  # in which the ranks of a node finish their shares of a state


class BufferPool:
    """Made by the loop's thread; reserving and deleting take long, and run in the background.

    buffers: two, or one while states of an earlier attempt are here. is_missing: node memory cannot be used.
    is_ending: the attempt ends, and a rescue waits: we prepare nothing more for later states.
    """

    def __init__(self, nodes: NodeTopology, world: World) -> None:
        self._nodes, self._attempt = nodes, world.attempt
        self._pinned = Pinned(world.device) if world.device.type == "cuda" else None
        self.buffers: list[SnapshotBuffer] = []
        self.is_missing = nodes.memory is None
        self.is_ending = False

    @property
    def is_usable(self) -> bool:
        """Whether a state can be written here now."""
        return bool(self.buffers) and not self.is_missing

    def free_buffer(self) -> SnapshotBuffer:
        """Return the buffer that is not being uploaded; of two, the one with the older state."""
        return min((buffer for buffer in self.buffers if not buffer.is_uploading), key=attrgetter("iter_num"))

    def reserve(self, layouts: dict[str, Layout]) -> None:
        """Reserve room for two states of this rank's share; for one, while an earlier attempt's state is here.

        So there are never more than two: the earlier one is deleted as soon as the first of this attempt is whole.

        Raises:
            CheckpointError, OSError: there is no room.
        """
        memory = self._nodes.memory
        assert memory
        if not self.buffers:  # for both: with room for one only, we could lose it while we write over it
            share_bytes = sum(layout.size_bytes for layout in layouts.values())
            memory.check_room(2 * share_bytes * self._nodes.shares)
        for _ in range(1 if memory.shares_of_earlier(self._attempt) else 2 - len(self.buffers)):
            if self.buffers and self.is_ending:  # one is enough for a rescue
                return
            buffer = SnapshotBuffer(memory, layouts)
            self.buffers.append(buffer)  # first of all: it can be used
            if self._pinned:
                self._pinned.pin(list(buffer.contents.values()), lambda: not self.is_ending)

    def replace_older_attempts(self, name: str) -> None:
        """Wait until a state of this attempt is whole on this node, delete older attempts', reserve the second buffer.

        Raises:
            CheckpointError, OSError: there is no room for it.
        """
        if len(self.buffers) < 2 and not self.is_missing:  # else this state was not written
            memory = self._nodes.memory
            assert memory
            deadline_s = time.monotonic() + _OTHERS_S
            while not (memory.is_whole(name, self._nodes.shares) or self.is_ending) and time.monotonic() < deadline_s:
                time.sleep(0.01)
            if memory.is_whole(name, self._nodes.shares):
                memory.forget_other_than(self._attempt)
            self.reserve(self.buffers[0].layouts)

    def give_up(self, error: BaseException) -> None:
        """Go on without node memory, whatever its file system or CUDA has failed with."""
        if not self.is_missing:
            logger.warning(
                "no more states are kept in node memory, training pauses for every checkpoint: %s",
                str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}",
            )
        self.is_missing = True

    def release(self, is_finished: bool) -> None:
        """Unpin and drop the buffers; if the run is finished, delete their files. An upload keeps its own mapped."""
        if self._pinned:
            self._pinned.unpin()
        while self.buffers:
            buffer = self.buffers.pop()
            if is_finished:
                buffer.delete()
