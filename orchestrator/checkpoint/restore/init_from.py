"""The start of a run: the driver checks init_from and out_dir with it, and ranks read the initial state.

The driver calls `check_start` before anything is started or overwritten. The ranks that read call `read_initial_state`.
Knows nothing of ranks.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from orchestrator.checkpoint.formats.base import cropped
from orchestrator.checkpoint.formats.nanogpt import NO_LOSS
from orchestrator.checkpoint.formats.sources import Kind, ModelSource, find_source, identity_of
from orchestrator.checkpoint.formats.weights import look_at, read_merged, read_source, tokenizer_json
from orchestrator.checkpoint.restore.adapters import (
    adapters_to_train,
    as_saved,
    check_adapters,
    check_same_adapters,
    told,
)
from orchestrator.checkpoint.restore.base import check_base
from orchestrator.checkpoint.snapshot import Snapshot
from orchestrator.checkpoint.store import CheckpointStore
from orchestrator.config import TrainConfig, check_block_size
from orchestrator.data.vocabulary import PADDED_GPT2_VOCAB_SIZE, difference, is_padded
from orchestrator.errors import CheckpointError, ConfigError, DataError, FinishedRunError, StorageUnavailableError
from orchestrator.storage.run_folder import RunFolder

logger = logging.getLogger(__name__)

_SHAPE_KEYS = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size")
_DIFFERENT_TOKENS = "Prepare the text again with the model's tokens, or begin with --init_from=scratch"


@dataclass(frozen=True)
class StartingPoint:
    """Where a run will begin: GPTConfig's arguments, the iteration, a line for the user.

    config: the settings that count; of a run that goes on, with its own adapters.
    """

    model_args: dict[str, Any]
    iter_num: int
    summary: str
    config: TrainConfig


@dataclass(frozen=True)
class Vocabulary:
    """A dataset's tokens. size: how many, None for GPT-2's. tokenizer: as JSON, None if unknown."""

    size: int | None = None
    tokenizer: dict[str, Any] | None = None


def scratch_args(config: TrainConfig, vocab_size: int | None) -> dict[str, Any]:
    """Return GPTConfig's arguments of a new model; vocab_size None is GPT-2's."""
    args = {key: getattr(config, key) for key in ("n_layer", "n_head", "n_embd", "block_size", "bias", "dropout")}
    return {**args, "vocab_size": vocab_size or PADDED_GPT2_VOCAB_SIZE}


def check_start(config: TrainConfig, store: CheckpointStore, data: Vocabulary | None) -> StartingPoint:
    """Find out where the run will begin, before anything is started or overwritten; data is None where it is elsewhere.

    Raises:
        FinishedRunError: out_dir holds a run that has reached max_iters.
        ConfigError: out_dir holds another model, or init_from does not fit the settings.
        DataError: the dataset's tokens are not the model's.
        CheckpointError: init_from or out_dir cannot be read.
    """
    saved = next(store.newest_first(), None)
    if saved:
        check_same_run(config, saved.state, data or Vocabulary(saved.state["model_args"]["vocab_size"]))
        if saved.is_evaluated:
            check_unfinished(config, saved.iter_num, saved.name)
        if saved.adapters:
            check_base(config, saved.adapters, config.block_size)
        summary = f"continuing {saved.name} in {config.out_dir}"
        return StartingPoint(saved.state["model_args"], saved.iter_num, summary, as_saved(config, saved.adapters))
    store.check_not_lost()
    if config.max_iters == 0 and not config.eval_only:
        raise ConfigError("max_iters=0: a new run could take no step; to evaluate alone, give --eval_only=True")
    if config.init_from == "scratch":
        size = data.size if data else None
        return StartingPoint(scratch_args(config, size), 0, "initializing a new model from scratch", config)
    source = source_of(config, store.folder)
    model_only = config.init_weights_only or config.eval_only
    found = look_at(source, model_only)
    check_adapters(config, found, source)
    if found.adapters:
        check_base(config, found.adapters, config.block_size)
    found = _as_begun(config, source, found)
    if config.init_from == "resume":
        check_unfinished(config, found.iter_num, "ckpt.pt")
    check_fits(config, source.where, found, data)
    args = {**found.model_args, "block_size": config.block_size}
    summary = f"initializing from {_told(source)}{_told_of(config, source, found)}"
    return StartingPoint(args, found.iter_num, summary, config)


def check_unfinished(config: TrainConfig, iter_num: int, name: str) -> None:
    """Check that a run has iterations to go.

    Raises:
        FinishedRunError: it has not, which is no mistake: the same command may be given again and again.
    """
    if iter_num >= config.max_iters and not config.eval_only:
        raise FinishedRunError(
            f"out_dir={config.out_dir} is finished: iteration {iter_num} of max_iters={config.max_iters} ({name}). "
            "To go on, raise --max_iters; to begin anew, give another --out_dir"
        )


def told_finished(config: TrainConfig, store: CheckpointStore) -> str:
    """Return the message for a run that has nothing left to do, "" if it has iterations to go.

    Raises:
        ConfigError, CheckpointError: out_dir holds another run than the settings describe, or cannot be read.
    """
    try:
        if saved := next(store.newest_first(), None):
            check_same_run(config, saved.state, Vocabulary(saved.state["model_args"]["vocab_size"]))
            if saved.is_evaluated:  # else its last evaluation was broken off, and is still to do
                check_unfinished(config, saved.iter_num, saved.name)
        elif config.init_from == "resume" and not config.init_weights_only:
            check_unfinished(config, look_at(source_of(config, store.folder), model_only=True).iter_num, "ckpt.pt")
    except FinishedRunError as finished:
        return str(finished)
    return ""


def check_same_run(config: TrainConfig, saved: dict[str, Any], data: Vocabulary) -> None:
    """With init_from=resume the shape is the saved one, as in nanoGPT; otherwise settings must say the same.

    Raises:
        ConfigError: they do not.
        DataError: the dataset's tokens are not those that the run has learned.
    """
    began, args = saved["config"], saved["model_args"]
    remedy = "give the settings it was begun with, --init_from=resume, or another --out_dir"
    if config.block_size != args["block_size"]:
        raise ConfigError(
            f"out_dir={config.out_dir} holds a model with block_size={args['block_size']}, asked for "
            f"{config.block_size}: --block_size={args['block_size']}, or another --out_dir"
        )
    if config.init_weights_only and not began.get("init_weights_only"):
        raise ConfigError(
            f"out_dir={config.out_dir} holds a run, which goes on with all of its state; init_weights_only=True begins "
            f"a new one: give --init_from={config.out_dir} and another --out_dir, or leave it out to go on"
        )
    check_same_adapters(config, saved.get("adapters"))
    if config.init_from != "resume":
        _check_same_beginning(config, began, remedy)
    if config.init_from == "scratch":
        wanted = scratch_args(config, data.size)
        differing = [f"{key}={args[key]}, asked for {wanted[key]}" for key in _SHAPE_KEYS if args[key] != wanted[key]]
        if differing:
            raise ConfigError(f"out_dir={config.out_dir} holds another model ({'; '.join(differing)}): {remedy}")
    if why := difference(began.get("tokenizer"), data.tokenizer):
        raise DataError(
            f"dataset={config.dataset} has other tokens than the run in out_dir={config.out_dir} has learned: {why}. "
            "Give the dataset that it was begun with, prepared as it was then, or another --out_dir"
        )


def _check_same_beginning(config: TrainConfig, began: dict[str, Any], remedy: str) -> None:
    if began.get("init_from") not in (config.init_from, "resume"):
        raise ConfigError(
            f"out_dir={config.out_dir} holds a run that was begun with init_from={began.get('init_from')}, "
            f"asked for init_from={config.init_from}: {remedy}"
        )
    before = began.get("init_checkpoint", "auto")
    if began.get("init_from") == config.init_from and before != config.init_checkpoint:
        raise ConfigError(
            f"out_dir={config.out_dir} holds a run that was begun with init_checkpoint={before}, "
            f"asked for init_checkpoint={config.init_checkpoint}: {remedy}"
        )


def check_fits(config: TrainConfig, where: str, found: Snapshot, data: Vocabulary | None) -> None:
    """Check that a new run can begin with a state from elsewhere; where: the name of its source in messages.

    Raises:
        ConfigError: it is too short or narrow for the settings, or past max_iters already.
        DataError: its tokens are not the dataset's.
    """
    check_block_size(config, found.model_args, where)
    if found.iter_num >= config.max_iters and not config.eval_only:
        raise ConfigError(
            f"init_from={config.init_from} is at iteration {found.iter_num} and max_iters={config.max_iters}: a new "
            "run could take no step. Raise --max_iters, or give --init_weights_only=True to begin at iteration 0"
        )
    if data:
        _check_tokens(config, where, found, data)


def _check_tokens(config: TrainConfig, where: str, found: Snapshot, data: Vocabulary) -> None:
    tokenizer, size = tokenizer_json(found, config.data_dir), int(found.model_args["vocab_size"])
    if why := difference(tokenizer, data.tokenizer):
        raise DataError(f"{where} and dataset={config.dataset} have different vocabularies: {why}. {_DIFFERENT_TOKENS}")
    if data.size and not (tokenizer and data.tokenizer) and not is_padded(size, data.size):
        logger.warning(
            "%s has vocab_size=%d, dataset=%s %d tokens, and nothing tells what they mean: where the model was made "
            "for other tokens than the dataset's, it learns them anew",
            where,
            size,
            config.dataset,
            data.size,
        )


def source_of(config: TrainConfig, folder: RunFolder | None = None) -> ModelSource:
    """Return what a run without checkpoints of its own starts from.

    Raises:
        CheckpointError: nothing is there; with init_from=resume, no ckpt.pt.
    """
    source = find_source(config, config.init_checkpoint, "init_checkpoint", folder)
    if config.init_from == "resume" and config.lora_rank:
        raise ConfigError(
            f"lora_rank={config.lora_rank} trains adapters in a run of their own: give --init_from={source.where} and "
            "another --out_dir"
        )
    if config.init_from == "resume" and source.kind is not Kind.NANOGPT:
        raise CheckpointError(
            f"init_from=resume, but out_dir={config.out_dir} holds neither a checkpoint nor nanoGPT's ckpt.pt: "
            "give the --out_dir of a run, or --init_from=scratch"
        )
    return source


def source_identity(config: TrainConfig) -> str | None:
    """Return the identity (sources.py) of the source of a run's initial state, None if this node does not have it."""
    return identity_of(f"{config.out_dir.rstrip('/')}/ckpt.pt" if config.init_from == "resume" else config.init_from)


def read_initial_state(config: TrainConfig, folder: RunFolder | None = None) -> Snapshot:
    """Read the state that init_from names, cut to block_size if it has longer positions.

    With lora_rank, whole weights are no state, but the base model of adapters that are still to be made: the snapshot's
    `adapters` names its own tensors.

    Raises:
        CheckpointError, ConfigError: it is missing, damaged or too short for block_size.
        StorageUnavailableError: its storage does not answer.
    """
    source = source_of(config, folder)
    if config.lora_rank and source.kind is Kind.RUN:  # a base model is one checkpoint, and no other instead of it
        source = replace(source, which=source.store().select(source.which).name)
    try:
        snapshot = read_source(source, model_only=config.init_weights_only or config.eval_only)
    except StorageUnavailableError as error:
        if source.kind is not Kind.HUB:
            raise
        raise CheckpointError(str(error)) from None  # the driver has not asked the Hub: it may never answer here
    check_adapters(config, snapshot, source)
    if snapshot.adapters and not config.lora_rank:
        snapshot = read_merged(source)
    snapshot = _as_begun(config, source, snapshot)
    check_fits(config, source.where, snapshot, None)
    return _crop(snapshot, config.block_size)


def _as_begun(config: TrainConfig, source: ModelSource, found: Snapshot) -> Snapshot:
    """Return the state with which a new run begins, without the values that are about the run it comes from."""
    adapters = adapters_to_train(config, source, found)
    becomes_base = adapters and not found.adapters
    if config.init_weights_only or becomes_base:
        return Snapshot(found.model, {}, (), found.model_args, 0, NO_LOSS, config=found.config, adapters=adapters)
    return replace(found, guard={}, val_loss=None, adapters=adapters)


def _told(source: ModelSource) -> str:
    is_chosen = source.kind is Kind.RUN and source.which != "auto"
    return f"{source.where} (checkpoint={source.which})" if is_chosen else source.where


def _told_of(config: TrainConfig, source: ModelSource, found: Snapshot) -> str:
    if found.adapters and not found.iter_num:
        flags = told(replace(found.adapters.lora, dropout=config.lora_dropout))
        before = found.config["lora_dropout"] if source.kind is Kind.ADAPTER else config.lora_dropout
        return f", with adapters: {flags}" + (
            f" (lora_dropout was {before:g})" if before != config.lora_dropout else ""
        )
    if config.init_weights_only:
        return ", its weights alone"
    return f", at iteration {found.iter_num}" if found.iter_num else ""


def _crop(snapshot: Snapshot, block_size: int) -> Snapshot:
    """Keep the first block_size positions, of the weights and of their moments (nanoGPT's crop_block_size)."""

    def cut(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: cropped(name, x, block_size) for name, x in tensors.items()}

    args = {**snapshot.model_args, "block_size": block_size}
    return replace(snapshot, model=cut(snapshot.model), optimizer=cut(snapshot.optimizer), model_args=args)
