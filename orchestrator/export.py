"""Write a run's state in a format that other programs read."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from orchestrator.checkpoint.huggingface import write_huggingface
from orchestrator.checkpoint.nanogpt import write_nanogpt
from orchestrator.checkpoint.run_tokenizer import saved_tokenizer, with_tokenizer_file
from orchestrator.checkpoint.snapshot import Snapshot
from orchestrator.checkpoint.store import Checkpoint, CheckpointStore
from orchestrator.checkpoint.stream import first_whole, outline, stream
from orchestrator.checkpoint.transfer import exists
from orchestrator.config import nearest
from orchestrator.data.tokenizers import Tokenizer
from orchestrator.errors import ConfigError, DataError
from orchestrator.storage_options import storage_options_of

logger = logging.getLogger(__name__)

FORMATS = ("nanogpt", "hf")


@dataclass(frozen=True)
class ExportConfig:
    """What to write, and where."""

    out_dir: str = "out"  # the run's folder, a path or URL
    format: str = "nanogpt"  # nanogpt: a ckpt.pt for nanoGPT's train.py and sample.py; hf: a Hugging Face folder
    storage_options: str = ""  # fsspec's options of out_dir: a JSON object, or the path of a .json file that holds one
    to: str = ""  # the file (nanogpt) or folder (hf) to write, a path or URL; it must be given
    checkpoint: str = "auto"  # latest, best, a name; auto: the latest, or the best if always_save_checkpoint=False
    overwrite: bool = False  # write even if something is there


def export(config: ExportConfig) -> str:
    """Write the state and return a line that says what was written.

    Raises:
        UserError: the format is unknown, there is no such state, or the target exists or cannot be written.
    """
    if config.format not in FORMATS:
        raise ConfigError(f"format={config.format!r} is none of {', '.join(FORMATS)}{nearest(config.format, FORMATS)}")
    if not config.to:
        raise ConfigError("--to is missing: the " + ("file" if config.format == "nanogpt" else "folder") + " to write")
    if exists(config.to, storage_options_of(config, config.to)) and not config.overwrite:
        raise ConfigError(f"{config.to} exists: give another --to, or --overwrite=True")
    store = CheckpointStore(config.out_dir, storage_options_of(config))
    checkpoint, _ = first_whole(store, config.checkpoint, lambda found: _write(config, store, found))
    return f"wrote {checkpoint.name} (iteration {checkpoint.iter_num}) to {config.to}"


def _write(config: ExportConfig, store: CheckpointStore, checkpoint: Checkpoint) -> None:
    """Write a checkpoint a tensor at a time: the state may be larger than this machine's memory."""
    model_only = config.format == "hf"
    options = storage_options_of(config, config.to)
    snapshot, tensors = outline(checkpoint, model_only), stream(store, checkpoint, model_only)
    if model_only:
        write_huggingface(snapshot, config.to, _tokenizer(snapshot, store), tensors, storage_options=options)
    else:
        write_nanogpt(with_tokenizer_file(snapshot, store), config.to, tensors, storage_options=options)


def _tokenizer(snapshot: Snapshot, store: CheckpointStore) -> Tokenizer | None:
    try:
        return saved_tokenizer(snapshot.config, store)
    except DataError as error:  # the weights are what was asked for
        logger.warning("exported without tokenizer files: %s", error)
        return None
