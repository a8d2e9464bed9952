"""What a new run starts from: init_from and out_dir, looked at before anything is started, read when it is.

The driver calls `check_start`, those ranks that read call `read_start`. Knows nothing of ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from fsspec.implementations.local import LocalFileSystem
from torch import Tensor

from model.pretrained import GPT2_SIZES, read_pretrained, read_pretrained_args
from orchestrator.checkpoint.nanogpt import read_nanogpt
from orchestrator.checkpoint.snapshot import Snapshot
from orchestrator.checkpoint.store import CheckpointStore
from orchestrator.config import TrainConfig
from orchestrator.errors import CheckpointError, ConfigError
from orchestrator.machine import seen_as
from orchestrator.storage_options import storage_options_of

GPT2_VOCAB_SIZE = 50304  # 50257 rounded up to a multiple of 64 for speed, as nanoGPT does without a meta file
_SHAPE_KEYS = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size")
_POSITIONS = "transformer.wpe.weight"

T = TypeVar("T")


@dataclass(frozen=True)
class Start:
    """Where a run will begin: GPTConfig's arguments, the iteration, and a line for the user."""

    model_args: dict[str, Any]
    iter_num: int
    summary: str


def scratch_args(config: TrainConfig, vocab_size: int | None) -> dict[str, Any]:
    """Return GPTConfig's arguments of a new model; vocab_size None is GPT-2's."""
    args = {key: getattr(config, key) for key in ("n_layer", "n_head", "n_embd", "block_size", "bias", "dropout")}
    return {**args, "vocab_size": vocab_size or GPT2_VOCAB_SIZE}


def check_start(config: TrainConfig, store: CheckpointStore, vocab_size: int | None) -> Start:
    """Find out where the run will begin, before anything is started or overwritten.

    Raises:
        ConfigError: out_dir holds another model or a finished run, or init_from does not fit the settings.
        CheckpointError: init_from or out_dir cannot be read.
    """
    saved = next(store.newest_first(), None)
    if saved:
        check_same_run(config, saved.state, vocab_size)
        if saved.iter_num >= config.max_iters and not config.eval_only:
            raise ConfigError(
                f"out_dir={config.out_dir} holds a finished run: iteration {saved.iter_num} of "
                f"max_iters={config.max_iters}. To go on, raise --max_iters; to begin anew, give another --out_dir"
            )
        return Start(saved.state["model_args"], saved.iter_num, f"continuing {saved.name} in {config.out_dir}")
    store.check_not_lost()
    if config.init_from == "scratch":
        return Start(scratch_args(config, vocab_size), 0, "initializing a new model from scratch")
    source = source_of(config)
    args = read_start(config).model_args if _is_nanogpt(source) else _pretrained(read_pretrained_args, source)
    _check_block_size(config, args, source)
    return Start({**args, "block_size": config.block_size}, 0, f"initializing from {source}")


def check_same_run(config: TrainConfig, saved: dict[str, Any], vocab_size: int | None) -> None:
    """With init_from=resume the shape is the saved one, as in nanoGPT; otherwise settings must say the same.

    Raises:
        ConfigError: they do not.
    """
    began, args = saved["config"].get("init_from"), saved["model_args"]
    remedy = "give the settings it was begun with, --init_from=resume, or another --out_dir"
    if config.block_size != args["block_size"]:
        raise ConfigError(
            f"out_dir={config.out_dir} holds a model with block_size={args['block_size']}, asked for "
            f"{config.block_size}: --block_size={args['block_size']}, or another --out_dir"
        )
    if config.init_from == "resume":
        return
    if began not in (config.init_from, "resume"):
        raise ConfigError(
            f"out_dir={config.out_dir} holds a run that was begun with init_from={began}, "
            f"asked for init_from={config.init_from}: {remedy}"
        )
    if config.init_from == "scratch":
        wanted = scratch_args(config, vocab_size)
        differing = [f"{key}={args[key]}, asked for {wanted[key]}" for key in _SHAPE_KEYS if args[key] != wanted[key]]
        if differing:
            raise ConfigError(f"out_dir={config.out_dir} holds another model ({'; '.join(differing)}): {remedy}")


def source_of(config: TrainConfig) -> str:
    """Return the path, URL or name that a run without checkpoints of ours starts from.

    Raises:
        CheckpointError: init_from=resume, and there is nothing to resume.
    """
    if config.init_from != "resume":
        return config.init_from
    store = CheckpointStore(config.out_dir, storage_options_of(config))
    if not store.fs.exists(store.path("ckpt.pt")):
        raise CheckpointError(
            f"init_from=resume, but out_dir={config.out_dir} holds neither a checkpoint nor nanoGPT's ckpt.pt: "
            "give the --out_dir of a run, or --init_from=scratch"
        )
    return f"{config.out_dir.rstrip('/')}/ckpt.pt"


def origin_of(config: TrainConfig) -> str | None:
    """Return a name for where a run's start lies, None where this node has none.

    All who see the same have one name for it: the path or URL of what lies in storage, at the Hub or on a file server.
    """
    source = f"{config.out_dir.rstrip('/')}/ckpt.pt" if config.init_from == "resume" else config.init_from
    protocol = source.partition("://")[0] if "://" in source else "file"
    if source in GPT2_SIZES or protocol not in LocalFileSystem.protocol:
        return source
    return seen_as(LocalFileSystem._strip_protocol(source))


def _is_nanogpt(source: str) -> bool:
    return source.endswith((".pt", ".pth")) or Path(source).is_file()


def read_start(config: TrainConfig) -> Snapshot:
    """Read the state that init_from names, cut to block_size if it has longer positions.

    Raises:
        CheckpointError, ConfigError: it is missing, damaged or too short for block_size.
    """
    source = source_of(config)
    if _is_nanogpt(source):
        snapshot = read_nanogpt(source, storage_options=storage_options_of(config, source))
    else:
        args, tensors = _pretrained(partial(read_pretrained, views=True), source)
        tensors.pop("lm_head.weight", None)  # tied to transformer.wte.weight
        snapshot = Snapshot(tensors, {}, (), args, iter_num=0, best_val_loss=1e9)
    _check_block_size(config, snapshot.model_args, source)
    return _crop(snapshot, config.block_size)


def _pretrained(read: Callable[[str], T], source: str) -> T:
    """Call a reader of `model/`, which knows none of our errors."""
    try:
        return read(source)
    except ValueError as error:
        raise CheckpointError(str(error)) from None


def _check_block_size(config: TrainConfig, args: dict[str, Any], source: str) -> None:
    if config.block_size > args["block_size"]:
        raise ConfigError(
            f"block_size={config.block_size} is over the model's: {source} has {args['block_size']} positions. "
            f"Give --block_size={args['block_size']} or less"
        )


def _crop(snapshot: Snapshot, block_size: int) -> Snapshot:
    """Keep the first block_size positions, of the weights and of their moments (nanoGPT's crop_block_size)."""

    def cut(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: x[:block_size].clone() if name.endswith(_POSITIONS) else x for name, x in tensors.items()}

    args = {**snapshot.model_args, "block_size": block_size}
    return replace(snapshot, model=cut(snapshot.model), optimizer=cut(snapshot.optimizer), model_args=args)
