"""GpuMemory: all that one GPU holds when it holds most, item by item, and whether that fits a card."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from orchestrator.capacity.cards import Card
from orchestrator.capacity.kept import FLOAT32, KeptTensors
from orchestrator.capacity.moments import Moment, highest
from orchestrator.capacity.shape import ModelShape
from orchestrator.config import TrainConfig
from orchestrator.distributed.lanes import Lanes, default_lanes, wait_on_device

MARGIN = 0.10  # of a card stays free: no card was measured, and PyTorch's allocator leaves gaps
CONTEXT_BYTES = 600_000_000  # CUDA, its kernels and cuBLAS's workspace: an estimate
NCCL_BYTES = 400_000_000  # buffers of its channels: an estimate
PIECE_BYTES = 25 * 2**20  # of the exchange (distributed/flat_gradient.py)


@dataclass(frozen=True)
class GpuMemory:
    """Bytes by item, at the step's highest moment and on the number of workers, of the run's range, with most.

    host_bytes: lane buffers of this GPU's worker that wait in host memory, where the GPU has no room for them.
    workers: the number of them, of the range, at which these are most.
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
    base = 2 if shape.rank and config.lora_base_dtype == "bfloat16" else FLOAT32
    gradient_bytes = 0 if config.eval_only else FLOAT32 * shape.trained_params
    items = {
        "weights": base * shape.matrices + FLOAT32 * (shape.vectors + shape.adapter_params),
        "gradients": gradient_bytes,
        "AdamW's moments": 2 * gradient_bytes,
        "autocast's copies of weights": moment.copies,
        "activations": moment.activations,
        "logits and their gradients": moment.logits,
        "gradients on their way": moment.passing,
        "lane buffers": 0,
        "exchange of gradients": _received_bytes(config, shape),
        "NCCL (estimate)": NCCL_BYTES if on_gpu and config.max_workers > 1 else 0,
        "CUDA (estimate)": CONTEXT_BYTES if on_gpu else 0,
    }
    before = ("weights", "gradients", "exchange of gradients", "NCCL (estimate)", "CUDA (estimate)")
    taken_bytes = sum(items[name] for name in before)
    total_bytes = card.memory_bytes if card else None
    workers, host_bytes = config.min_workers, 0
    for count, size in _sums_that_wait(config).items():
        held_bytes = count * gradient_bytes
        if total_bytes is None or wait_on_device(held_bytes, gradient_bytes, total_bytes - taken_bytes, total_bytes):
            items["lane buffers"] = max(items["lane buffers"], held_bytes)
        elif count * _pinned_bytes(gradient_bytes) > host_bytes:
            workers, host_bytes = size, count * _pinned_bytes(gradient_bytes)
    return GpuMemory(items, moment, host_bytes, workers)


def lanes_of(config: TrainConfig) -> int:
    """Return the lanes of a new run, 0 for DDP's order, and for a run that only evaluates."""
    if not config.deterministic or config.eval_only:
        return 0
    return config.lanes or default_lanes(config.min_workers, config.max_workers, config.gradient_accumulation_steps)


def held_sums(config: TrainConfig, workers: int) -> int:
    """Return how many sums of lanes wait on a worker while it computes, each as large as the gradients."""
    count = lanes_of(config)
    return _most_held_sums(count, workers) if count else 0


def most_held_sums(config: TrainConfig) -> int:
    """Return `held_sums` of the number of workers, of the run's range, with most."""
    return max(_sums_that_wait(config))


def _sums_that_wait(config: TrainConfig) -> dict[int, int]:
    """Return all `held_sums` of the run's range, each with the smallest number of workers that has so many."""
    count = lanes_of(config)
    return _held_on_range(count, config.min_workers, config.max_workers) if count else {0: config.min_workers}


@cache
def _held_on_range(lanes: int, fewest: int, most: int) -> dict[int, int]:
    return {_most_held_sums(lanes, size): size for size in range(most, fewest - 1, -1)}


@cache
def _most_held_sums(lanes: int, workers: int) -> int:
    return Lanes(lanes, lanes).most_held_sums(workers)  # however many micro-steps they have


def _pinned_bytes(size_bytes: int) -> int:
    """Return the host memory that PyTorch pins for a tensor: a power of two (ATen/core/CachingHostAllocator.h)."""
    return 1 << (size_bytes - 1).bit_length()


def _received_bytes(config: TrainConfig, shape: ModelShape) -> int:
    """Return the room for what a worker receives of one piece, on the number of workers with most."""
    count, piece_bytes = lanes_of(config), min(PIECE_BYTES, FLOAT32 * shape.trained_params)
    return int(piece_bytes * _most_received(count, config.min_workers, config.max_workers)) if count else 0


@cache
def _most_received(lanes: int, fewest: int, most: int) -> float:
    """Return the sums of which a worker receives a piece, in pieces: of each a chunk comes here."""
    return max((_number_of_roots(lanes, size) / size for size in range(max(2, fewest), most + 1)), default=0)


@cache
def _number_of_roots(lanes: int, workers: int) -> int:
    return sum(len(Lanes(lanes, lanes).roots(rank, workers)) for rank in range(workers))
