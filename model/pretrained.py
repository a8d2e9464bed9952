"""Reads pretrained GPT-2 weights: by Hub name, from a Hugging Face folder, or from an fsspec URL of one.

Only config.json and the tensors are read, never code. That they fit each other is known before any tensor is read. Must
not build a model: it hands over arguments and tensors. `gpt.py` puts them together, and tells the shapes.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import torch
from torch import Tensor

from model.config import GPT2_VOCAB_SIZE
from model.huggingface import (
    PretrainedError,
    check_tied,
    config_arguments,
    from_huggingface,
    names_in,
    transpose_if_linear,
)
from model.lora import LoRAConfig
from model.names import EMBEDDING, HEAD, differences
from model.peft import adapter_names, base_of_config, lora_config
from model.weight_files import (
    ADAPTER_CONFIG,
    ADAPTER_FILES,
    Folder,
    Stored,
    adapter_only,
    folder_at,
    hub_folder,
    stored_tensors,
)

# Source: config.json of https://huggingface.co/openai-community/gpt2 and its three larger siblings
GPT2_SIZES = {
    "gpt2": {"n_layer": 12, "n_head": 12, "n_embd": 768},  # 124M parameters
    "gpt2-medium": {"n_layer": 24, "n_head": 16, "n_embd": 1024},  # 350M
    "gpt2-large": {"n_layer": 36, "n_head": 20, "n_embd": 1280},  # 774M
    "gpt2-xl": {"n_layer": 48, "n_head": 25, "n_embd": 1600},  # 1558M
}


Shapes = dict[str, tuple[int, ...]]  # name of a parameter -> shape, in our layout
ShapesOf = Callable[[dict[str, Any]], Shapes]  # from GPTConfig's arguments: `gpt.parameter_shapes`


@dataclass(frozen=True)
class Pretrained:
    """A GPT-2 whose config.json and tensors fit each other.

    args: GPTConfig's. shapes: of its parameters. stored: its tensors by our names, in the file's layout.
    left_out: names of other tensors in the file, such as another head's. config: the content of config.json, {} for a
    Hub name.
    """

    args: dict[str, Any]
    shapes: Shapes
    stored: dict[str, Stored]
    left_out: list[str]
    config: dict[str, Any]

    @property
    def dtypes(self) -> set[torch.dtype]:
        return {each.dtype for each in self.stored.values()}

    def state(self, *, views: bool = False) -> dict[str, Tensor]:
        """Return a GPT state dict, float32 in our layout; views: see `read_pretrained`.

        Raises:
            PretrainedError: the head's weight is not the token embedding's.
        """
        return from_huggingface(((name, each.read()) for name, each in self.stored.items()), views=views)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield each parameter once, float32 in our layout, in the order of `shapes`; the next frees the one before.

        Raises:
            PretrainedError: the head's weight is not the token embedding's.
        """
        for name in self.shapes:
            tensor = self.stored[name].read()
            if name == EMBEDDING and HEAD in self.stored:
                check_tied(self.stored[HEAD].read(), tensor)
            yield name, transpose_if_linear(name, tensor).float()


def read_pretrained_args(source: str) -> dict[str, Any]:
    """Return GPTConfig's arguments for pretrained weights without loading them; a Hub name needs no network.

    Raises:
        PretrainedError: no such source, or not a GPT-2.
    """
    if source in GPT2_SIZES:
        return {
            **GPT2_SIZES[source],
            "block_size": 1024,
            "vocab_size": GPT2_VOCAB_SIZE,
            "bias": True,
            "activation": "gelu_tanh",
        }
    with _folder_of(source, None) as folder:
        return _read_config(folder)[0]


@contextmanager
def open_pretrained(source: str, shapes_of: ShapesOf, fs: Any = None, revision: str = "") -> Iterator[Pretrained]:
    """Lend pretrained weights of which the headers only were read. Files that are fetched are deleted afterwards.

    source: a key of GPT2_SIZES, a folder, or an fsspec URL such as s3://bucket/gpt2.
    fs: the filesystem of the folder, connected as it has to be; default: as fsspec connects to it by itself.
    revision: of a Hub name, see `hub_folder`.

    Raises:
        PretrainedError: the source is unreachable, incomplete, damaged or not a GPT-2.
    """
    with _folder_of(source, fs, revision) as folder:
        args, config = (read_pretrained_args(source), {}) if source in GPT2_SIZES else _read_config(folder)
        names, left_out = _names_in(stored := stored_tensors(folder), source)
        ours = {name: stored[old] for name, old in names.items()}
        if EMBEDDING not in ours and HEAD in ours:
            ours[EMBEDDING] = ours[HEAD]
        shapes = shapes_of(args)
        _check_fits(ours, shapes, source)
        yield Pretrained(args, shapes, ours, left_out, config)


def read_pretrained(
    source: str, shapes_of: ShapesOf, *, views: bool = False, fs: Any = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return GPTConfig's arguments and a GPT state dict, float32 on the CPU.

    source, shapes_of, fs: see `open_pretrained`.
    views: for a caller that copies the tensors and drops them: they stay mapped from the files where these are float32,
        which outlives the files' deletion, not their being overwritten. Otherwise each is copied as it is read.

    Raises:
        PretrainedError: the source is unreachable, incomplete, damaged or not a GPT-2.
    """
    with open_pretrained(source, shapes_of, fs) as found:
        return found.args, found.state(views=views)


@dataclass(frozen=True)
class PretrainedAdapter:
    """An adapter that peft saved, whose adapter_config.json and tensors fit each other.

    base, revision: of the model that it was made for, as its maker named them. stored: its tensors by our names.
    """

    lora: LoRAConfig
    base: str
    revision: str
    stored: dict[str, Stored]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield each parameter once, float32."""
        for name, each in self.stored.items():
            yield name, each.read().float()


@contextmanager
def open_adapter(source: str, fs: Any = None) -> Iterator[PretrainedAdapter]:
    """Lend an adapter of peft's of which the headers only were read. Files that are fetched are deleted afterwards.

    source, fs: see `open_pretrained`.

    Raises:
        PretrainedError: the folder is unreachable, incomplete or damaged, or holds an adapter that we do not compute.
    """
    with _folder_of(source, fs) as folder:
        try:
            with folder.open(ADAPTER_CONFIG) as file:
                content = json.loads(file.read())
        except (FileNotFoundError, ValueError) as error:
            raise PretrainedError(f"{source}: {ADAPTER_CONFIG}: {error}") from error
        stored = stored_tensors(folder, ADAPTER_FILES)
        try:
            names = adapter_names(stored)
            lora = lora_config(content, names)
        except PretrainedError as error:
            raise PretrainedError(f"{source}: {error}") from None
        ours = {name: stored[old] for name, old in names.items()}
        _check_types(ours, source)
        yield PretrainedAdapter(lora, *base_of_config(content), ours)


@contextmanager
def _folder_of(source: str, fs: Any, revision: str = "") -> Iterator[Folder]:
    if source in GPT2_SIZES:
        yield hub_folder(source, revision)
        return
    try:
        fs, path = (fs, fs._strip_protocol(source)) if fs else fsspec.url_to_fs(source)
    except (ValueError, ImportError) as e:  # an unknown protocol, or one whose package is not installed
        raise PretrainedError(f"{source}: {e}") from e
    with tempfile.TemporaryDirectory() as scratch:
        yield folder_at(source, fs, path.rstrip("/"), Path(scratch))


def _read_config(folder: Folder) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return GPTConfig's arguments and the content of config.json."""
    try:
        with folder.open("config.json") as file:
            content = json.loads(file.read())
        return config_arguments(content), content
    except FileNotFoundError as e:
        raise _nothing_there(folder) from e
    except ValueError as e:  # broken JSON, or PretrainedError from config_arguments
        if isinstance(e, PretrainedError) and str(e).startswith(folder.title):  # it could not be fetched
            raise
        raise PretrainedError(f"{folder.title}: config.json: {e}") from e


def _nothing_there(folder: Folder) -> PretrainedError:
    names = ", ".join(GPT2_SIZES)
    return adapter_only(folder) or PretrainedError(
        f"{folder.title}: no config.json there; pretrained weights are one of {names}, or the path or URL of a folder "
        "with config.json and model.safetensors"
    )


def _names_in(stored: dict[str, Stored], source: str) -> tuple[dict[str, str], list[str]]:
    try:
        return names_in(stored)
    except PretrainedError as error:
        raise PretrainedError(f"{source}: {error}") from None


def _check_fits(stored: dict[str, Stored], shapes: Shapes, source: str) -> None:
    """Compare names and shapes with those that config.json asks for, in the file's layout, and look at the types.

    Raises:
        PretrainedError: naming the tensors that are missing, unexpected or of another shape.
    """
    meta = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    expected = {name: tuple(transpose_if_linear(name, weight).shape) for name, weight in meta.items()}
    found = {name: each.shape for name, each in stored.items()}
    if faults := differences({**expected, **({HEAD: expected[EMBEDDING]} if HEAD in found else {})}, found):
        raise PretrainedError(f"{source}: tensors do not fit its config.json: {faults}")
    _check_types(stored, source)


def _check_types(stored: dict[str, Stored], source: str) -> None:
    for name, each in stored.items():
        if not each.dtype.is_floating_point:
            kind = str(each.dtype).removeprefix("torch.")
            raise PretrainedError(f"{source}: {name} is {kind}, no floating-point numbers: is the model quantized?")
