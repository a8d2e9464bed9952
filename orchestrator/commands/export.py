"""Write a model's state in a format that other programs read: a run's, a ckpt.pt's, or GPT-2 weights'."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from orchestrator.checkpoint.formats.huggingface import write_huggingface
from orchestrator.checkpoint.formats.nanogpt import write_nanogpt
from orchestrator.checkpoint.formats.peft import write_peft
from orchestrator.checkpoint.formats.run_tokenizer import whole_json
from orchestrator.checkpoint.formats.sources import Kind, ModelSource, base_of, find_base, find_source, refuse_missing
from orchestrator.checkpoint.formats.weights import Weights, look_at, tokenizer_of, using
from orchestrator.checkpoint.snapshot import Snapshot
from orchestrator.data.tokenizers import Tokenizer
from orchestrator.errors import ConfigError, DataError, nearest
from orchestrator.storage.identity import place_of
from orchestrator.storage.options import storage_options_of
from orchestrator.storage.transfer import exists

logger = logging.getLogger(__name__)

FORMATS = ("nanogpt", "hf", "peft")
_IN_CHECKPOINT = re.compile(r"(^|/)checkpoint_\d{8,}_\w+(/|$)")
# What a Hugging Face folder has beside its weights, for whoever turns text into tokens and back.
_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "char_tokenizer.json", "generation_config.json"),
)


@dataclass(frozen=True)
class ExportConfig:
    """What to write, and where."""

    out_dir: str = "out"  # the run's folder, a path or URL; one with a ckpt.pt or a Hugging Face folder, as well
    format: str = "nanogpt"  # nanogpt: a ckpt.pt for nanoGPT; hf: a Hugging Face folder; peft: a folder of adapters
    storage_options: str = ""  # fsspec's options of out_dir: a JSON object, or the path of a .json file that holds one
    lora_base: str = ""  # of a run of adapters: where the frozen weights lie, if not where it began with them
    to: str = ""  # the file (nanogpt) or folder (hf, peft) to write, a path or URL; it must be given
    checkpoint: str = "auto"  # latest, best, a name; auto: the latest, or the best if always_save_checkpoint=False
    overwrite: bool = False  # write even if something is there
    init_from: str = (
        "resume"  # resume: what out_dir holds; or a run, a ckpt.pt, a Hugging Face folder, gpt2, gpt2-xl, ...
    )
    data_dir: str = "data"  # where the dataset lies that tells the characters of a ckpt.pt


def export(config: ExportConfig) -> str:
    """Write the state and return a line that says what was written. Adapters are merged, but for peft's format.

    Raises:
        UserError: the format is unknown, there is no such state, or the target exists or cannot be written.
    """
    if config.format not in FORMATS:
        raise ConfigError(f"format={config.format!r} is none of {', '.join(FORMATS)}{nearest(config.format, FORMATS)}")
    if not config.to:
        raise ConfigError("--to is missing: the " + ("file" if config.format == "nanogpt" else "folder") + " to write")
    refuse_missing(config)
    if exists(config.to, storage_options_of(config, config.to)) and not config.overwrite:
        raise ConfigError(f"{config.to} exists: give another --to, or --overwrite=True")
    if config.format == "nanogpt" and "://" not in config.to and Path(config.to).is_dir():
        raise ConfigError(f"--to={config.to} is a folder: give the file to write, {config.to.rstrip('/')}/ckpt.pt")
    source = find_source(config, config.checkpoint)
    _refuse_its_own(config, source)
    _check_adapters(config, source)
    is_peft = config.format == "peft"
    name = using(source, _writer(config, source), model_only=config.format != "nanogpt", merge=not is_peft)
    return f"wrote {name} to {config.to}"


def _refuse_its_own(config: ExportConfig, source: ModelSource) -> None:
    """Check that what is written does not replace what it is made from.

    Raises:
        ConfigError: it does.
    """
    here, there = place_of(source.where), place_of(config.to)
    is_inside = there == here or there.startswith(f"{here}/")
    is_harmless = source.kind is Kind.RUN and config.format == "nanogpt" and not _IN_CHECKPOINT.search(there)
    if is_inside and not is_harmless:
        raise ConfigError(f"--to={config.to} lies in what is exported, {source.where}: give a place of its own")


def _check_adapters(config: ExportConfig, source: ModelSource) -> None:
    """Check that adapters are there where they alone are written, and else that their base is not written over.

    Raises:
        ConfigError: they are not, or it is.
    """
    may_be_adapters = source.kind in (Kind.RUN, Kind.ADAPTER)
    adapters = look_at(source, model_only=True).adapters if may_be_adapters else None
    if config.format != "peft":
        if adapters:
            _refuse_its_own(config, find_base(config, adapters.base))
    elif not adapters:
        raise ConfigError(
            f"format=peft writes adapters, and {source.where} holds a whole model: give --format=hf or --format=nanogpt"
        )


def _writer(config: ExportConfig, source: ModelSource) -> Callable[[Weights], str]:
    """Return what writes weights a tensor at a time: the state may be larger than this machine's memory."""
    options = storage_options_of(config, config.to)

    def write_nanogpts(weights: Weights) -> str:
        tokenizer = _tokenizer(source, weights.snapshot, config.data_dir)
        carried = {"tokenizer": whole_json(tokenizer)} if tokenizer else {}
        snapshot = replace(weights.snapshot, config={**weights.snapshot.config, **carried})
        write_nanogpt(snapshot, config.to, weights.tensors, storage_options=options)
        return weights.name

    def write_huggingfaces(weights: Weights) -> str:
        is_theirs = source.kind is Kind.HUGGINGFACE
        tokenizer = None if is_theirs else _tokenizer(source, weights.snapshot, config.data_dir)
        files = _tokenizer_files(source) if is_theirs else {}
        write_huggingface(
            weights.snapshot, config.to, tokenizer, weights.tensors, storage_options=options, others=files
        )
        return weights.name

    def write_pefts(weights: Weights) -> str:
        adapters = weights.snapshot.adapters
        if adapters and config.lora_base:  # it has moved, and peft is to find it
            adapters = replace(adapters, base=base_of(find_base(config, adapters.base)))
        snapshot = replace(weights.snapshot, model=dict(weights.tensors), adapters=adapters)
        write_peft(snapshot, config.to, storage_options=options)
        return weights.name

    return {"nanogpt": write_nanogpts, "hf": write_huggingfaces, "peft": write_pefts}[config.format]


def _tokenizer(source: ModelSource, snapshot: Snapshot, data_dir: str) -> Tokenizer | None:
    try:
        return tokenizer_of(source, snapshot, data_dir)
    except DataError as error:  # the weights are what was asked for
        logger.warning("exported without its tokenizer: %s", error)
        return None


def _tokenizer_files(source: ModelSource) -> dict[str, bytes]:
    """Return a Hugging Face folder's own files of the tokenizer, as they are."""
    assert source.folder
    found: dict[str, bytes] = {}
    for name in _TOKENIZER_FILES:
        if (content := source.folder.read(name)) is not None:
            found[name] = content
    return found
