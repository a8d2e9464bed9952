"""Begin a run with a state from elsewhere: another run, a ckpt.pt, adapters, or GPT-2 weights.

Knows no state of this run (restore.py) and not what lies where (init_from.py).
"""

from __future__ import annotations

from dataclasses import replace

from model.lora import is_adapter
from orchestrator.checkpoint.restore.base import fill_base, load_base
from orchestrator.checkpoint.restore.import_tensors import read_on_ranks
from orchestrator.checkpoint.restore.init_from import (
    Vocabulary,
    check_fits,
    read_initial_state,
    source_identity,
)
from orchestrator.checkpoint.snapshot import Snapshot
from orchestrator.checkpoint.state import TrainState, adopt, build_state, set_step_counts, slices_to_fill
from orchestrator.checkpoint.tensor_slice import by_tensor
from orchestrator.config import TrainConfig
from orchestrator.distributed.world import World
from orchestrator.storage.run_folder import RunFolder


def import_state(config: TrainConfig, world: World, data: Vocabulary, folder: RunFolder) -> TrainState:
    """Build the state that init_from names, with the same bits on all ranks: those of the first rank that has it.

    With lora_rank, whole weights become the base model of new adapters; adapters go on, beside their own base model.

    Raises:
        CheckpointError, ConfigError, DataError: on every rank alike, if no node has it, or the first rank's cannot be
            read, does not fit or is not finite.
        StorageUnavailableError: on every rank alike, if its storage has not answered for a minute.
    """

    def read() -> Snapshot:
        snapshot = folder.read_with_retries(read_initial_state, config, folder)
        return replace(snapshot, optimizer={}) if config.eval_only else snapshot  # an evaluation takes no step

    is_resume = config.init_from == "resume"
    title = f"init_from={config.init_from}"
    found = read_on_ranks(title, source_identity(config), read, world, may_be_nowhere=is_resume)
    saved = found.snapshot()
    world.on_main(check_fits, config, config.init_from, saved, data)
    args = {**saved.model_args, "dropout": config.dropout}
    state = build_state(config, args, world, is_empty=True, adapters=saved.adapters)
    if saved.adapters and not any(map(is_adapter, found.shapes)):
        fill_base(state, found, world)
        return state
    found.fill(by_tensor(slices_to_fill(state, set(found.shapes), world)), world)
    set_step_counts(state)
    adopt(state, saved, world)
    if saved.adapters:
        load_base(config, state, world)
    return state
