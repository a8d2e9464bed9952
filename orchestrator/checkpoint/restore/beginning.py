"""The model that a run will train, without its weights: for figures before anything is started.

Imports PyTorch only where a file has to tell, which takes a second or two.
"""

from __future__ import annotations

import logging
from typing import Any

from orchestrator.capacity.shape import GPT2_BLOCK_SIZE, GPT2_SIZES
from orchestrator.config import TrainConfig, check_block_size, check_rank
from orchestrator.data.token_files import open_token_files
from orchestrator.data.vocabulary import GPT2_VOCAB_SIZE, PADDED_GPT2_VOCAB_SIZE
from orchestrator.errors import DataError
from orchestrator.storage.run_folder import RunFolder, open_run_folder

logger = logging.getLogger(__name__)


def beginning_of(config: TrainConfig, folder: RunFolder | None = None) -> tuple[TrainConfig, dict[str, Any]]:
    """Return the settings with which a run begins or goes on, and GPTConfig's arguments of its model.

    folder: where its states may lie; without one we look in out_dir only with init_from=resume.

    Raises:
        UserError: init_from cannot be read, is no model, or does not suit the settings.
    """
    if folder or config.init_from == "resume":
        from orchestrator.checkpoint.restore.adapters import as_saved
        from orchestrator.checkpoint.store import CheckpointStore

        folder = folder or open_run_folder(config)
        if saved := next(CheckpointStore(folder).newest_first(), None):
            return as_saved(config, saved.adapters), dict(saved.state["model_args"])
    if config.init_from == "scratch":
        sizes = {key: getattr(config, key) for key in ("n_layer", "n_head", "n_embd", "block_size", "bias")}
        return config, {**sizes, "vocab_size": _vocab_size(config)}
    if config.init_from in GPT2_SIZES:
        sizes = dict(zip(("n_layer", "n_head", "n_embd"), GPT2_SIZES[config.init_from], strict=True))
        args, is_whole = {**sizes, "bias": True, "block_size": GPT2_BLOCK_SIZE, "vocab_size": GPT2_VOCAB_SIZE}, True
    else:
        args, is_whole = _read_model_args(config, folder)
    check_block_size(config, args, config.init_from)
    if is_whole:
        check_rank(config, args)
    return config, args


def _vocab_size(config: TrainConfig) -> int:
    """Return the dataset's number of tokens; where this machine does not have it, as nodes may, GPT-2's."""
    try:
        found = open_token_files(config.data_dir, config.dataset).vocab_size
    except DataError:
        told = config.dataset, config.data_dir, PADDED_GPT2_VOCAB_SIZE
        logger.warning("no dataset=%s in data_dir=%s here: we count with GPT-2's vocabulary of %d tokens", *told)
        found = None
    return found or PADDED_GPT2_VOCAB_SIZE


def _read_model_args(config: TrainConfig, folder: RunFolder | None) -> tuple[dict[str, Any], bool]:
    """Return GPTConfig's arguments of a source, and whether it is a whole model, no adapters."""
    from model import read_pretrained_args
    from orchestrator.checkpoint.formats.nanogpt import read_nanogpt
    from orchestrator.checkpoint.formats.sources import Kind
    from orchestrator.checkpoint.formats.weights import look_at
    from orchestrator.checkpoint.restore.adapters import check_adapters
    from orchestrator.checkpoint.restore.init_from import source_of

    source = source_of(config, folder)
    if source.kind is Kind.HUGGINGFACE:
        return read_pretrained_args(config.init_from), True
    if source.kind is Kind.NANOGPT:  # mapped, so that no weights are read from a disk
        return read_nanogpt(source.where, model_only=True, storage_options=source.options).model_args, True
    found = look_at(source, model_only=True)
    check_adapters(config, found, source)
    return found.model_args, not found.adapters
