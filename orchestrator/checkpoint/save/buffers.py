"""BufferPool: what a rank's Saver has in node memory: two buffers that take turns, pinned where there is a GPU.

Knows no live model. Where memory has no room, or fails, checkpoints go on without it.
"""

from __future__ import annotations

import logging
import time

from orchestrator.checkpoint.save.node_memory import SnapshotBuffer
from orchestrator.checkpoint.save.node_topology import NodeTopology
from orchestrator.checkpoint.save.pinning import Pinned
from orchestrator.checkpoint.tensor_file import Layout
from orchestrator.distributed.world import World
from orchestrator.errors import CheckpointError

logger = logging.getLogger(__name__)

_OTHERS_S = 10.0  # in which the ranks of a node finish their shares of a state


class BufferPool:
    """Made by the loop's thread; what takes long is for the copier's.

    buffers: two, or one while older states are here. is_missing: nothing can be kept here.
    is_ending: the attempt ends, and somebody waits: nothing more is prepared for states that will not come.
    """

    def __init__(self, nodes: NodeTopology, world: World) -> None:
        self._nodes, self._attempt = nodes, world.attempt
        self._pinned = Pinned(world.device) if world.device.type == "cuda" else None
        self.buffers: list[SnapshotBuffer] = []
        self.is_missing = nodes.memory is None
        self.is_ending = False

    def free_buffer(self, uploading: SnapshotBuffer | None) -> SnapshotBuffer:
        """Return the buffer that is not being uploaded; of two, the one with the older state."""
        return min((buffer for buffer in self.buffers if buffer is not uploading), key=lambda buffer: buffer.iter_num)

    def reserve(self, layouts: dict[str, Layout]) -> None:
        """Reserve room for two states of this rank's share; for one, while older ones are here.

        So there are never more than two: an older one goes as soon as the first of this attempt is whole.
        """
        memory = self._nodes.memory
        assert memory
        try:
            if not self.buffers:  # for both: who has room for one only could lose it while it is written
                share_bytes = sum(layout.size_bytes for layout in layouts.values())
                memory.check_room(2 * share_bytes * self._nodes.shares)
            for _ in range(1 if memory.holds_other_than(self._attempt) else 2 - len(self.buffers)):
                if not (self.buffers and self.is_ending):  # one is enough for a rescue
                    self._add(SnapshotBuffer(memory, layouts))
        except Exception as error:  # whatever a memory file system fails with: checkpoints go on without it
            self.give_up(error)

    def _add(self, buffer: SnapshotBuffer) -> None:
        self.buffers.append(buffer)  # first of all: it can be used
        if self._pinned:
            self._pinned.pin(list(buffer.contents().values()), lambda: not self.is_ending)

    def take_all(self, name: str) -> None:
        """Once the first state of this attempt is whole on this node, delete older ones; reserve the second buffer."""
        if len(self.buffers) < 2:
            self._drop_older_attempts(name)
            self.reserve(self.buffers[0].layouts)

    def _drop_older_attempts(self, name: str) -> None:
        memory = self._nodes.memory
        assert memory
        deadline_s = time.monotonic() + _OTHERS_S
        while not (memory.is_whole(name, self._nodes.shares) or self.is_ending) and time.monotonic() < deadline_s:
            time.sleep(0.01)
        if memory.is_whole(name, self._nodes.shares):
            memory.forget_other_than(self._attempt)

    def give_up(self, error: Exception) -> None:
        """Go on without node memory."""
        if not self.is_missing:
            logger.warning(
                "no more states are kept in node memory, training pauses for every checkpoint: %s",
                str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}",
            )
        self.is_missing = True

    def let_go(self, is_finished: bool) -> None:
        """Free the buffers, but for what is being uploaded; where the run is finished, delete their files."""
        if self._pinned:
            self._pinned.unpin()
        while self.buffers:
            buffer = self.buffers.pop()
            if is_finished:
                buffer.delete()
