"""GpuMemory: all that one GPU holds when it holds most, item by item, and whether that fits a card."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.capacity.cards import Card
from orchestrator.capacity.kept import FLOAT32, KeptTensors
from orchestrator.capacity.moments import Moment, highest
from orchestrator.capacity.shape import ModelShape
from orchestrator.config import TrainConfig
from orchestrator.distributed.lanes import Lanes, default_lanes

MARGIN = 0.10  # of a card stays free: no card was measured, and PyTorch's allocator leaves gaps
CONTEXT_BYTES = 600_000_000  # CUDA, its kernels and cuBLAS's workspace: an estimate
NCCL_BYTES = 400_000_000  # buffers of its channels: an estimate
PIECE_BYTES = 25 * 2**20  # of the exchange (distributed/flat_gradient.py)
_LARGEST_PART = 0.25  # of the device's free memory, for sums that wait (distributed/lane_training.py)


@dataclass(frozen=True)
class GpuMemory:
    """Bytes by item, at the step's highest moment.

    host_bytes: lane buffers of this GPU's worker that wait in host memory, since the GPU has no room.
    workers: the number of them, of the run's range, at which a worker needs most.
    """

    items: dict[str, int]
    moment: Moment
    host_bytes: int
    workers: int

    @property
    def total(self) -> int:
        return sum(self.items.values())

    def fits(self, memory_bytes: int) -> bool:
        """Return whether a card with so much memory holds it, with our margin."""
        return self.total <= (1 - MARGIN) * memory_bytes


def gpu_memory(config: TrainConfig, shape: ModelShape, card: Card | None = None, *, on_gpu: bool = True) -> GpuMemory:
    """Return what one GPU holds; card: on which lane buffers may have no room. Without one they lie on it.

    on_gpu: False counts a CPU's tensors, of which we have measured those of a step.
    """
    moment = highest(KeptTensors(config, shape, on_gpu))
    workers = workers_with_most(config)
    base = 2 if shape.rank and config.lora_base_dtype == "bfloat16" else FLOAT32
    items = {
        "weights": base * shape.matrices + FLOAT32 * (shape.vectors + shape.adapter_params),
        "gradients": FLOAT32 * shape.trained_params,
        "AdamW's moments": 2 * FLOAT32 * shape.trained_params,
        "autocast's copies of weights": moment.copies,
        "activations": moment.activations,
        "logits and their gradients": moment.logits,
        "gradients on their way": moment.passing,
        "lane buffers": held_sums(config, workers) * FLOAT32 * shape.trained_params,
        "exchange of gradients": _received_bytes(config, shape),
        "NCCL (estimate)": NCCL_BYTES if on_gpu and config.max_workers > 1 else 0,
        "CUDA (estimate)": CONTEXT_BYTES if on_gpu else 0,
    }
    host_bytes = 0
    if card and card.memory_bytes:
        before = ("weights", "gradients", "exchange of gradients", "NCCL (estimate)", "CUDA (estimate)")
        free_bytes = card.memory_bytes - sum(items[name] for name in before)  # a new run has no moments then
        if items["lane buffers"] > _LARGEST_PART * free_bytes:
            host_bytes, items["lane buffers"] = items["lane buffers"], 0
    return GpuMemory(items, moment, host_bytes, workers)


def lanes_of(config: TrainConfig) -> int:
    """Return the lanes of a new run, 0 for DDP's order."""
    if not config.deterministic:
        return 0
    return config.lanes or default_lanes(config.min_workers, config.max_workers, config.gradient_accumulation_steps)


def held_sums(config: TrainConfig, workers: int) -> int:
    """Return how many sums of lanes wait on a worker while it computes, each as large as the gradients."""
    count = lanes_of(config)
    return Lanes(count, config.gradient_accumulation_steps).most_held_sums(workers) if count else 0


def workers_with_most(config: TrainConfig) -> int:
    """Return the number of workers, of the run's range, on which most sums wait; of several the smallest."""
    sizes = range(config.min_workers, config.max_workers + 1)
    return max(sizes, key=lambda size: held_sums(config, size))


def _received_bytes(config: TrainConfig, shape: ModelShape) -> int:
    """Return the room for what a worker receives of one piece, on the number of workers with most."""
    if not (count := lanes_of(config)):
        return 0
    lanes = Lanes(count, config.gradient_accumulation_steps)
    piece_bytes = min(PIECE_BYTES, FLOAT32 * shape.trained_params)
    sizes = range(max(2, config.min_workers), config.max_workers + 1)
    roots = {size: sum(len(lanes.roots(rank, size)) for rank in range(size)) for size in sizes}
    return max((piece_bytes * count // size for size, count in roots.items()), default=0)
