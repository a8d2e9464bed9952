"""Reads pretrained GPT-2 weights: by Hub name, from a Hugging Face folder, or from an fsspec URL of one.

Only config.json and the tensors are read, never code, never a pickle that could run some. Must not build a model:
it hands over arguments and tensors (`gpt.py` puts them together).
"""

from __future__ import annotations

import json
import pickle
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
import torch
from fsspec.implementations.local import LocalFileSystem
from safetensors import SafetensorError, safe_open
from torch import Tensor

from model.huggingface import PretrainedError, config_arguments, from_huggingface

# Source: config.json of https://huggingface.co/openai-community/gpt2 and its three larger siblings
GPT2_SIZES = {
    "gpt2": {"n_layer": 12, "n_head": 12, "n_embd": 768},  # 124M parameters
    "gpt2-medium": {"n_layer": 24, "n_head": 16, "n_embd": 1024},  # 350M
    "gpt2-large": {"n_layer": 36, "n_head": 20, "n_embd": 1280},  # 774M
    "gpt2-xl": {"n_layer": 48, "n_head": 25, "n_embd": 1600},  # 1558M
}
TENSOR_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)

Fetch = Callable[[str], Path]  # the name of a file of the model -> where it lies on this machine, or FileNotFoundError


def read_pretrained_args(source: str) -> dict[str, Any]:
    """Return GPTConfig's arguments for pretrained weights without loading them; a Hub name needs no network.

    Raises:
        PretrainedError: no such source, or not a GPT-2.
    """
    if source in GPT2_SIZES:
        return {**GPT2_SIZES[source], "block_size": 1024, "vocab_size": 50257, "bias": True, "activation": "gelu_tanh"}
    with tempfile.TemporaryDirectory() as scratch:
        return _read_args(source, _folder_files(source, Path(scratch)))


def read_pretrained(source: str, *, views: bool = False) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return GPTConfig's arguments and a GPT state dict, float32 on the CPU.

    source: a key of GPT2_SIZES, a folder, or an fsspec URL such as s3://bucket/gpt2.
    views: for a caller that copies the tensors and drops them: they stay mapped from the files where these are float32,
        which outlives the files' deletion, not their being overwritten. Otherwise each is copied as it is read.

    Raises:
        PretrainedError: the source is unreachable, incomplete, damaged or not a GPT-2.
    """
    if source in GPT2_SIZES:
        return read_pretrained_args(source), from_huggingface(_tensors(source, _hub_files(source)), views=views)
    with tempfile.TemporaryDirectory() as scratch:
        fetch = _folder_files(source, Path(scratch))
        return _read_args(source, fetch), from_huggingface(_tensors(source, fetch), views=views)


def check_tensors(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], source: str) -> None:
    """Compare names and shapes of a model's tensors with those of a file.

    Raises:
        PretrainedError: naming every tensor that is missing, unexpected or of another shape.
    """
    faults = [f"missing {name}" for name in expected if name not in found]
    faults += [f"unexpected {name}" for name in found if name not in expected]
    faults += [
        f"{name} is {tuple(found[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in found and found[name].shape != tensor.shape
    ]
    if faults:
        raise PretrainedError(f"{source}: tensors do not fit its config.json: {'; '.join(faults)}")


def _read_args(source: str, fetch: Fetch) -> dict[str, Any]:
    try:
        return config_arguments(json.loads(fetch("config.json").read_bytes()))
    except FileNotFoundError as e:
        names = ", ".join(GPT2_SIZES)
        raise PretrainedError(
            f"{source}: no config.json there; pretrained weights are one of {names}, or the path or URL of a folder "
            "with config.json and model.safetensors"
        ) from e
    except ValueError as e:  # broken JSON, or PretrainedError from config_arguments
        raise PretrainedError(f"{source}: config.json: {e}") from e


def _tensors(source: str, fetch: Fetch) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of the first of TENSOR_FILES that is there, mapped from the file."""
    for name in TENSOR_FILES:
        try:
            path = fetch(name)
        except FileNotFoundError:
            continue
        try:
            yield from _shards(path, fetch) if name.endswith(".index.json") else _tensors_of(path)
        except FileNotFoundError as e:
            raise PretrainedError(f"{source}: {name} names a file that is not there: {e}") from e
        except (SafetensorError, ValueError, RuntimeError, EOFError) as e:
            raise PretrainedError(f"{source}: {name} cannot be read: {e}") from e
        return
    raise PretrainedError(f"{source}: none of {', '.join(TENSOR_FILES)} there")


def _shards(index: Path, fetch: Fetch) -> Iterator[tuple[str, Tensor]]:
    weight_map: dict[str, str] = json.loads(index.read_bytes())["weight_map"]
    for shard in sorted(set(weight_map.values())):
        if PurePosixPath(shard).name != shard:
            raise ValueError(f"shard {shard!r} lies outside the folder")
        yield from _tensors_of(fetch(shard))


def _tensors_of(path: Path) -> Iterator[tuple[str, Tensor]]:
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
        for name in names:
            with safe_open(
                path, framework="pt"
            ) as file:  # each mapped by itself: its memory is free once it is dropped
                tensor = file.get_tensor(name)
            yield name, tensor
        return
    try:
        # A file of the old format, no zip, cannot be mapped.
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError:  # PyTorch's own message advises to switch the protection off
        raise ValueError("it holds more than tensors, or is no PyTorch file; convert it to safetensors") from None
    yield from tensors.items()


def _folder_files(source: str, scratch: Path) -> Fetch:
    """Return a Fetch that leaves local files where they are and copies others into scratch."""
    try:
        fs, folder = fsspec.url_to_fs(source)
    except (ValueError, ImportError) as e:  # an unknown protocol, or one whose package is not installed
        raise PretrainedError(f"{source}: {e}") from e

    def fetch(name: str) -> Path:
        if isinstance(fs, LocalFileSystem):
            path = Path(folder, name)
            if not path.is_file():
                raise FileNotFoundError(path)
            return path
        try:
            fs.get_file(f"{folder}/{name}", str(scratch / name))
        except FileNotFoundError:
            raise
        except OSError as e:  # no permission, no route, a broken transfer
            raise PretrainedError(f"{source}: cannot fetch {name}: {e}") from e
        return scratch / name

    return fetch


def _hub_files(model_type: str) -> Fetch:
    """Return a Fetch from the Hugging Face Hub, or from its local cache where the Hub was visited before."""
    # Imported here: it is slow to import, and only those who fetch from the Hub need it.
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    def fetch(name: str) -> Path:
        repo = f"openai-community/{model_type}"
        with suppress(LocalEntryNotFoundError):  # the Hub is asked, which takes half a minute offline, if need be only
            return Path(hf_hub_download(repo, name, local_files_only=True))
        try:
            return Path(hf_hub_download(repo, name))
        except EntryNotFoundError as e:
            if isinstance(e, LocalEntryNotFoundError):  # neither the Hub nor the cache answered
                raise _unreachable(model_type, e) from e
            raise FileNotFoundError(name) from e
        except OSError as e:
            raise _unreachable(model_type, e) from e

    return fetch


def _unreachable(model_type: str, cause: Exception) -> PretrainedError:
    return PretrainedError(
        f"{model_type}: cannot reach the Hugging Face Hub ({type(cause).__name__}: {cause}). Download config.json and "
        f"model.safetensors of openai-community/{model_type} on a machine that can, and pass the path or URL of their "
        "folder instead of the name."
    )
