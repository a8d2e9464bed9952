"""The weights of a source: read whole, one tensor at a time, or only their names and shapes. Knows no live model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from model import PretrainedError, open_adapter, open_pretrained, parameter_shapes, read_pretrained_args
from model.huggingface import UnreachableError
from model.names import HEAD
from model.pretrained import Pretrained
from orchestrator.checkpoint.finite import all_finite
from orchestrator.checkpoint.formats.base import check_adapters_fit, merged_outline, merged_tensors
from orchestrator.checkpoint.formats.nanogpt import NO_LOSS, read_nanogpt
from orchestrator.checkpoint.formats.run_tokenizer import saved_tokenizer, whole_json
from orchestrator.checkpoint.formats.sources import Kind, ModelSource, base_of, find_base
from orchestrator.checkpoint.formats.stream import first_whole, mapped, outline, stream
from orchestrator.checkpoint.snapshot import Adapters, Base, Snapshot
from orchestrator.checkpoint.store import Checkpoint, CheckpointStore
from orchestrator.data.token_files import read_tokenizer
from orchestrator.data.tokenizer_folder import read_tokenizer_folder
from orchestrator.data.tokenizers import Tokenizer
from orchestrator.data.vocabulary import GPT2, assumed
from orchestrator.errors import CheckpointError, DamagedError, DataError, StorageUnavailableError
from orchestrator.storage.reasons import is_transient

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class Weights:
    """A model while it is read, one tensor at a time.

    name: of the checkpoint, file, folder or model. snapshot: its tensors may have no content (device meta); its config
    has a "tokenizer" if that is known. dtypes: how the parameters are stored.
    tensors: each of the snapshot's once, float32. Whether they are right is known after the last one: deliver nothing
    before.
    """

    name: str
    snapshot: Snapshot
    dtypes: frozenset[torch.dtype]
    tensors: Iterator[tuple[str, Tensor]]


def using(source: ModelSource, use: Callable[[Weights], T], *, model_only: bool = True, merge: bool = True) -> T:
    """Call `use` with a source's weights, and return its value. If a run's checkpoint is damaged, use an older one.

    merge: of adapters, hand over the plain model that they and their base are together; else the adapters.

    Raises:
        CheckpointError: the source is missing, damaged, does not fit itself, or holds values that are not finite.
    """
    if source.kind is Kind.RUN:
        store = source.store()

        def use_checkpoint(found: Checkpoint) -> T:
            if found.adapters and merge:
                return _using_merged(source, _of_run(store, found, model_only=True), use)
            return use(_of_run(store, found, model_only))

        return first_whole(store, source.which, use_checkpoint)[1]
    if source.kind is Kind.NANOGPT:
        snapshot = read_nanogpt(source.where, model_only=model_only, storage_options=source.options)
        tensors = {**snapshot.model, **snapshot.optimizer}
        dtypes = frozenset(tensor.dtype for tensor in snapshot.model.values())
        widened = ((name, tensor.float()) for name, tensor in tensors.items())
        name = f"{source.where} (iteration {snapshot.iter_num})"
        return use(Weights(name, _empty(snapshot), dtypes, all_finite(widened, source.where)))
    if source.kind is Kind.ADAPTER:
        with _adapter(source) as adapter:
            return _using_merged(source, adapter, use) if merge else use(adapter)
    with _pretrained(source) as found:
        weights = Weights(source.where, _outline(source, found), frozenset(found.dtypes), iter(()))
        return use(replace(weights, tensors=all_finite(_translated(found.tensors()), source.where)))


def read_source(source: ModelSource, *, model_only: bool = False) -> Snapshot:
    """Return a source's state with tensors that are mapped from its files where they can be, in the file's type.

    Adapters come without their base model.

    Raises:
        CheckpointError: the source is missing, damaged or does not fit itself.
    """
    if source.kind is Kind.RUN:
        store = source.store()
        return first_whole(store, source.which, lambda found: mapped(store, found, model_only))[1]
    if source.kind is Kind.NANOGPT:
        return read_nanogpt(source.where, model_only=model_only, storage_options=source.options)
    if source.kind is Kind.ADAPTER:
        with _adapter(source) as adapter:
            return replace(adapter.snapshot, model=dict(adapter.tensors))
    with _pretrained(source) as found:
        named = _translate(lambda: found.state(views=True))
        named.pop(HEAD, None)  # tied to the embedding
        return replace(_outline(source, found), model=named)


def read_merged(source: ModelSource) -> Snapshot:
    """Return the plain model that a source's adapters and their base model are together, whole in memory.

    Raises:
        CheckpointError: the adapters or their base are missing or damaged, or the base is another model.
    """
    return using(source, lambda weights: replace(weights.snapshot, model=dict(weights.tensors)))


def look_at(source: ModelSource, model_only: bool = False) -> Snapshot:
    """Return a source's state without the content of its tensors, and find faults as far as that is cheap.

    A ckpt.pt or a folder on this machine is read through once. Of a folder elsewhere only the headers are read, of a
    run, which has checksums, only the list of its checkpoints. Of a Hub name nothing is fetched. Of adapters, the base
    model is not read.

    Raises:
        CheckpointError: the source is missing, does not fit itself, or holds values that are not finite.
    """
    if source.kind is Kind.ADAPTER:
        with _adapter(source) as adapter:
            return _drained(adapter)
    is_read = source.kind is Kind.NANOGPT or (source.kind is Kind.HUGGINGFACE and source.is_local)
    return using(source, _drained, model_only=model_only) if is_read else _headers(source, model_only)


def _headers(source: ModelSource, model_only: bool) -> Snapshot:
    """Return a whole model's state without the content of its tensors, and read as little as that takes."""
    if source.kind is Kind.HUB:
        args = {"dropout": 0.0, **read_pretrained_args(source.where)}
        return Snapshot({}, {}, (), args, 0, NO_LOSS, config={"tokenizer": GPT2})
    if source.kind is Kind.RUN:
        return outline(source.store().select(source.which), model_only)
    if source.kind is Kind.NANOGPT:
        return _empty(read_nanogpt(source.where, model_only=model_only, storage_options=source.options))
    with _pretrained(source) as found:
        return _outline(source, found)


def _drained(weights: Weights) -> Snapshot:
    for _ in weights.tensors:
        pass
    return weights.snapshot


def tokenizer_json(snapshot: Snapshot, data_dir: str) -> dict[str, Any] | None:
    """Return a state's tokenizer as JSON: its own, else its dataset's, else a guess by its size; None if unknown."""
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


def tokenizer_of(source: ModelSource, snapshot: Snapshot, data_dir: str) -> Tokenizer | None:
    """Return the tokenizer of a source's state, None where it is not known.

    Raises:
        DataError: it is known, and its file is missing or damaged.
    """
    if source.kind is Kind.HUGGINGFACE:
        return read_tokenizer_folder(source.where, source.folder.fs if source.folder else None)
    folder = source.folder if source.kind is Kind.RUN else None
    if saved := saved_tokenizer(snapshot.config, folder, data_dir):
        return saved
    found = tokenizer_json(snapshot, data_dir)
    return saved_tokenizer({**snapshot.config, "tokenizer": found}, None, data_dir) if found else None


def _using_merged(source: ModelSource, adapters: Weights, use: Callable[[Weights], T]) -> T:
    """Call `use` with the plain model that adapters and their base are together."""
    snapshot = replace(adapters.snapshot, model=dict(adapters.tensors))
    assert snapshot.adapters
    assert source.settings
    check_adapters_fit(snapshot, adapters.name)
    base = find_base(source.settings, snapshot.adapters.base)

    def use_merged(found: Weights) -> T:
        logger.info("adapters of %s, merged into their base model, %s", adapters.name, found.name)
        tensors = merged_tensors(snapshot, found.snapshot, found.tensors, base.where)
        return use(Weights(adapters.name, merged_outline(snapshot), found.dtypes, tensors))

    try:
        return using(base, use_merged)
    except DamagedError as error:  # else it would be the adapters' checkpoint that is taken for damaged
        raise CheckpointError(f"the base model of {adapters.name} is damaged: {error}") from None


@contextmanager
def _adapter(source: ModelSource) -> Iterator[Weights]:
    """Lend an adapter of peft's. Its model_args are those of its base model, of which only the headers are read."""
    fs = source.folder.fs if source.folder else None
    with ExitStack() as stack:
        found = _translate(lambda: stack.enter_context(open_adapter(source.where, fs)))
        its = Base(found.base, found.revision)
        assert source.settings
        base = find_base(source.settings, its)
        if not source.settings.lora_base:  # the whole path, and the checkpoint or commit that it is now
            named = base_of(base)
            its = replace(named, revision=named.revision or its.revision)
        outlined = _headers(base, model_only=True)
        tokenizer = _adapters_tokenizer(source, base, outlined)
        carried = {"tokenizer": whole_json(tokenizer)} if tokenizer else {}
        snapshot = Snapshot(
            model={name: torch.empty(each.shape, device="meta") for name, each in found.stored.items()},
            optimizer={},
            param_groups=(),
            model_args=outlined.model_args,
            iter_num=0,
            best_val_loss=NO_LOSS,
            config={"lora_dropout": found.lora.dropout, **carried},
            adapters=Adapters(replace(found.lora, dropout=0.0), its),
        )
        check_adapters_fit(snapshot, source.where)
        dtypes = frozenset(each.dtype for each in found.stored.values())
        yield Weights(source.where, snapshot, dtypes, all_finite(_translated(found.tensors()), source.where))


def _adapters_tokenizer(source: ModelSource, base: ModelSource, outlined: Snapshot) -> Tokenizer | None:
    """Return the tokenizer beside an adapter, else its base model's."""
    try:
        own = read_tokenizer_folder(source.where, source.folder.fs if source.folder else None)
        return own or tokenizer_of(base, outlined, "")
    except DataError as error:
        logger.warning("the tokens of %s are not known: %s", source.where, error)
        return None


def _of_run(store: CheckpointStore, checkpoint: Checkpoint, model_only: bool) -> Weights:
    snapshot = outline(checkpoint, model_only)
    title = f"{checkpoint.name} in {store.folder.out_dir}"
    dtypes = frozenset(tensor.dtype for tensor in snapshot.model.values())
    name = f"{checkpoint.name} (iteration {checkpoint.iter_num})"
    return Weights(name, snapshot, dtypes, all_finite(stream(store, checkpoint, model_only), title))


def _outline(source: ModelSource, found: Pretrained) -> Snapshot:
    """Return the state of pretrained weights whose headers alone have been read."""
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


def _config_of(source: ModelSource) -> dict[str, Any]:
    if source.kind is Kind.HUB:
        return {"tokenizer": GPT2}
    try:
        tokenizer = read_tokenizer_folder(source.where, source.folder.fs if source.folder else None)
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
def _pretrained(source: ModelSource) -> Iterator[Pretrained]:
    """Open pretrained weights; `model/` knows none of our errors."""
    with ExitStack() as stack:
        fs = source.folder.fs if source.folder else None
        yield _translate(
            lambda: stack.enter_context(open_pretrained(source.where, parameter_shapes, fs, source.revision))
        )


def _translate(call: Callable[[], T]) -> T:
    try:
        return call()
    except PretrainedError as error:
        raise _ours(error) from error


def _translated(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    try:
        yield from tensors
    except PretrainedError as error:
        raise _ours(error) from error


def _ours(error: PretrainedError) -> CheckpointError:
    may_pass = isinstance(error, UnreachableError) and error.__cause__ is not None and is_transient(error.__cause__)
    return (StorageUnavailableError if may_pass else CheckpointError)(str(error))
