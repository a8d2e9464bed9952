"""nanoGPT's ckpt.pt to and from a Snapshot.

Source for the format: https://github.com/karpathy/nanoGPT, train.py (the checkpoint dictionary, init_from=resume) and
model.py. Forks and wrappers vary it: what they mean beyond doubt is taken, what they add to the model is refused by
name. Nothing here knows a live model or optimizer.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model import parameter_shapes
from model.names import EMBEDDING, HEAD, MASK_BUFFERS, differences, renamed, without_wrappers
from orchestrator.checkpoint.formats.nanogpt_optimizer import optimizer_state, read_optimizer
from orchestrator.checkpoint.formats.torch_file import TorchFile
from orchestrator.checkpoint.formats.torch_load import load_torch_file
from orchestrator.checkpoint.snapshot import Snapshot
from orchestrator.errors import CheckpointError
from orchestrator.storage.transfer import atomic_write, local_copy

logger = logging.getLogger(__name__)

NO_LOSS = 1e9  # best_val_loss of a state that was never evaluated, as in nanoGPT
SHAPE_KEYS = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size")
MODEL_ARGS = (*SHAPE_KEYS, "dropout")
_KEYS = {"model", "optimizer", "model_args", "iter_num", "best_val_loss", "config"}
_ACTIVATIONS = {"gelu": "gelu", **dict.fromkeys(("gelu_tanh", "gelu_new", "gelu_pytorch_tanh"), "gelu_tanh")}
# Of forks' model_args: how it is computed, drawn or stored, not what.
_HARMLESS = {"flash", "flash_attn", "flash_attention", "use_flash", "use_flash_attn", "compile", "dtype", "device"}
_HARMLESS |= {"init_std", "initializer_range", "gradient_checkpointing", "activation_checkpointing", "seed"}
_HARMLESS |= {"attn_dropout", "resid_dropout", "embd_dropout", "tie_weights", "tie_word_embeddings", "weight_tying"}


def read_nanogpt(
    path_or_url: str | Path, *, model_only: bool = False, storage_options: dict[str, Any] | None = None
) -> Snapshot:
    """Read a ckpt.pt that nanoGPT wrote, without running anything from it.

    model_only: leave the optimizer in the file, which is two thirds of it.
    Tensors are mapped from the file, not copied: memory is used where they are. They outlive the file's deletion, but
    not its being overwritten in place. They are of the file's type, such as bfloat16.

    Raises:
        CheckpointError: the file is missing, damaged, not nanoGPT's, or asks for code to be run.
    """
    source = str(path_or_url)
    with local_copy(source, storage_options) as path:
        content = load_torch_file(path, source)
        try:
            return _to_snapshot(content, source, model_only)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RuntimeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise CheckpointError(f"{source} is not laid out as nanoGPT's ckpt.pt ({reason}); check the path") from None


def _to_snapshot(content: dict[str, Any], source: str, model_only: bool) -> Snapshot:
    for key in ("model", "model_args"):
        if key not in content:
            raise CheckpointError(f"{source}: {_what_it_is(content, key)}")
    named = _named(content["model"], source)
    config = plain(content.get("config") or {})
    if not isinstance(config, dict):
        raise ValueError(f"its config is a {type(content['config']).__name__}, not a dictionary")
    args = _read_model_args(content["model_args"], config, named, source)
    shapes = parameter_shapes(args)
    _check_names(named, shapes, source)
    model = {name: named[name] for name in shapes}
    groups, optimizer = ((), {}) if model_only else read_optimizer(content.get("optimizer"), model, source)
    if extra := sorted(str(key) for key in content.keys() - _KEYS):
        logger.info("%s: left out: %s, which no run here takes", source, ", ".join(extra))
    return Snapshot(
        model=model,
        optimizer=optimizer,
        param_groups=groups,
        model_args=args,
        iter_num=_read_iter_num(content, source),
        best_val_loss=_read_loss(content.get("best_val_loss"), source),
        config=config,
    )


def _what_it_is(content: dict[str, Any], missing: str) -> str:
    """Return what a file without one of nanoGPT's keys may be."""
    if content and all(isinstance(value, Tensor) for value in content.values()):
        return (
            "it holds tensors and nothing else, as a Hugging Face folder's pytorch_model.bin does: give the folder, "
            f"with its config.json. nanoGPT's ckpt.pt has 'model' and 'model_args'; no {missing!r} in it"
        )
    there = ", ".join(map(repr, list(content)[:8])) or "nothing"
    return f"no {missing!r} in it, so it is not nanoGPT's ckpt.pt (it has {there}); check the path"


def _named(saved: Any, source: str) -> dict[str, Tensor]:
    """Return the model's tensors without wrappers' prefixes and masks, one for the two tied names.

    Raises:
        CheckpointError: two names become one, the tied two differ, or something is no tensor of numbers.
    """
    if not isinstance(saved, dict):
        raise ValueError(f"its model is a {type(saved).__name__}, not a dictionary of tensors")
    try:
        names = renamed((name, without_wrappers(name)) for name in saved)
    except ValueError as error:
        raise CheckpointError(f"{source}: {error}") from None
    named = {name: saved[old] for name, old in names.items() if not name.endswith(MASK_BUFFERS)}
    for name, tensor in named.items():
        if not isinstance(tensor, Tensor) or not tensor.dtype.is_floating_point:
            kind = str(tensor.dtype).removeprefix("torch.") if isinstance(tensor, Tensor) else type(tensor).__name__
            raise CheckpointError(f"{source}: {name} is of {kind}, no tensor of floating-point numbers")
    head = named.pop(HEAD, None)
    if head is not None and not _is_same(head, named.setdefault(EMBEDDING, head)):
        raise CheckpointError(f"{source}: {HEAD} differs from {EMBEDDING}, but nanoGPT ties them; no such model here")
    if dtypes := {str(x.dtype).removeprefix("torch.") for x in named.values() if x.dtype != torch.float32}:
        logger.info("%s: its weights are %s, they are taken as float32", source, ", ".join(sorted(dtypes)))
    return named


def _is_same(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors have the same bits: what is no number equals itself, too."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    is_one = a.data_ptr() == b.data_ptr()
    return is_one or torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def _read_model_args(saved: Any, config: dict[str, Any], named: dict[str, Tensor], source: str) -> dict[str, Any]:
    """Return GPTConfig's arguments: the file's, and what it lacks as its tensors tell it.

    Raises:
        CheckpointError: a value is none, or they are of a model that is not ours.
    """
    if not isinstance(saved, dict):
        raise ValueError(f"its model_args are a {type(saved).__name__}, not a dictionary")
    told = _told_by(named)
    if lacking := [key for key in SHAPE_KEYS if key not in saved]:
        if unknown := [key for key in lacking if key not in told]:
            raise CheckpointError(f"{source}: model_args lacks {', '.join(unknown)}, and no tensor tells it")
        taken = ", ".join(f"{key}={told[key]}" for key in lacking)
        logger.info("%s: model_args lacks what its tensors tell: %s", source, taken)
    args = {key: _checked(key, saved.get(key, told.get(key)), source) for key in SHAPE_KEYS}
    if args["n_embd"] % args["n_head"]:
        raise CheckpointError(f"{source}: n_embd={args['n_embd']} is not divisible by n_head={args['n_head']}")
    dropout = saved.get("dropout", 0.0)
    args["dropout"] = float(dropout) if type(dropout) in (int, float) and 0 <= dropout < 1 else 0.0
    _refuse_forks({key: value for key, value in saved.items() if key not in (*MODEL_ARGS, "activation")}, source)
    return {**args, "activation": _activation(saved, config, source)}


def _told_by(named: dict[str, Tensor]) -> dict[str, Any]:
    """Return those of GPTConfig's arguments that can be seen from the tensors: all but the number of heads."""
    told: dict[str, Any] = {"bias": any(name.endswith("ln_1.bias") for name in named)}
    told["n_layer"] = len({name.split(".")[2] for name in named if name.startswith("transformer.h.")})
    for name, key in ((EMBEDDING, "vocab_size"), ("transformer.wpe.weight", "block_size")):
        if name in named and named[name].dim() == 2:
            told[key], told["n_embd"] = named[name].shape
    return told


def _checked(key: str, value: Any, source: str) -> Any:
    """Return a value of model_args in its type: numbers may be 0-d tensors, or floats without a fraction."""
    value = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
    if key == "bias":
        if value not in (True, False):
            raise CheckpointError(f"{source}: model_args has bias={value!r}, which is neither True nor False")
        return bool(value)
    if type(value) not in (int, float) or not math.isfinite(value) or value != int(value) or value < 1:
        raise CheckpointError(f"{source}: model_args has {key}={value!r}, which is no whole number above 0")
    return int(value)


def _activation(args: dict[str, Any], config: dict[str, Any], source: str) -> str:
    """Return the activation; `write_nanogpt` puts it into config, where nanoGPT's own model_args have no place for it.

    Raises:
        CheckpointError: it is one that our model does not have.
    """
    name = args.get("activation") or config.get("activation") or "gelu"
    if name not in _ACTIVATIONS:
        raise CheckpointError(
            f"{source}: its activation is {name!r}, this model has {', '.join(_ACTIVATIONS)}: it would be another model"
        )
    return _ACTIVATIONS[name]


def _refuse_forks(others: dict[str, Any], source: str) -> None:
    """Look at what model_args has besides nanoGPT's keys: what is switched off, or changes no result, is left out.

    Raises:
        CheckpointError: something is switched on that our model does not have.
    """
    on = {key: value for key, value in others.items() if _is_on(value) and key not in _HARMLESS}
    if on:
        listed = ", ".join(f"{key}={value!r}" for key, value in on.items())
        raise CheckpointError(
            f"{source}: model_args has {listed}, which this model does not have: its results would be others. "
            "If they change no result, remove them from model_args"
        )
    if off := ", ".join(f"{key}={value!r}" for key, value in others.items()):
        logger.info("%s: left out of model_args: %s", source, off)


def _is_on(value: Any) -> bool:
    if isinstance(value, Tensor):
        return bool(value.any())
    return bool(value) and str(value).lower() not in ("none", "false", "off", "no")


def _read_iter_num(content: dict[str, Any], source: str) -> int:
    """Return the iteration; where the file has none, the steps that its optimizer has counted."""
    if content.get("iter_num") is not None:
        iter_num = content["iter_num"]
        value = float(iter_num)
        if not value >= 0 or value != int(value):
            raise CheckpointError(f"{source}: iter_num={iter_num!r} is no number of iterations")
        return int(value)
    optimizer = content.get("optimizer")
    kept = optimizer.get("state") if isinstance(optimizer, dict) else None
    steps = {int(each["step"]) for each in (kept or {}).values() if isinstance(each, dict) and "step" in each}
    iter_num = max(steps, default=0)
    why = "as many as its optimizer has stepped" if steps else "and no optimizer that counts them"
    logger.warning("%s: no iter_num in it: %d iterations are taken, %s", source, iter_num, why)
    return iter_num


def _read_loss(value: Any, source: str) -> float:
    """Return the best validation loss, nanoGPT's 1e9 where there is none; value: a number, or a tensor of one."""
    loss = NO_LOSS if value is None else float(value)
    if value is None or not math.isfinite(loss):
        said = "no best_val_loss in it" if value is None else f"best_val_loss={loss}"
        logger.info("%s: %s: the next evaluation is the best one", source, said)
        return NO_LOSS
    return loss


def write_nanogpt(
    snapshot: Snapshot,
    path_or_url: str | Path,
    tensors: Iterable[tuple[str, Tensor]] | None = None,
    *,
    storage_options: dict[str, Any] | None = None,
) -> None:
    """Write a ckpt.pt from which nanoGPT's sample.py samples and its train.py resumes.

    tensors: the snapshot's, by name and one at a time; then its own need no content. Nothing is delivered where the
        iteration ends with an error. Default: the snapshot's own.
    A snapshot without optimizer state is resumed with new moments. A GradScaler's state has no place in the file.

    Raises:
        CheckpointError: the state does not fit nanoGPT's model, or the file cannot be written.
    """
    target = str(path_or_url)
    args = snapshot.model_args
    shapes = parameter_shapes(args)
    _check_names(snapshot.model, shapes, target)
    if (activation := args.get("activation", "gelu")) != "gelu":
        logger.warning(
            "%s: this model computes GELU by its tanh approximation, nanoGPT the exact one: there its logits differ by "
            "up to 0.02. A Hugging Face export keeps them, and so does this program, which finds it in config",
            target,
        )
    file = TorchFile()
    model = {name: file.blank(name, snapshot.model[name]) for name in shapes}
    content = {
        "model": {**model, HEAD: model[EMBEDDING]},
        "optimizer": optimizer_state(snapshot, shapes, file, target),
        "model_args": {key: args.get(key, 0.0) for key in MODEL_ARGS},
        "iter_num": snapshot.iter_num,
        "best_val_loss": float(snapshot.best_val_loss),
        "config": plain(snapshot.config) | ({"activation": activation} if activation != "gelu" else {}),
    }
    with atomic_write(target, storage_options) as scratch_file:
        file.save(content, scratch_file, tensors or {**snapshot.model, **snapshot.optimizer}.items(), target)


def plain(value: Any) -> Any:
    """Return value reduced to JSON types: what is none of them becomes its text, a non-finite number None."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, Tensor) and value.numel() == 1:
        return plain(value.item())
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value if value is None or type(value) in (bool, int, str) else str(value)


def _check_names(named: dict[str, Tensor], shapes: dict[str, tuple[int, ...]], source: str) -> None:
    if faults := differences(shapes, {name: tuple(tensor.shape) for name, tensor in named.items()}):
        raise CheckpointError(f"{source}: tensors do not fit its model_args: {faults}")
