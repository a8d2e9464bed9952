"""Where a model comes from: a run of ours or one checkpoint of it, a ckpt.pt, a folder of Hugging Face's, a GPT-2 name.

`train`, `sample`, `export` and `inspect` resolve the same words here, into the same sources and with the same refusals.
Reads no tensor (`weights.py`).
"""

from __future__ import annotations

import enum
import re
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from fsspec.implementations.local import LocalFileSystem

from model import hub_commit
from model.weight_files import ADAPTER_CONFIG, TENSOR_FILES
from orchestrator.checkpoint.snapshot import Base
from orchestrator.checkpoint.store import CheckpointStore
from orchestrator.config import GPT2_NAMES
from orchestrator.errors import CheckpointError, ConfigError, StorageUnavailableError, nearest
from orchestrator.host.machine import seen_as
from orchestrator.storage.identity import is_on_disk
from orchestrator.storage.options import StorageSettings, storage_options_of
from orchestrator.storage.run_folder import RunFolder

_CHECKPOINT = re.compile(r"checkpoint_\d{8,}_\w+")
_NANOGPT_ENDS = (".pt", ".pth")
_WEIGHT_ENDS = (".safetensors", ".index.json", ".gguf", ".h5", ".msgpack", ".onnx")
_WEIGHT_FILE = re.compile(r"(pytorch_model|adapter_model).*\.bin")
_FOLDER_FILES = ("config.json", ADAPTER_CONFIG)  # by which a Hugging Face folder is known


class Kind(enum.Enum):
    """What a source is; the value is what messages call it."""

    RUN = "a run"
    NANOGPT = "nanoGPT's ckpt.pt"
    HUGGINGFACE = "a Hugging Face folder"
    ADAPTER = "a peft adapter"
    HUB = "a GPT-2 of the Hugging Face Hub"


class SourceSettings(StorageSettings, Protocol):
    """The settings of any command that takes a model from somewhere."""

    @property
    def init_from(self) -> str: ...

    @property
    def lora_base(self) -> str: ...


@dataclass(frozen=True)
class ModelSource:
    """A model that is there.

    where: its path, URL or name. which: the checkpoint, of a run; the revision, of a Hub name, or auto.
    folder: where a run or a Hugging Face folder lies.
    settings: by which it was found; of adapters, they tell where the base model lies.
    """

    kind: Kind
    where: str
    which: str = "auto"
    options: dict[str, Any] | None = field(default=None, repr=False)
    folder: RunFolder | None = field(default=None, repr=False, compare=False)
    settings: SourceSettings | None = field(default=None, repr=False, compare=False)

    def store(self) -> CheckpointStore:
        """Return the checkpoints of a run."""
        assert self.folder
        return CheckpointStore(self.folder)

    @property
    def revision(self) -> str:
        """Which state of a Hub name is asked for; "" for the newest."""
        return self.which if self.kind is Kind.HUB and self.which != "auto" else ""

    @property
    def is_local(self) -> bool:
        """Whether it lies on a disk of this machine, or on one that it has mounted."""
        return self.kind is not Kind.HUB and is_on_disk(self.where)


def find_source(
    config: SourceSettings, which: str = "auto", key: str = "checkpoint", folder: RunFolder | None = None
) -> ModelSource:
    """Return the source that init_from names, or the one in out_dir with init_from=resume.

    which: the checkpoint that is chosen of a run; key: the setting that says so. folder: out_dir, if it is open.

    Raises:
        ConfigError, CheckpointError: nothing of the kind is there, or it cannot be reached.
    """
    return replace(_find(config, which, key, folder), settings=config)


def _find(config: SourceSettings, which: str, key: str, folder: RunFolder | None) -> ModelSource:
    if config.init_from == "resume":
        if Path(config.out_dir).is_file():
            raise CheckpointError(
                f"out_dir={config.out_dir} is a file, and no run's folder: a file of weights is given as "
                f"--init_from={config.out_dir}"
            )
        options = storage_options_of(config)
        folder = folder or RunFolder(config.out_dir, options)
        found = _in_folder(folder, which, options)
        return _chosen(found or ModelSource(Kind.RUN, config.out_dir, which, options, folder), which, key)
    where = config.init_from
    if where in GPT2_NAMES:
        return _chosen(ModelSource(Kind.HUB, where), which, key)
    options = storage_options_of(config, where)
    title = f"init_from={where}"
    refuse_weight_file(where, title)
    last = where.rstrip("/").rsplit("/", 1)[-1]
    if Path(where).is_file() or (where.endswith(_NANOGPT_ENDS) and not Path(where).is_dir()):
        return _chosen(ModelSource(Kind.NANOGPT, where, options=options), which, key)
    if _CHECKPOINT.fullmatch(last):
        if which not in ("auto", last):
            raise ConfigError(f"{title} is one checkpoint, but {key}={which} asks for another: leave one of them out")
        run = where.rstrip("/").rpartition("/")[0] or "."
        return ModelSource(Kind.RUN, run, last, options, RunFolder(run, options, "init_from"))
    found = _in_folder(RunFolder(where, options, "init_from"), which, options)
    if not found:
        raise CheckpointError(
            f"{title} holds no run, no ckpt.pt and no Hugging Face folder with a config.json or {ADAPTER_CONFIG}: "
            f"give the path or URL of one of these, or {', '.join(GPT2_NAMES)}"
        )
    return _chosen(found, which, key)


def find_base(config: SourceSettings, base: Base) -> ModelSource:
    """Return the source of the weights that a state of adapters belongs to: where it began, or lora_base says.

    Raises:
        CheckpointError: nothing is there, or no whole model, or it cannot be reached.
    """
    where = config.lora_base or base.source
    if not where:
        raise CheckpointError("nothing tells the base model of these adapters: give --lora_base=PATH, where it lies")
    try:
        source = find_source(_At(where, config.out_dir, config.storage_options))
        if base.revision and not config.lora_base and source.kind in (Kind.RUN, Kind.HUB):
            source = replace(source, which=base.revision)
            _refuse_deleted(source)
        _refuse_adapters(source)
    except StorageUnavailableError:
        raise
    except (CheckpointError, ConfigError) as error:
        remedy = "Put the weights back there, or give --lora_base=PATH, where they lie now"
        raise CheckpointError(f"the base model of these adapters is missing: {error}. {remedy}") from None
    return source


def identity_of(where: str) -> str | None:
    """Return a name for a source that all nodes that see the same one have in common, None if this node has it not.

    where: a path or URL, or the name of a GPT-2.
    """
    if where in GPT2_NAMES or not is_on_disk(where):
        return where
    return seen_as(LocalFileSystem._strip_protocol(where))


def base_of(source: ModelSource) -> Base:
    """Return a whole model as the base of adapters, without its checksum: the checkpoint or commit that it is now.

    The commit of a Hub name is known where its weights have been read.

    Raises:
        CheckpointError: it is adapters, or no checkpoint of a run is whole.
    """
    _refuse_adapters(source)
    if source.kind is Kind.HUB:
        return Base(source.where, hub_commit(source.where, source.revision))
    where = str(Path(source.where).absolute()) if source.is_local else source.where
    return Base(where, source.store().select(source.which).name if source.kind is Kind.RUN else "")


def _refuse_deleted(base: ModelSource) -> None:
    """Check that a run has a checkpoint that it had once.

    Raises:
        CheckpointError: it has deleted it.
    """
    if base.kind is Kind.RUN and base.which not in base.store().names():
        raise CheckpointError(
            f"the run {base.where} has deleted {base.which}, beside which they were trained: it keeps its newest and "
            "its best ones alone"
        )


def _refuse_adapters(base: ModelSource) -> None:
    """Check that a base is a whole model.

    Raises:
        CheckpointError: it is adapters.
    """
    if base.kind is Kind.ADAPTER or (base.kind is Kind.RUN and base.store().select(base.which).adapters):
        raise CheckpointError(f"{base.where} holds adapters, and adapters need a whole model")


@dataclass(frozen=True)
class _At:
    """SourceSettings that name a place."""

    init_from: str
    out_dir: str
    storage_options: str
    lora_base: str = ""


def refuse_missing(config: SourceSettings) -> None:
    """Check that init_from is a word, a URL, or a path that is there.

    Raises:
        ConfigError: it is none, with the nearest word.
    """
    words = ("resume", *GPT2_NAMES)
    if not (config.init_from in words or "://" in config.init_from or Path(config.init_from).exists()):
        raise ConfigError(
            f"init_from={config.init_from!r} is neither resume, {', '.join(GPT2_NAMES)} nor an existing ckpt.pt, "
            f"Hugging Face folder or run{nearest(config.init_from, words)}"
        )


def refuse_weight_file(where: str, title: str) -> None:
    """Check that it is no file of a Hugging Face folder, which says nothing without the folder's config.json.

    Raises:
        CheckpointError: it is.
    """
    folder, _, last = where.rstrip("/").rpartition("/")
    is_part = last.endswith(_WEIGHT_ENDS) or _WEIGHT_FILE.fullmatch(last) or last in _FOLDER_FILES
    if is_part:
        what = "a weights file" if last not in _FOLDER_FILES else "a file of a Hugging Face folder"
        its = ADAPTER_CONFIG if last.startswith("adapter_") else "config.json"
        raise CheckpointError(f"{title}: that is {what}: give its folder, {folder or '.'}, with {its} in it")
    if last == "state.json" and _CHECKPOINT.fullmatch(folder.rpartition("/")[2]):
        raise CheckpointError(f"{title}: that is a file of a checkpoint: give its folder, {folder}")


def _chosen(source: ModelSource, which: str, key: str) -> ModelSource:
    """Return the source, unless it has no checkpoints to choose from."""
    if source.kind is not Kind.RUN and which != "auto":
        raise ConfigError(f"{key}={which} chooses among a run's checkpoints, but {source.where} is {source.kind.value}")
    return source


def _in_folder(folder: RunFolder, which: str, options: dict[str, Any] | None) -> ModelSource | None:
    """Return the source in a folder: a run first of all; in an out_dir then nanoGPT's ckpt.pt, else Hugging Face's."""
    where = folder.out_dir

    def of_huggingface() -> ModelSource | None:
        """Return what is there; who merges an adapter into a whole model may leave adapter_config.json beside that."""
        has_config, has_adapter = (folder.exists(name) for name in _FOLDER_FILES)
        is_adapter = has_adapter and not (has_config and any(folder.exists(name) for name in TENSOR_FILES))
        kind = Kind.ADAPTER if is_adapter else Kind.HUGGINGFACE
        return ModelSource(kind, where, options=options, folder=folder) if has_config or has_adapter else None

    store = CheckpointStore(folder)
    try:
        if next(store.newest_first(), None) or store.damaged:
            return ModelSource(Kind.RUN, where, which, options, folder)
    except StorageUnavailableError as error:
        with suppress(CheckpointError):  # who may read its files need not be allowed to list them
            if found := of_huggingface():
                return found
        raise error
    has_ckpt = folder.exists("ckpt.pt")
    if not (has_ckpt and folder.key == "out_dir") and (found := of_huggingface()):
        return found
    return ModelSource(Kind.NANOGPT, f"{where.rstrip('/')}/ckpt.pt", options=options) if has_ckpt else None
