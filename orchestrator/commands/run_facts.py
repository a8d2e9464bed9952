"""Gather what a run's folder tells, for its report: records, settings, checkpoints, and what could not be read."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterator
from typing import Any

from orchestrator.checkpoint.snapshot import Adapters
from orchestrator.checkpoint.store import CheckpointStore
from orchestrator.commands.inspect_run import COLUMNS, adapter_rows, storage_rows
from orchestrator.config import TrainConfig
from orchestrator.errors import CheckpointError
from orchestrator.report.run import Run, Table
from orchestrator.storage.options import GIVEN_INLINE, StorageSettings, is_options_file
from orchestrator.storage.run_folder import RUN_FILE, RunFolder
from orchestrator.telemetry.metrics import read_records
from orchestrator.telemetry.records import Begin, Records

_OF_THE_DATA = {"data": "fingerprint", "train_tokens": "tokens to train on", "val_tokens": "tokens to validate on"}
_OF_THE_MODEL = {
    "n_layer": "layers",
    "n_head": "heads",
    "n_embd": "width",
    "block_size": "positions",
    "vocab_size": "tokens",
}


def gather(folder: RunFolder, config: StorageSettings) -> Run:
    """Read all that a run's folder tells; config: the settings by which it was found, for command lines.

    Raises:
        CheckpointError: it cannot be read, or holds no records.
    """
    records = read_records(folder)
    if not records.metrics and not records.events:
        raise CheckpointError(f"{folder.key}={folder.out_dir} holds no records of a run: give the out_dir of a `train`")
    store = CheckpointStore(folder)
    found = next(store.newest_first(), None)
    newest = found.state if found else {}
    known = folder.read_json(RUN_FILE)
    settings = _changed(_dict(known.get("config")) or _dict(newest.get("config")))
    return Run(
        name=folder.out_dir,
        records=records,
        settings={key: str(value) for key, value in settings.items()},
        facts=_facts(records, newest, known, found.adapters if found else None),
        checkpoints=Table(COLUMNS, list(storage_rows(store))),
        commands=_commands(config, settings),
        unreadable=list(_unreadable(records, store, known, newest)),
    )


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _changed(config: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that are not at their defaults, in the order of `train --help`."""
    defaults = {each.name: each.default for each in dataclasses.fields(TrainConfig)}
    return {key: config[key] for key, default in defaults.items() if key in config and config[key] != default}


def _facts(
    records: Records, newest: dict[str, Any], known: dict[str, Any], adapters: Adapters | None
) -> dict[str, dict[str, str]]:
    """Return title -> name -> text: the model, the data and the environment, as far as they are known."""
    by_time = sorted(records.metrics, key=lambda stamped: stamped.time_s)
    begin = next((x.record for x in reversed(by_time) if isinstance(x.record, Begin)), None)
    args, environment = _dict(newest.get("model_args")), _dict(newest.get("environment"))
    model = {word: _text(args[key]) for key, word in _OF_THE_MODEL.items() if key in args}
    data = {word: _text(environment[key]) for key, word in _OF_THE_DATA.items() if key in environment}
    if begin and begin.num_params:
        trained = f", {begin.num_trained:,} of them trained" if begin.num_trained else ""
        model = {"parameters": f"{begin.num_params:,}{trained}", **model}
    if adapters:
        model |= adapter_rows(adapters)
    if begin and begin.tokens_per_iter:
        data["tokens per iteration"] = f"{begin.tokens_per_iter:,}"
        seen = begin.tokens_per_iter * int(newest.get("iter_num") or 0)
        if seen and environment.get("train_tokens"):
            data["epochs"] = f"{seen / environment['train_tokens']:.2f} up to the newest checkpoint"
    rest = {key: _text(value) for key, value in environment.items() if key not in _OF_THE_DATA}
    if "ray" in known:
        rest["ray"] = str(known["ray"])
    return {title: rows for title, rows in (("Model", model), ("Data", data), ("Environment", rest)) if rows}


def _text(value: Any) -> str:
    return f"{value:,}" if type(value) is int else str(value)


def _commands(config: StorageSettings, settings: dict[str, Any]) -> dict[str, str]:
    """Return text -> a command line: what can be done with the run from here."""
    place = {"out_dir": config.out_dir}
    if options := config.storage_options.strip():
        place["storage_options"] = options if is_options_file(options) else GIVEN_INLINE
    rest = {key: value for key, value in settings.items() if key not in place}
    return {
        "Continue it, or change a setting first:": _command("train", **place, **rest),
        "Print text from it:": _command("sample", **place),
        "Write its best state for nanoGPT:": _command(
            "export", **place, checkpoint="best", format="nanogpt", to="ckpt.pt"
        ),
        "Write its best state for Hugging Face:": _command(
            "export", **place, checkpoint="best", format="hf", to="exported"
        ),
        "List and verify its checkpoints:": _command("inspect", **place, verify=True),
    }


def _command(verb: str, **flags: Any) -> str:
    return shlex.join(["orchestrator", verb, *(f"--{key}={value}" for key, value in flags.items())])


def _unreadable(
    records: Records, store: CheckpointStore, known: dict[str, Any], newest: dict[str, Any]
) -> Iterator[str]:
    for name, count in records.left_out.items():
        yield f"{name}: {count:,} line(s) are cut off, damaged, or of a newer version, and left out."
    if not records.events:
        yield (
            "There are no events: attempts and failures are not known, nor the time between two starts. "
            "A run without Ray keeps none."
        )
    if not records.metrics:
        yield "There are no metrics: not one iteration was recorded."
    if not known:
        yield f"{RUN_FILE} is missing or damaged."
    if not newest:
        yield "There is no whole checkpoint in storage: model, data and environment are not known."
    for name, why in store.damaged.items():
        yield f"{name} is not whole: {why}"
