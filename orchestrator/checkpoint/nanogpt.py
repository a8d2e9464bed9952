"""nanoGPT's ckpt.pt to and from a Snapshot.

Source for the format: https://github.com/karpathy/nanoGPT, train.py (the checkpoint dictionary, init_from=resume) and
model.py (configure_optimizers). Nothing here knows a live model or optimizer.
"""

from __future__ import annotations

import logging
import math
import pickle
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from orchestrator.checkpoint.progress import Progress
from orchestrator.checkpoint.snapshot import ParamGroup, Snapshot
from orchestrator.checkpoint.torch_file import TorchFile
from orchestrator.checkpoint.transfer import delivered, fetched
from orchestrator.errors import CheckpointError

logger = logging.getLogger(__name__)

HEAD, EMBEDDING = "lm_head.weight", "transformer.wte.weight"  # one tensor under two names
SHAPE_KEYS = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size")
MODEL_ARGS = (*SHAPE_KEYS, "dropout")
_COMPILED_PREFIX = "_orig_mod."  # torch.compile puts it before every name
_MASK = ".attn.bias"  # the causal mask, a buffer that nanoGPT keeps where PyTorch has no flash attention
_SLOTS = ("exp_avg", "exp_avg_sq")
_PIECE_BYTES = 2**20


def read_nanogpt(
    path_or_url: str | Path, *, model_only: bool = False, storage_options: dict[str, Any] | None = None
) -> Snapshot:
    """Read a ckpt.pt that nanoGPT wrote, without running anything from it.

    model_only: leave the optimizer in the file, which is two thirds of it.
    Tensors are mapped from the file, not copied: memory is used where they are. They outlive the file's deletion, but
    not its being overwritten in place.

    Raises:
        CheckpointError: the file is missing, damaged, not nanoGPT's, or asks for code to be run.
    """
    source = str(path_or_url)
    with fetched(source, storage_options) as path:
        _verify(path, source)
        content = _load(path, source)
        try:
            return _to_snapshot(content, source, model_only)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise CheckpointError(f"{source} is not laid out as nanoGPT's ckpt.pt ({reason}); check the path") from None


def _to_snapshot(content: dict[str, Any], source: str, model_only: bool) -> Snapshot:
    for key in ("model", "model_args", "iter_num", "best_val_loss"):
        if key not in content:
            raise CheckpointError(f"{source}: no {key!r} in it, so it is not nanoGPT's ckpt.pt; check the path")
    model = _read_model(content, source)
    groups, optimizer = ((), {}) if model_only else _read_optimizer(content.get("optimizer"), model, source)
    return Snapshot(
        model=model,
        optimizer=optimizer,
        param_groups=groups,
        model_args=_read_model_args(content, source),
        iter_num=int(content["iter_num"]),
        best_val_loss=float(content["best_val_loss"]),  # a float, or the 0-d tensor of an evaluation
        config=plain(content.get("config") or {}),
    )


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
    if args.get("activation", "gelu") != "gelu":
        logger.warning(
            "%s: this model computes GELU by its tanh approximation, nanoGPT the exact one: there its logits differ by "
            "up to 0.02. A Hugging Face export keeps them",
            target,
        )
    file = TorchFile()
    model = {name: file.blank(name, snapshot.model[name]) for name in shapes}
    content = {
        "model": {**model, HEAD: model[EMBEDDING]},
        "optimizer": _optimizer_state(snapshot, shapes, file, target),
        "model_args": {key: args.get(key, 0.0) for key in MODEL_ARGS},
        "iter_num": snapshot.iter_num,
        "best_val_loss": float(snapshot.best_val_loss),
        "config": plain(snapshot.config),
    }
    with delivered(target, storage_options) as scratch_file:
        file.save(content, scratch_file, tensors or {**snapshot.model, **snapshot.optimizer}.items(), target)


def parameter_shapes(model_args: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the parameters of nanoGPT's GPT, name -> shape, in the order of its named_parameters()."""
    C = model_args["n_embd"]
    modules: dict[str, tuple[int, ...]] = {}
    modules |= {"transformer.wte": (model_args["vocab_size"], C), "transformer.wpe": (model_args["block_size"], C)}
    for i in range(model_args["n_layer"]):
        block = f"transformer.h.{i}"
        modules |= {f"{block}.ln_1": (C,), f"{block}.attn.c_attn": (3 * C, C), f"{block}.attn.c_proj": (C, C)}
        modules |= {f"{block}.ln_2": (C,), f"{block}.mlp.c_fc": (4 * C, C), f"{block}.mlp.c_proj": (C, 4 * C)}
    modules["transformer.ln_f"] = (C,)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in modules.items():
        shapes[f"{name}.weight"] = shape
        if model_args["bias"] and not name.endswith(("wte", "wpe")):
            shapes[f"{name}.bias"] = shape[:1]  # (out)
    return shapes


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


def _verify(path: Path, source: str) -> None:
    """Compare every record with its checksum in the zip file: torch.load does not, a flipped bit would pass."""
    remedy = "copy it again, or take an older one"
    try:
        damaged = _damaged_record(path, source)
    except OSError as error:
        raise CheckpointError(f"{source} cannot be read: {type(error).__name__}: {error}") from None
    except Exception as error:  # whatever a damaged directory of records makes of zipfile
        what = "is cut off or not a file of torch.save's"
        raise CheckpointError(f"{source} {what} ({error}); is it still being written? Else {remedy}") from None
    if damaged:
        raise CheckpointError(f"{source} is damaged: the checksum of its record {damaged} is wrong; {remedy}")


def _damaged_record(path: Path, source: str) -> str | None:
    progress = Progress(f"verifying {source}", path.stat().st_size)
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            try:
                with archive.open(info) as record:
                    while piece := record.read(_PIECE_BYTES):
                        progress.add(len(piece))
            except zipfile.BadZipFile:
                return info.filename
    return None


def _load(path: Path, source: str) -> dict[str, Any]:
    try:
        # Mapped, not read: what is not asked for is never fetched from the disk.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        wanted = str(error).partition("WeightsUnpickler error: ")[2].partition("\n")[0] or "its pickle is damaged"
        raise CheckpointError(
            f"{source} holds more than tensors and plain values, and nothing is run from a checkpoint ({wanted}); "
            "load it where you trust it, and save model, optimizer and plain values only"
        ) from None
    except (RuntimeError, ValueError, LookupError, EOFError, TypeError, AttributeError) as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"{source} is not a file of torch.save's ({reason}); check the path") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{source} holds a {type(content).__name__}, not nanoGPT's dictionary; check the path")
    return content


def _read_model_args(content: dict[str, Any], source: str) -> dict[str, Any]:
    args = content["model_args"]
    missing = [key for key in SHAPE_KEYS if key not in args]
    if missing:
        raise CheckpointError(f"{source}: model_args lacks {', '.join(missing)}; was it written by an old nanoGPT?")
    known = {key: args[key] for key in MODEL_ARGS if key in args}
    return {"dropout": 0.0, **known, "activation": "gelu"}


def _read_model(content: dict[str, Any], source: str) -> dict[str, Tensor]:
    shapes = parameter_shapes(_read_model_args(content, source))
    named = {name.removeprefix(_COMPILED_PREFIX): tensor for name, tensor in content["model"].items()}
    named = {name: tensor for name, tensor in named.items() if not name.endswith(_MASK)}
    head = named.pop(HEAD, None)
    _check_names(named, shapes, source)
    if head is not None and not torch.equal(head, named[EMBEDDING]):
        raise CheckpointError(f"{source}: {HEAD} differs from {EMBEDDING}, but nanoGPT ties them; no such model here")
    return {name: named[name] for name in shapes}


def _check_names(named: dict[str, Tensor], shapes: dict[str, tuple[int, ...]], source: str) -> None:
    faults = [f"missing {name}" for name in shapes if name not in named]
    faults += [f"unexpected {name}" for name in named if name not in shapes]
    faults += [
        f"{name} is {tuple(named[name].shape)} instead of {shape}"
        for name, shape in shapes.items()
        if name in named and tuple(named[name].shape) != shape
    ]
    if faults:
        more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise CheckpointError(f"{source}: tensors do not fit its model_args: {'; '.join(faults[:5])}{more}")


def _in_optimizer_order(shapes: dict[str, tuple[int, ...]]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the names of decayed parameters (matrices and embeddings) and of the others.

    Source: nanoGPT's GPT.configure_optimizers. The optimizer numbers its parameters in this order.
    """
    decayed = tuple(name for name, shape in shapes.items() if len(shape) >= 2)
    others = tuple(name for name, shape in shapes.items() if len(shape) < 2)
    return decayed, others


def _read_optimizer(
    saved: dict[str, Any] | None, model: dict[str, Tensor], source: str
) -> tuple[tuple[ParamGroup, ...], dict[str, Tensor]]:
    """Return groups and state under the parameters' names; a file without optimizer or steps gives none."""
    if saved is None:
        return (), {}
    members = _in_optimizer_order({name: tuple(tensor.shape) for name, tensor in model.items()})
    try:
        groups = tuple(_read_group(group, names) for group, names in zip(saved["param_groups"], members, strict=True))
        ids = [i for group in saved["param_groups"] for i in group["params"]]
        slots_of = dict(zip((name for names in members for name in names), map(saved["state"].get, ids), strict=True))
        tensors = dict(_named_slots(slots_of, model)) if saved["state"] else {}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{source}: its optimizer state is not that of nanoGPT's AdamW ({type(error).__name__}: {error}); "
            "remove the key 'optimizer' to go on with new moments"
        ) from None
    return groups, tensors


def _read_group(group: dict[str, Any], names: tuple[str, ...]) -> ParamGroup:
    if len(group["params"]) != len(names):
        raise ValueError(f"{len(group['params'])} parameters in a group instead of {len(names)}")
    beta1, beta2 = group["betas"]
    scalars = (float(group[key]) for key in ("eps", "weight_decay"))
    return ParamGroup(names, float(group["lr"]), (float(beta1), float(beta2)), *scalars)


def _named_slots(slots_of: dict[str, dict[str, Any]], model: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    steps = set()
    for name, slots in slots_of.items():
        for slot in _SLOTS:
            if slots[slot].shape != model[name].shape:
                raise ValueError(f"{slot} of {name} is {tuple(slots[slot].shape)}")
            yield f"{slot}.{name}", slots[slot]
        steps.add(float(slots["step"]))
    if len(steps) != 1:
        raise ValueError(f"parameters were stepped differently often: {sorted(steps)}")
    yield "step", torch.tensor(steps.pop(), dtype=torch.float32)


def _optimizer_state(
    snapshot: Snapshot, shapes: dict[str, tuple[int, ...]], file: TorchFile, target: str
) -> dict[str, Any]:
    """Return the state_dict of the AdamW that nanoGPT's configure_optimizers makes."""
    members = _in_optimizer_order(shapes)
    groups, first = [], 0
    for group in _groups(snapshot, members, target):
        groups.append(_group_state(group, list(range(first, first + len(group.params))), snapshot.config))
        first += len(group.params)
    if not snapshot.optimizer and snapshot.iter_num:
        logger.warning("%s: the state has no optimizer moments; nanoGPT would resume with new ones", target)
    names = [name for group in members for name in group] if snapshot.optimizer else []
    state = {i: _slots(snapshot.optimizer, name, file) for i, name in enumerate(names)}
    return {"state": state, "param_groups": groups}


def _slots(optimizer: dict[str, Tensor], name: str, file: TorchFile) -> dict[str, Tensor]:
    return {
        "step": file.blank("step", optimizer["step"]),  # each parameter's own: AdamW counts them up in place
        **{slot: file.blank(f"{slot}.{name}", optimizer[f"{slot}.{name}"]) for slot in _SLOTS},
    }


def _groups(snapshot: Snapshot, members: tuple[tuple[str, ...], ...], target: str) -> list[ParamGroup]:
    """Return the snapshot's groups in nanoGPT's order, or new ones by its settings where it has none."""
    if not snapshot.param_groups:
        config = {"learning_rate": 6e-4, "beta1": 0.9, "beta2": 0.95, "weight_decay": 0.1, **snapshot.config}
        lr, betas = config["learning_rate"], (config["beta1"], config["beta2"])
        return [
            ParamGroup(members[0], lr, betas, 1e-8, config["weight_decay"]),
            ParamGroup(members[1], lr, betas, 1e-8, 0.0),
        ]
    by_members = {frozenset(group.params): group for group in snapshot.param_groups}
    try:
        return [by_members[frozenset(names)] for names in members]
    except KeyError:
        raise CheckpointError(f"{target}: the optimizer's groups are not nanoGPT's two, decayed and the rest") from None


def _group_state(group: ParamGroup, ids: list[int], config: dict[str, Any]) -> dict[str, Any]:
    """Return one entry of param_groups, with every key that the AdamW of current PyTorch writes."""
    # nanoGPT makes a fused AdamW on a GPU, and a loaded state overrides that: with None, PyTorch's GradScaler (float16)
    # would hand its scale to a kernel that refuses it.
    is_fused = str(config.get("device", "cuda")).startswith("cuda")
    return {
        "weight_decay": group.weight_decay,
        "lr": group.lr,
        "betas": tuple(group.betas),
        "eps": group.eps,
        "amsgrad": False,
        "maximize": False,
        "foreach": None,
        "capturable": False,
        "differentiable": False,
        "fused": True if is_fused else None,
        "decoupled_weight_decay": True,
        "params": ids,
    }
