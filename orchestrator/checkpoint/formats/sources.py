"""Where a model comes from: a run of ours or one checkpoint of it, a ckpt.pt, a Hugging Face folder, or a GPT-2 name.

`train`, `sample`, `export` and `inspect` resolve the same words here, into the same things and with the same refusals.
Knows no live model.
"""

from __future__ import annotations

import enum
import logging
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from fsspec.implementations.local import LocalFileSystem
from torch import Tensor

from model import PretrainedError, open_pretrained, parameter_shapes, read_pretrained_args
from model.names import HEAD
from model.pretrained import Pretrained
from orchestrator.checkpoint.finite import all_finite
from orchestrator.checkpoint.formats.nanogpt import NO_LOSS, read_nanogpt
from orchestrator.checkpoint.formats.run_tokenizer import saved_tokenizer
from orchestrator.checkpoint.formats.stream import first_whole, mapped, outline, stream
from orchestrator.checkpoint.snapshot import Snapshot
from orchestrator.checkpoint.store import CheckpointStore
from orchestrator.config import GPT2_NAMES
from orchestrator.data.token_files import read_tokenizer
from orchestrator.data.tokenizer_folder import read_tokenizer_folder
from orchestrator.data.tokenizers import Tokenizer
from orchestrator.data.vocabulary import GPT2, assumed
from orchestrator.errors import CheckpointError, ConfigError, DataError, StorageUnavailableError, nearest
from orchestrator.storage.options import StorageSettings, storage_options_of
from orchestrator.storage.transfer import exists, locate

logger = logging.getLogger(__name__)

T = TypeVar("T")
_CHECKPOINT = re.compile(r"checkpoint_\d{8,}_\w+")
_NANOGPT_ENDS = (".pt", ".pth")
_WEIGHT_ENDS = (".safetensors", ".index.json", ".gguf", ".h5", ".msgpack", ".onnx")
_WEIGHT_FILE = re.compile(r"(pytorch_model|adapter_model).*\.bin")
_FOLDER_FILES = ("config.json", "adapter_config.json")  # by which a Hugging Face folder is known


class Kind(enum.Enum):
    """What a source is; the value is what messages call it."""

    RUN = "a run"
    NANOGPT = "nanoGPT's ckpt.pt"
    HUGGINGFACE = "a Hugging Face folder"
    HUB = "a GPT-2 of the Hugging Face Hub"


class SourceSettings(StorageSettings, Protocol):
    """The settings of any command that takes a model from somewhere."""

    @property
    def init_from(self) -> str: ...


@dataclass(frozen=True)
class Source:
    """A model that is there. where: its path, URL or name; which: the checkpoint, of a run; key: the setting for it."""

    kind: Kind
    where: str
    which: str = "auto"
    options: dict[str, Any] | None = field(default=None, repr=False)
    key: str = "init_from"

    def store(self) -> CheckpointStore:
        """Return the checkpoints of a run."""
        return CheckpointStore(self.where, self.options, self.key)

    @property
    def is_local(self) -> bool:
        """Whether it lies on a disk of this machine, or on one that it has mounted."""
        protocol = self.where.partition("://")[0] if "://" in self.where else "file"
        return self.kind is not Kind.HUB and protocol in LocalFileSystem.protocol


@dataclass(frozen=True)
class Weights:
    """A model that is read: what it is, and its tensors one at a time.

    name: of the checkpoint, file, folder or model. snapshot: its tensors may have no content (device meta).
    config["tokenizer"] is there where the tokenizer is known. dtypes: how the parameters are stored.
    tensors: each of the snapshot's once, float32. Use nothing of what was made of them before the last one has come.
    """

    name: str
    snapshot: Snapshot
    dtypes: frozenset[torch.dtype]
    tensors: Iterator[tuple[str, Tensor]]


def find_source(config: SourceSettings, which: str = "auto", key: str = "checkpoint") -> Source:
    """Return what init_from names, or what out_dir holds with init_from=resume.

    which: the checkpoint that is chosen of a run; key: the setting that says so.

    Raises:
        ConfigError, CheckpointError: nothing of the kind is there, or it cannot be reached.
    """
    if config.init_from == "resume":
        if Path(config.out_dir).is_file():
            raise CheckpointError(
                f"out_dir={config.out_dir} is a file, and no run's folder: a file of weights is given as "
                f"--init_from={config.out_dir}"
            )
        options = storage_options_of(config)
        found = _in_folder(config.out_dir, which, options, "out_dir")
        return _chosen(found or Source(Kind.RUN, config.out_dir, which, options, "out_dir"), which, key)
    where = config.init_from
    if where in GPT2_NAMES:
        return _chosen(Source(Kind.HUB, where), which, key)
    options = storage_options_of(config, where)
    title = f"init_from={where}"
    refuse_weight_file(where, title)
    last = where.rstrip("/").rsplit("/", 1)[-1]
    if Path(where).is_file() or (where.endswith(_NANOGPT_ENDS) and not Path(where).is_dir()):
        return _chosen(Source(Kind.NANOGPT, where, options=options), which, key)
    if _CHECKPOINT.fullmatch(last):
        if which not in ("auto", last):
            raise ConfigError(f"{title} is one checkpoint, but {key}={which} asks for another: leave one of them out")
        return Source(Kind.RUN, where.rstrip("/").rpartition("/")[0] or ".", last, options)
    found = _in_folder(where, which, options, "init_from")
    if not found:
        raise CheckpointError(
            f"{title} holds no run, no ckpt.pt and no Hugging Face folder with a config.json: give the path or URL of "
            f"one of these, or {', '.join(GPT2_NAMES)}"
        )
    return _chosen(found, which, key)


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
        raise CheckpointError(f"{title}: that is {what}: give its folder, {folder or '.'}, with config.json in it")
    if last == "state.json" and _CHECKPOINT.fullmatch(folder.rpartition("/")[2]):
        raise CheckpointError(f"{title}: that is a file of a checkpoint: give its folder, {folder}")


def _chosen(source: Source, which: str, key: str) -> Source:
    """Return the source, unless it has no checkpoints to choose from."""
    if source.kind is not Kind.RUN and which != "auto":
        raise ConfigError(f"{key}={which} chooses among a run's checkpoints, but {source.where} is {source.kind.value}")
    return source


def _in_folder(where: str, which: str, options: dict[str, Any] | None, key: str) -> Source | None:
    """Return what a folder holds: a run first of all; an out_dir then nanoGPT's ckpt.pt, others GPT-2 weights."""
    folder = where.rstrip("/")
    huggingface = Source(Kind.HUGGINGFACE, where, options=options)

    def is_huggingface() -> bool:
        return any(exists(f"{folder}/{name}", options) for name in _FOLDER_FILES)

    store = CheckpointStore(where, options, key)
    try:
        if next(store.newest_first(), None) or store.damaged:
            return Source(Kind.RUN, where, which, options, key)
    except StorageUnavailableError as error:
        with suppress(CheckpointError):  # who may read its files need not be allowed to list them
            if is_huggingface():
                return huggingface
        raise error
    has_ckpt = exists(f"{folder}/ckpt.pt", options)
    if not (has_ckpt and key == "out_dir") and is_huggingface():
        return huggingface
    return Source(Kind.NANOGPT, f"{folder}/ckpt.pt", options=options) if has_ckpt else None


# reading


def using(source: Source, use: Callable[[Weights], T], *, model_only: bool = True) -> T:
    """Return what `use` makes of a source's weights; of a run, a damaged checkpoint is passed over for an older one.

    Raises:
        CheckpointError: the source is missing, damaged, does not fit itself, or holds values that are not finite.
    """
    if source.kind is Kind.RUN:
        store = source.store()
        _, made = first_whole(store, source.which, lambda found: use(_of_run(store, found, model_only)))
        return made
    if source.kind is Kind.NANOGPT:
        snapshot = read_nanogpt(source.where, model_only=model_only, storage_options=source.options)
        tensors = {**snapshot.model, **snapshot.optimizer}
        dtypes = frozenset(tensor.dtype for tensor in snapshot.model.values())
        widened = ((name, tensor.float()) for name, tensor in tensors.items())
        name = f"{source.where} (iteration {snapshot.iter_num})"
        return use(Weights(name, _empty(snapshot), dtypes, all_finite(widened, source.where)))
    with _pretrained(source) as found:
        weights = Weights(source.where, _outline(source, found), frozenset(found.dtypes), iter(()))
        return use(replace(weights, tensors=all_finite(_translated(found.tensors()), source.where)))


def read_source(source: Source, *, model_only: bool = False) -> Snapshot:
    """Return a source's state with tensors that are mapped from its files where they can be, in the file's type.

    Raises:
        CheckpointError: the source is missing, damaged or does not fit itself.
    """
    if source.kind is Kind.RUN:
        store = source.store()
        return first_whole(store, source.which, lambda found: mapped(store, found, model_only))[1]
    if source.kind is Kind.NANOGPT:
        return read_nanogpt(source.where, model_only=model_only, storage_options=source.options)
    with _pretrained(source) as found:
        named = _translate(lambda: found.state(views=True))
        named.pop(HEAD, None)  # tied to the embedding
        return replace(_outline(source, found), model=named)


def look_at(source: Source, model_only: bool = False) -> Snapshot:
    """Return a source's state without the content of its tensors; what is wrong with it is found as far as is cheap.

    A ckpt.pt and a folder on this machine are read through once; of a folder elsewhere the headers are; of a run, which
    has checksums, the list of its checkpoints; of a Hub name nothing is fetched.

    Raises:
        CheckpointError: the source is missing, does not fit itself, or holds values that are not finite.
    """
    if source.kind is Kind.HUB:
        args = {"dropout": 0.0, **read_pretrained_args(source.where)}
        return Snapshot({}, {}, (), args, 0, NO_LOSS, config={"tokenizer": GPT2})
    if source.kind is Kind.RUN:
        return outline(source.store().select(source.which), model_only)
    if source.kind is Kind.NANOGPT or source.is_local:
        return using(source, _drained, model_only=model_only)
    with _pretrained(source) as found:
        return _outline(source, found)


def _drained(weights: Weights) -> Snapshot:
    for _ in weights.tensors:
        pass
    return weights.snapshot


def tokenizer_json(snapshot: Snapshot, data_dir: str) -> dict[str, Any] | None:
    """Return a state's tokenizer as JSON: what it carries, else its dataset's, else by its size; None: not known."""
    carried = snapshot.config.get("tokenizer")
    if isinstance(carried, dict) and carried:
        return {key: value for key, value in carried.items() if key != "content"}  # of a file that travels along
    dataset = str(snapshot.config.get("dataset") or "")
    folder = Path(data_dir, dataset)
    if dataset and any((folder / name).is_file() for name in ("meta.json", "meta.pkl")):
        try:
            tokenizer = read_tokenizer(data_dir, dataset)
        except DataError as error:
            logger.warning("the tokens of %s are not known: %s", folder, error)
            tokenizer = None
        if tokenizer:
            return tokenizer.to_json()
    return assumed(int(snapshot.model_args["vocab_size"]))


def tokenizer_of(source: Source, snapshot: Snapshot, data_dir: str) -> Tokenizer | None:
    """Return the tokenizer of a source's state, None where it is not known.

    Raises:
        DataError: it is known, and its file is missing or damaged.
    """
    if source.kind is Kind.HUGGINGFACE:
        return read_tokenizer_folder(source.where, source.options)
    store = source.store() if source.kind is Kind.RUN else None
    if saved := saved_tokenizer(snapshot.config, store, data_dir):
        return saved
    found = tokenizer_json(snapshot, data_dir)
    return saved_tokenizer({**snapshot.config, "tokenizer": found}, None, data_dir) if found else None


def _of_run(store: CheckpointStore, checkpoint: Any, model_only: bool) -> Weights:
    snapshot = outline(checkpoint, model_only)
    title = f"{checkpoint.name} in {store.out_dir}"
    dtypes = frozenset(tensor.dtype for tensor in snapshot.model.values())
    name = f"{checkpoint.name} (iteration {checkpoint.iter_num})"
    return Weights(name, snapshot, dtypes, all_finite(stream(store, checkpoint, model_only), title))


def _outline(source: Source, found: Pretrained) -> Snapshot:
    """Return the state of pretrained weights, of which nothing but the headers has been read."""
    if found.left_out:
        logger.warning(
            "%s: left out: %s, which is no part of a GPT-2's language model",
            source.where,
            ", ".join(found.left_out[:5]),
        )
    others = sorted(str(dtype).removeprefix("torch.") for dtype in found.dtypes - {torch.float32})
    if others:
        logger.info("%s: its weights are %s, they are taken as float32", source.where, ", ".join(others))
    model = {name: torch.empty(shape, device="meta") for name, shape in found.shapes.items()}
    return Snapshot(model, {}, (), {"dropout": 0.0, **found.args}, 0, NO_LOSS, config=_config_of(source))


def _config_of(source: Source) -> dict[str, Any]:
    if source.kind is Kind.HUB:
        return {"tokenizer": GPT2}
    try:
        tokenizer = read_tokenizer_folder(source.where, source.options)
    except DataError as error:  # the weights may be all that is asked for
        logger.warning("the tokens of %s are not known: %s", source.where, error)
        tokenizer = None
    return {"tokenizer": tokenizer.to_json()} if tokenizer else {}


def _empty(snapshot: Snapshot) -> Snapshot:
    """Return the state as it will be stored, without content."""

    def of(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: torch.empty(tensor.shape, device="meta") for name, tensor in tensors.items()}

    return replace(snapshot, model=of(snapshot.model), optimizer=of(snapshot.optimizer))


@contextmanager
def _pretrained(source: Source) -> Iterator[Pretrained]:
    """Open pretrained weights; `model/` knows none of our errors."""
    with ExitStack() as stack:
        yield _translate(lambda: stack.enter_context(open_pretrained(source.where, parameter_shapes, _fs(source))))


def _translate(call: Callable[[], T]) -> T:
    try:
        return call()
    except PretrainedError as error:
        raise CheckpointError(str(error)) from None


def _translated(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    try:
        yield from tensors
    except PretrainedError as error:
        raise CheckpointError(str(error)) from None


def _fs(source: Source) -> Any:
    return None if source.kind is Kind.HUB else locate(source.where, source.options)[0]
