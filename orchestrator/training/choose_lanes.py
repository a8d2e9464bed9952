"""In how many lanes a run sums its gradients (distributed/lanes.py): as it was begun, unless that cannot be."""

from __future__ import annotations

import logging
import platform
from collections import Counter
from contextlib import suppress

from orchestrator.checkpoint.save.node_memory import spare_memory_bytes
from orchestrator.checkpoint.state import TrainState
from orchestrator.config import TrainConfig
from orchestrator.distributed.lanes import Lanes, default_lanes
from orchestrator.distributed.world import World
from orchestrator.errors import ConfigError

logger = logging.getLogger(__name__)

_LARGEST_PART = 0.5  # of a node's spare memory, for sums that wait


def choose_lanes(config: TrainConfig, world: World, state: TrainState) -> int:
    """Return the number of lanes, the same on all ranks; 0: gradients are summed in DDP's order.

    The user's number, else the saved run's, else a default. More workers than lanes need more lanes, which is another
    order from here on.

    Raises:
        ConfigError: on all ranks alike, if there are too many workers.
    """
    saved, micro_steps = saved_lanes(state), config.gradient_accumulation_steps
    if config.eval_only:  # no gradients
        return saved or 0
    if config.lanes and config.lanes < world.size:
        raise ConfigError(
            f"lanes={config.lanes} are too few for {world.size} workers: each needs one of its own. "
            f"Give --lanes={world.size} or more, or none: then we choose"
        )
    if world.size > micro_steps:
        raise ConfigError(
            f"{world.size} workers are more than gradient_accumulation_steps={micro_steps}: each needs a micro-step of "
            "its own"
        )
    if not config.deterministic:
        return 0
    if saved is not None and not config.lanes:
        return saved and min(max(saved, world.size), micro_steps)  # 0 stays 0
    lanes = config.lanes or _default(config, world, state)
    if lanes > world.size and world.is_main and saved is None:
        logger.info("%s", describe(Lanes(lanes, micro_steps), *_workers(config, world), _gradient_bytes(state)))
    return lanes


def saved_lanes(state: TrainState) -> int | None:
    """Return the lanes of the saved run that goes on, 0 for DDP's order; None for a run that begins.

    An older version of this program saved no lanes: then there is one for each of its workers.
    """
    if state.resumed_from is None:
        return None
    saved = state.resumed_from.checkpoint.state
    its_workers = saved["environment"].get("world_size", 1) if saved["config"].get("deterministic", True) else 0
    return int(saved["config"].get("lanes", its_workers))


def describe(lanes: Lanes, fewest: int, most: int, gradient_bytes: int) -> str:
    """Return a line about the busiest rank and the memory of sums that wait, for every number of workers of a range."""
    sizes = range(fewest, most + 1)
    balance = " ".join(f"{lanes.balance(size):.2f}" for size in sizes)
    held = " ".join(f"{lanes.most_held_sums(size) * gradient_bytes / 1e6:.0f}" for size in sizes)
    workers = f"{fewest} to {most} workers" if fewest < most else f"{most} worker(s)"
    return (
        f"gradients are summed in {lanes.count} lanes: the same bits on 1 to {lanes.count} workers. On {workers} the "
        f"busiest has {balance} of an even share, and lane buffers take {held} MB a worker"
    )


def _default(config: TrainConfig, world: World, state: TrainState) -> int:
    """Return the default: DDP's order where several nodes have several workers each, for it sends less between them."""
    fewest, most = _workers(config, world)
    on_node = Counter(world.gather_json(platform.node()))
    if len(on_node) > 1 and max(on_node.values()) > 1:
        if world.is_main:
            logger.info(
                "several nodes have several workers each: gradients are summed in DDP's order, and the bits depend on "
                "the number of workers. --lanes=%d makes them the same on any number, and sends more between nodes",
                most,
            )
        return 0
    micro_steps = config.gradient_accumulation_steps
    lanes = Lanes(default_lanes(fewest, most, micro_steps), micro_steps)
    held = max(lanes.most_held_sums(size) for size in range(fewest, most + 1))
    needed_bytes = held * _gradient_bytes(state) * max(on_node.values())
    has_room = all(world.gather_json(_has_room(needed_bytes)))
    return default_lanes(fewest, most, micro_steps, has_room=has_room)


def _workers(config: TrainConfig, world: World) -> tuple[int, int]:
    """Return the fewest and most workers that this run is to have; without a range, those that there are."""
    if not config.is_elastic:
        return world.size, world.size
    return min(config.min_workers, world.size), max(config.max_workers, world.size)


def _gradient_bytes(state: TrainState) -> int:
    return sum(each.numel() * 4 for each in state.model.parameters() if each.requires_grad)


def _has_room(needed_bytes: int) -> bool:
    with suppress(OSError):  # systems other than Linux do not tell it this way
        return needed_bytes <= _LARGEST_PART * spare_memory_bytes()
    return True
