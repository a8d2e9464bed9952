"""What a node and storage hold of a run: states, and the host memory of a worker."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.capacity.shape import ModelShape
from orchestrator.config import TrainConfig

STATES_IN_NODE_MEMORY = 2  # on each node, whatever the number of its workers (checkpoint/save/buffers.py)
WORKER_BYTES = 4_000_000_000  # of host memory: Python, PyTorch with CUDA, Ray's part of a node; an estimate


@dataclass(frozen=True)
class NodeNeeds:
    """Bytes.

    state: weights or adapters, with their moments. memory_dir: /dev/shm. storage: of out_dir, while one is being saved.
    host: of the node's memory, /dev/shm included, with one worker.
    """

    state: int
    memory_dir: int
    storage: int
    host: int


def node_needs(config: TrainConfig, shape: ModelShape, lane_buffers_bytes: int) -> NodeNeeds:
    """Return a node's needs; lane_buffers_bytes: those of its worker in host memory."""
    if config.eval_only:  # it keeps nothing
        return NodeNeeds(state=0, memory_dir=0, storage=0, host=WORKER_BYTES)
    state = 12 * shape.trained_params
    in_memory = STATES_IN_NODE_MEMORY * state if config.memory_dir else 0
    checkpoints = config.keep_checkpoints + 2  # the best one, and the one that is being written
    return NodeNeeds(state, in_memory, checkpoints * state, in_memory + lane_buffers_bytes + WORKER_BYTES)
