"""List what a run's folder holds, or tell what a ckpt.pt, a Hugging Face folder or an adapter is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from orchestrator.checkpoint.finite import count_not_finite
from orchestrator.checkpoint.formats.nanogpt import NO_LOSS
from orchestrator.checkpoint.formats.sources import Kind, ModelSource, find_source, refuse_missing
from orchestrator.checkpoint.formats.weights import Weights, look_at, tokenizer_json, using
from orchestrator.checkpoint.restore.adapters import told_to_go_on
from orchestrator.checkpoint.save.node_memory import run_path, share_path, states_in
from orchestrator.checkpoint.snapshot import Adapters
from orchestrator.checkpoint.store import Checkpoint, CheckpointStore, best, newest_name_first
from orchestrator.checkpoint.tensor_file import FileRecord, stream_tensors
from orchestrator.data.vocabulary import name_of
from orchestrator.errors import CheckpointError
from orchestrator.storage.run_folder import RUN_FILE

ALL_FINITE = "all finite"
COLUMNS = ("checkpoint", "iteration", "val loss", "MB", "saved (UTC)", "where", "state")


@dataclass(frozen=True)
class InspectConfig:
    """Which run or model to look at."""

    out_dir: str = "out"  # the run's folder, a path or URL
    storage_options: str = ""  # fsspec's options of out_dir: a JSON object, or the path of a .json file that holds one
    lora_base: str = ""  # of a run of adapters: where the frozen weights lie, if not where it began with them
    memory_dir: str = "/dev/shm"  # where this node keeps the newest states of a run that goes on or was killed
    verify: bool = False  # read every byte, compare checksums, and look for values that are not finite
    init_from: str = (
        "resume"  # resume: what out_dir holds; or a run, a ckpt.pt, a Hugging Face folder, gpt2, gpt2-xl, ...
    )
    data_dir: str = "data"  # where the dataset lies that tells the characters of a ckpt.pt


def inspect(config: InspectConfig) -> str:
    """Return a table of the run's checkpoints, newest first, or what is known of a model from elsewhere.

    Raises:
        CheckpointError: the place cannot be read, or holds neither.
    """
    refuse_missing(config)
    source = find_source(config)
    return _table(config, source) if source.kind is Kind.RUN else describe_model(source, config.data_dir, config.verify)


def lora_flags(config: InspectConfig) -> str:
    """Return the flags with which `train` goes on with the adapters that init_from names, "" where it names none."""
    source = find_source(config)
    if source.kind not in (Kind.RUN, Kind.ADAPTER):
        return ""
    with suppress(CheckpointError):  # of a run without a whole checkpoint, which the table has told
        found = look_at(source, model_only=True)
        return told_to_go_on(found) if found.adapters else ""
    return ""


def _table(config: InspectConfig, source: ModelSource) -> str:
    store = source.store()
    folder = store.folder
    names = [name for name in store.names() if folder.fs.find(folder.path(name))]  # some servers keep empty folders
    if not names and not folder.read_json(RUN_FILE):
        raise CheckpointError(f"out_dir={config.out_dir} holds no run: give the --out_dir of a training run")
    found = list(store.newest_first())
    names = [name for name in names if source.which in ("auto", name)]
    rows: list[tuple[str, ...]] = [COLUMNS]
    rows += _memory_rows(config, folder.run_id(make=False))
    rows += [_row(store, name, found, best(found), config.verify) for name in names]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lanes = found[0].state["config"].get("lanes") if found else 0
    in_lanes = f", gradients summed in {lanes} lanes" if lanes else ""
    adapters = found[0].adapters if found else None
    notes = [f"  {key}: {text}" for key, text in adapter_rows(adapters).items()] if adapters else []
    notes += [f"  base's values: {_base_state(source, adapters)}"] if adapters and config.verify else []
    return "\n".join([f"{source.where}: {len(found)} checkpoint(s){in_lanes}", *notes, *lines])


def adapter_rows(adapters: Adapters) -> dict[str, str]:
    """Return what adapters are, and of which model: key -> text."""
    lora, base = adapters.lora, adapters.base
    revision = f" at {base.revision}" if base.revision else ""
    return {
        "adapters": f"LoRA of rank {lora.rank}, alpha {lora.alpha:g}, on {', '.join(lora.targets)}",
        "base model": f"{base.source}{revision}, its matrices held in {lora.base_dtype}",
    }


def _base_state(source: ModelSource, adapters: Adapters) -> str:
    """Read adapters and their base model; return whether that is the one beside which they were trained."""
    known = "verified" if adapters.base.checksum else "nothing tells its checksum"
    try:
        values = using(source, _values)
    except CheckpointError as error:
        return str(error)
    return f"{known}, {values}" if values == ALL_FINITE else values


def storage_rows(store: CheckpointStore) -> Iterator[tuple[str, ...]]:
    """Yield the checkpoints in storage as rows below COLUMNS, newest first."""
    found = list(store.newest_first())
    for name in store.names():
        yield _row(store, name, found, best(found), verify=False)


def _row(
    store: CheckpointStore, name: str, found: list[Checkpoint], top: Checkpoint | None, verify: bool
) -> tuple[str, ...]:
    try:
        checkpoint = store.load(name)
        if checkpoint is None:
            return (name, "", "", "", "", "storage", "not finished: never announced")
        if verify:
            files = ((store.folder.path(name, file), record) for file, record in checkpoint.files.items())
            odd = next(filter(None, [_verify(store.folder.fs, *file) for file in files]), "")
    except CheckpointError as error:
        return (name, "", "", "", "", "storage", f"DAMAGED: {error}")
    words = ["verified" if verify else "whole"]
    words += [odd] if verify and odd else []
    words += ["latest"] if checkpoint.name == found[0].name else []
    words += ["best"] if top and checkpoint.name == top.name else []
    return (*_facts(checkpoint, checkpoint.size_bytes), "storage", ", ".join(words))


def _memory_rows(config: InspectConfig, run_id: str) -> Iterator[tuple[str, ...]]:
    """Yield the states in the memory of this node, newest first; those of other nodes cannot be seen from here."""
    folder = run_path(config.memory_dir, run_id)
    states = states_in(folder)
    for name in newest_name_first(states):
        shares, odd = states[name], ""
        try:
            for share, checkpoint in shares.items() if config.verify else ():
                for file, record in checkpoint.files.items():
                    path = share_path(folder, name, share, len(shares)) / file
                    odd = odd or _verify(LocalFileSystem(), str(path), record)
            word = ", ".join(filter(None, ["verified" if config.verify else "whole", odd]))
        except CheckpointError as error:
            word = f"DAMAGED: {error}"
        size_bytes = sum(checkpoint.size_bytes for checkpoint in shares.values())
        yield (*_facts(shares[0], size_bytes), "this node's memory", word)


def _facts(checkpoint: Checkpoint, size_bytes: int) -> tuple[str, ...]:
    loss = "" if checkpoint.val_loss is None else f"{checkpoint.val_loss:.4f}"
    saved = datetime.fromtimestamp(checkpoint.state["saved_at_s"], UTC).strftime("%Y-%m-%d %H:%M:%S")
    return (checkpoint.name, str(checkpoint.iter_num), loss, f"{size_bytes / 1e6:.1f}", saved)


def _verify(fs: Any, path: str, record: FileRecord) -> str:
    """Read a file a tensor at a time; return which is the first with values that are not finite, if any.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    odd = [
        f"NOT FINITE: {name} has {count:,} values that are NaN or infinite"
        for name, tensor in stream_tensors(fs, path, record)
        if (count := count_not_finite(tensor))
    ]
    return odd[0] if odd else ""


# a model from elsewhere


def describe_model(source: ModelSource, data_dir: str, verify: bool) -> str:
    """Return lines about a ckpt.pt or pretrained weights.

    Raises:
        CheckpointError: it is missing, damaged or does not fit itself.
    """
    try:
        rows = using(
            source, lambda weights: _model_rows(source, weights, data_dir, verify), model_only=False, merge=False
        )
    except CheckpointError as error:  # of the optimizer, perhaps, which may be another one
        rows = using(source, lambda weights: _model_rows(source, weights, data_dir, verify), merge=False)
        rows["optimizer"] = str(error)
    width = max(map(len, rows))
    return "\n".join([f"{source.where}: {source.kind.value}", *(f"  {k.ljust(width)}  {v}" for k, v in rows.items())])


def _model_rows(source: ModelSource, weights: Weights, data_dir: str, verify: bool) -> dict[str, str]:
    snapshot = weights.snapshot
    args = snapshot.model_args
    count = sum(tensor.numel() for tensor in snapshot.model.values())
    heads = f"{args['n_layer']} layers, {args['n_head']} heads, width {args['n_embd']}"
    more = f"bias={args['bias']}, activation={args.get('activation', 'gelu')}"
    tokenizer = tokenizer_json(snapshot, data_dir)
    return {
        "iteration": str(snapshot.iter_num),
        "best val loss": "none" if snapshot.best_val_loss >= NO_LOSS else f"{snapshot.best_val_loss:.4f}",
        "model": f"{heads}, {args['block_size']} positions, vocab_size={args['vocab_size']}, {more}",
        "parameters": f"{count:,} ({count / 1e6:.2f}M)",
        "stored as": ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in weights.dtypes)),
        "tokenizer": name_of(tokenizer) if tokenizer else "not known",
        **(adapter_rows(snapshot.adapters) if snapshot.adapters else {}),
        "optimizer": "AdamW's moments" if snapshot.optimizer else "none",
        **({"values": _values(weights)} if verify else {}),
        **({"base's values": _base_state(source, snapshot.adapters)} if verify and snapshot.adapters else {}),
    }


def _values(weights: Weights) -> str:
    try:
        for _ in weights.tensors:
            pass
    except CheckpointError as error:
        return str(error)
    return ALL_FINITE
