"""The base model of adapters: frozen weights, which no checkpoint holds. Ranks load them, the driver checks them.

state.json names them, with a checksum. Whoever restores adapters reads the weights once, from where they were or where
lora_base says, and compares the checksum.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TypeVar

from torch import Tensor

from model.lora import frozen_parameters
from model.names import differences
from orchestrator.checkpoint.formats.base import OTHER_CHECKSUM, another_base, base_checksum, cropped, held
from orchestrator.checkpoint.formats.sources import ModelSource, base_of, find_base, identity_of
from orchestrator.checkpoint.formats.weights import look_at, read_source, using
from orchestrator.checkpoint.restore.import_tensors import Import, read_on_ranks
from orchestrator.checkpoint.snapshot import Adapters, Snapshot
from orchestrator.checkpoint.state import TrainState
from orchestrator.checkpoint.tensor_file import checksum
from orchestrator.checkpoint.tensor_slice import by_tensor, replicate
from orchestrator.config import TrainConfig
from orchestrator.distributed.world import World
from orchestrator.errors import CheckpointError, StorageUnavailableError

T = TypeVar("T")
logger = logging.getLogger(__name__)


def fill_base(state: TrainState, found: Import, world: World) -> None:
    """Fill the frozen weights of a run that begins, and note their checksum.

    Raises:
        CheckpointError: on every rank alike, if some values are not finite.
    """
    assert state.adapters
    sums = found.fill(by_tensor(replicate(_frozen(state), world.size)), world, checksums=True)
    base = replace(state.adapters.base, checksum=base_checksum(sums))
    state.adapters = replace(state.adapters, base=base)


def load_base(config: TrainConfig, state: TrainState, world: World) -> None:
    """Fill the frozen weights of adapters that go on.

    Raises:
        CheckpointError: on every rank alike, if they are missing, damaged or other ones.
    """
    assert state.adapters
    began_s = time.perf_counter()
    lora, base, block_size = state.adapters.lora, state.adapters.base, state.model.config.block_size
    where = config.lora_base or base.source

    def read() -> Snapshot:
        source = find_base(config, base)
        snapshot = _readable(source, lambda: read_source(source, model_only=True))
        model = {name: cropped(name, x, block_size) for name, x in snapshot.model.items()}
        return replace(snapshot, model=model, adapters=Adapters(lora, base_of(source)))

    remedy = "give --lora_base=PATH, where it lies now"
    found = read_on_ranks(f"the base model {where}", identity_of(where), read, world, remedy=remedy)
    frozen = _frozen(state)
    shapes = {name: tuple(shape) for name, shape in found.shapes.items()}
    if faults := differences({name: tuple(tensor.shape) for name, tensor in frozen.items()}, shapes):
        raise another_base(where, faults)
    sums = base_checksum(found.fill(by_tensor(replicate(frozen, world.size)), world, checksums=True))
    if base.checksum not in ("", sums):
        raise another_base(where, OTHER_CHECKSUM)
    read_now = found.snapshot().adapters
    if read_now and not config.lora_base:  # a folder of peft's need not tell the revision
        base = replace(base, revision=base.revision or read_now.base.revision)
    state.adapters = Adapters(lora, replace(base, checksum=sums))
    if world.is_main:
        held_bytes, taken_s = sum(tensor.nbytes for tensor in frozen.values()), time.perf_counter() - began_s
        logger.info("the base model %s: %.2f GB held, read and compared in %.1f s", where, held_bytes / 1e9, taken_s)


def check_base(config: TrainConfig, adapters: Adapters, block_size: int) -> None:
    """Check, before anything is started, that a run of adapters will find its base model.

    Weights on a disk of this machine are read through once. Of others only the headers are read; the ranks do the
    rest.

    Raises:
        CheckpointError: they are missing, damaged or other ones.
    """
    source = find_base(config, adapters.base)
    if not source.is_local:
        _readable(source, lambda: look_at(source, model_only=True))
        return
    found = _readable(source, lambda: using(source, lambda weights: _sum_of(weights.tensors, adapters, block_size)))
    if adapters.base.checksum not in ("", found):
        raise another_base(source.where, OTHER_CHECKSUM)


def _sum_of(tensors: Iterable[tuple[str, Tensor]], adapters: Adapters, block_size: int) -> str:
    sums = {
        name: checksum(held(cropped(name, tensor, block_size), adapters.lora.base_dtype)) for name, tensor in tensors
    }
    return base_checksum(sums)


def _frozen(state: TrainState) -> dict[str, Tensor]:
    return frozen_parameters(state.model.named_parameters())


def _readable(source: ModelSource, read: Callable[[], T]) -> T:
    """Return what `read` makes of a base model; while its storage does not answer, try again.

    Raises:
        StorageUnavailableError: it has not answered for a minute. That may pass, and the next attempt reads again.
        CheckpointError: it is damaged; the message tells the remedy.
    """

    def attempt() -> T:
        try:
            return read()
        except StorageUnavailableError as error:
            raise StorageUnavailableError(f"the base model of these adapters: {error}") from error
        except CheckpointError as error:
            raise CheckpointError(
                f"{source.where}, the base model of these adapters, cannot be read: {error}. Restore it from a copy, "
                "or give --lora_base=PATH, where one lies"
            ) from None

    return source.folder.read_with_retries(attempt) if source.folder else attempt()
