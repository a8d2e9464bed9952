"""Begin a run with a state from elsewhere: another run, a ckpt.pt, or GPT-2 weights, with the same bits on all ranks.

Knows no state of this run (restore.py) and not what lies where (init_from.py).
"""

from __future__ import annotations

import logging
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch
from torch import Tensor

from orchestrator.checkpoint.finite import count_not_finite, not_finite
from orchestrator.checkpoint.restore.init_from import Vocabulary, check_fits, read_initial_state, source_identity
from orchestrator.checkpoint.snapshot import Snapshot, describe, undescribe
from orchestrator.checkpoint.state import TrainState, adopt, build_state, set_step_counts, slices_to_fill
from orchestrator.checkpoint.tensor_file import checksum
from orchestrator.checkpoint.tensor_slice import by_tensor
from orchestrator.config import TrainConfig
from orchestrator.distributed.world import World
from orchestrator.errors import CheckpointError, UserError
from orchestrator.storage.run_folder import RunFolder

logger = logging.getLogger(__name__)


def import_state(config: TrainConfig, world: World, data: Vocabulary, folder: RunFolder) -> TrainState:
    """Build the state that init_from names, with the same bits on all ranks: those of the first rank that has it.

    A source that all nodes see is read by that rank alone. Sources on nodes' own disks are read by one rank of each
    node. The other ranks receive.

    Raises:
        CheckpointError, ConfigError, DataError: on every rank alike, if no node has it, or the first rank's cannot be
            read, does not fit or is not finite.
    """
    first, reader_of = _readers(config, world)
    is_reader = reader_of[world.rank] == world.rank
    snapshot = world.collectively(lambda: _read(config, folder, is_first=world.rank == first) if is_reader else None)
    mine = {**snapshot.model, **snapshot.optimizer} if snapshot else {}
    shapes = {name: list(mine[name].shape) for name in sorted(mine)}
    outlines = world.gather_json([describe(snapshot), shapes] if snapshot else None)
    del snapshot  # so that every tensor is freed as soon as it is copied
    description, names = outlines[first][0], list(outlines[first][1])
    alike = [rank for rank, outline in enumerate(outlines) if outline == outlines[first]]
    saved = undescribe(description, {}, {})
    world.on_main(check_fits, config, config.init_from, saved, data)
    state = build_state(config, {**saved.model_args, "dropout": config.dropout}, world, is_empty=True)
    wanted = by_tensor(slices_to_fill(state, set(names), world))
    here: dict[str, Tensor] = {}  # key -> its values on this rank, live ones if it holds them

    def fill(name: str) -> tuple[str, int]:
        whole = mine.pop(name)
        for each in wanted[name]:
            values = whole if each.is_whole else whole.reshape(-1)[each.offset : each.end]
            is_mine = world.rank in each.holders
            here[each.key] = each.tensor.copy_(values) if is_mine else values.to(each.tensor.dtype).contiguous()
        found = [here[each.key] for each in wanted[name]]
        return "".join(map(checksum, found)) if len(alike) > 1 else "", sum(map(count_not_finite, found))

    # every thread touches memory for the first time, which is slow: so there are as many as cores
    with ThreadPoolExecutor(torch.get_num_threads(), initializer=world.choose_device) as pool:
        checksums = world.gather_json(list(pool.map(fill, names if world.rank in alike else ())))
    mine.clear()  # of a rank whose file is another one
    for name, (_, count) in zip(names, checksums[first], strict=True):
        if count:
            raise CheckpointError(not_finite(config.init_from, name, count, math.prod(outlines[first][1][name])))
    sources = [reader if checksums[reader] == checksums[first] else first for reader in reader_of]
    if world.is_main and (others := {rank for rank, outline in enumerate(outlines) if outline} - set(sources)):
        told = config.init_from, ", ".join(map(str, sorted(others))), first
        logger.warning("init_from=%s is another one on the nodes of ranks %s: rank %d's is used by all", *told)
    slices = [each for name in names for each in wanted[name]]
    world.broadcast_from_each([each.tensor for each in slices if each.is_replicated(world.size)], sources)
    apart = [each for each in slices if not each.is_replicated(world.size)]
    for rank, source in enumerate(sources):
        theirs = [each for each in apart if rank in each.holders]
        if world.rank == rank:
            world.send([each.tensor for each in theirs], source, rank)
        elif world.rank == source:
            world.send([here[each.key].to(world.device) for each in theirs], source, rank)
    set_step_counts(state)
    adopt(state, saved, world)
    return state


def _readers(config: TrainConfig, world: World) -> tuple[int, list[int]]:
    """Return the first rank that has the run's source, and for every rank the one that reads it for that rank.

    Raises:
        CheckpointError: on every rank alike, if no node has it.
    """
    origins = world.gather_json(source_identity(config))
    if config.init_from != "resume" and not any(origins):
        raise CheckpointError(
            f"init_from={config.init_from}: no worker's node has it; copy it to one, or give a path or URL that all see"
        )
    first = next((rank for rank, origin in enumerate(origins) if origin), 0)
    return first, [origins.index(origin) if origin else first for origin in origins]


def _read(config: TrainConfig, folder: RunFolder, *, is_first: bool) -> Snapshot | None:
    """Return the state that the run starts from, mapped from its file if that is possible.

    If it cannot be read, the first rank's error counts; another rank returns None, and is sent the first rank's state.

    Raises:
        CheckpointError, ConfigError: the first rank's cannot be read.
    """
    try:
        snapshot = read_initial_state(config, folder)
    except (UserError, OSError, RuntimeError) as error:  # a damaged copy, a bad disk, PyTorch's own
        if is_first:
            raise
        logger.warning("this node's copy is not used: %s: %s", type(error).__name__, error)
        return None
    return replace(snapshot, optimizer={}) if config.eval_only else snapshot  # an evaluation takes no step
