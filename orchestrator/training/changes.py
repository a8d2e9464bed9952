"""Where a run that goes on differs from the saved one: we tell the user, and continue the order of the data."""

from __future__ import annotations

import logging
import platform
from typing import Any

from orchestrator.checkpoint.state import TrainState
from orchestrator.data.order import BatchOrder, going_on
from orchestrator.distributed.numerics import NumericsFingerprint
from orchestrator.distributed.world import World
from orchestrator.errors import DataError

logger = logging.getLogger(__name__)

_WHERE_THINGS_ARE = {"out_dir", "init_from", "storage_options", "data_dir", "memory_dir", "resubmit", "lora_base"}
_OF_THE_DATA = {"tokenizer", "epoch_began"}
_KEPT_BY_THE_OPTIMIZER = {"beta1", "beta2", "weight_decay"}  # as saved; the restore tells it
_KEPT_BY_THE_STATE = {  # with init_from=resume they may be left out
    *("n_layer", "n_head", "n_embd", "bias"),
    *("lora_rank", "lora_alpha", "lora_targets", "lora_base_dtype"),
}
_IN_THE_FINGERPRINT = {"num_workers", "device", "backend", "compile", "dtype", "lanes"}
_UNTOLD = _WHERE_THINGS_ARE | _OF_THE_DATA | _KEPT_BY_THE_OPTIMIZER | _KEPT_BY_THE_STATE | _IN_THE_FINGERPRINT


def log_changed_settings(now: dict[str, Any], saved: dict[str, Any]) -> None:
    """Log in one line the settings that differ from the saved run's; both as stored in a state."""
    told = sorted((now.keys() & saved.keys()) - _UNTOLD, key=list(now).index)
    changed = [f"{key} {saved[key]} -> {now[key]}" for key in told if now[key] != saved[key]]
    if changed:
        logger.info("settings that differ from the saved run's: %s", ", ".join(changed))


def warn_if_numerics_changed(now: NumericsFingerprint, world: World, state: TrainState) -> None:
    """Compare this rank's fingerprint with rank 0's and with that of the checkpoint that was resumed.

    Raises:
        DataError: this rank has other data than rank 0.
    """
    if world.gather_json(now.data)[0] != now.data:
        raise DataError(f"{platform.node()} has another dataset than rank 0: prepare the same one on every node")
    if not (world.is_main and state.resumed_from):
        return
    before = NumericsFingerprint.from_json(state.resumed_from.checkpoint.state["environment"])
    if change := now.change_of_data(before):
        logger.warning(
            "THE DATASET IS NOT THE ONE that this run was trained on so far: %s; it goes on with this one", change
        )
    if changes := now.changes(before):
        logger.warning("the last bits may differ from an undisturbed run's: %s", ", ".join(changes))


def continue_order(order: BatchOrder, before: dict[str, Any], iter_num: int, world: World) -> BatchOrder:
    """Return the order from where a run with the settings `before` has left it, though this one's may be others."""
    began = order.began
    order, warning = going_on(order, before, iter_num)
    if world.is_main and order.began != began and order.began[0] == iter_num:
        logger.info("sampling=epoch goes on at block %d of its order, with another global batch", order.began[1])
    if world.is_main and warning:
        logger.warning("%s", warning)
    return order
