"""Traffic and time: what an iteration sends over the network, beside what it computes. No GPU has shown these times."""

from __future__ import annotations

from orchestrator.capacity.gpu import lanes_of
from orchestrator.capacity.shape import ModelShape
from orchestrator.config import TrainConfig
from orchestrator.distributed.lanes import Lanes

RATES_GBIT = (10, 25, 100)  # a node's network, per second and direction
ASSUMED_MFU = 0.4  # of the card's peak: an assumption
_TF32 = 0.5  # of bfloat16's peak: float32 is multiplied so (distributed/numerics.py); Source: NVIDIA's datasheets


def bytes_per_iteration(config: TrainConfig, shape: ModelShape, workers: int) -> int:
    """Return what the busiest worker sends, or receives if that is more.

    In lanes every worker sends each other one a chunk of its sums, and then its finished chunk (exchange.py). In DDP's
    order NCCL's ring sends as much as with one sum each. Only another node's bytes use the network, and we count as if
    every worker had a node of its own.
    """
    gradient_bytes = 4 * shape.trained_params
    others = (workers - 1) / workers
    if not (count := lanes_of(config)):
        return int(2 * others * gradient_bytes)
    lanes = Lanes(count, config.gradient_accumulation_steps)
    roots = [len(lanes.roots(rank, workers)) for rank in range(workers)]
    sent = max(roots) * others
    received = (sum(roots) - min(roots)) / workers
    return int((max(sent, received) + others) * gradient_bytes)


def network_s(config: TrainConfig, shape: ModelShape, workers: int, rate_gbit: float) -> float:
    """Return the seconds that an iteration's gradients take on the network."""
    return bytes_per_iteration(config, shape, workers) * 8 / (rate_gbit * 1e9)


def compute_s(config: TrainConfig, shape: ModelShape, workers: int, flops: float) -> float:
    """Return the seconds in which the busiest worker computes its micro-steps; flops: the card's with bfloat16."""
    micro_steps = config.gradient_accumulation_steps
    if count := lanes_of(config):
        lanes = Lanes(count, micro_steps)
        most = max(len(lanes.micro_steps_of(lanes.of_rank(rank, workers))) for rank in range(workers))
    else:
        most = -(-micro_steps // workers)
    per_token = shape.flops_per_token(recompute=config.activation_checkpointing, recompute_head=bool(config.loss_chunk))
    peak = _TF32 * flops if config.dtype == "float32" else flops
    return most * config.batch_size * config.block_size * per_token / (ASSUMED_MFU * peak)


def network_share(config: TrainConfig, shape: ModelShape, workers: int, rate_gbit: float, flops: float) -> float:
    """Return the part of an iteration that the network takes, if none of it hides behind the backward pass."""
    waiting_s = network_s(config, shape, workers, rate_gbit)
    return waiting_s / (waiting_s + compute_s(config, shape, workers, flops))
