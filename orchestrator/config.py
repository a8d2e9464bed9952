"""TrainConfig: every setting of a training run, and nanoGPT's grammar for giving them.

`train configs/x.py --key=value`: settings files and flags in any order, the later one wins. A settings file is plain
Python that assigns keys, nanoGPT's own files included. Nothing here imports torch or Ray, so `--help` is quick.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import math
import os
import re
import traceback
import typing
from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

from orchestrator.errors import ConfigError, nearest
from orchestrator.storage.paths import at_home, with_paths

GPT2_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run; names, defaults and meanings of the first blocks are nanoGPT's."""

    # I/O
    out_dir: str = "out"  # the run's folder: a path or any fsspec URL (s3://bucket/run); what it holds is continued
    eval_interval: int = 2000  # iterations between evaluations
    log_interval: int = 1  # iterations between log lines
    eval_iters: int = 200  # batches per split in an evaluation
    eval_only: bool = False  # evaluate once, print losses, perplexity and bits per byte, and exit
    always_save_checkpoint: bool = True  # False: `sample` and `export` take the best state instead of the newest
    init_from: str = "scratch"  # scratch, resume, gpt2[-medium, -large, -xl], a ckpt.pt, a Hugging Face folder, a run
    # wandb logging
    wandb_log: bool = False  # log to Weights & Biases (pip install 'nanogpt-orchestrator[wandb]')
    wandb_project: str = "owt"  # project in Weights & Biases
    wandb_run_name: str = "gpt2"  # name of the run there
    # data
    dataset: str = "openwebtext"  # folder under data_dir, made by `prepare` or by nanoGPT's own prepare.py
    gradient_accumulation_steps: int = 5 * 8  # micro-steps per iteration over all workers together
    batch_size: int = 12  # sequences per micro-step on one worker
    block_size: int = 1024  # tokens per sequence
    # model
    n_layer: int = 12  # transformer blocks
    n_head: int = 12  # attention heads per block
    n_embd: int = 768  # width: values per token, a multiple of n_head
    dropout: float = 0.0  # probability, 0 up to 1; for pretraining 0 is good, for finetuning try 0.1+
    bias: bool = False  # biases in Linear and LayerNorm layers
    # adamw optimizer
    learning_rate: float = 6e-4  # the highest learning rate
    max_iters: int = 600000  # iterations in all
    weight_decay: float = 1e-1  # of matrices and embeddings
    beta1: float = 0.9  # AdamW's first moment decay
    beta2: float = 0.95  # AdamW's second moment decay
    grad_clip: float = 1.0  # highest norm of the gradient, 0.0 = no limit
    # learning rate decay settings
    decay_lr: bool = True  # False: a constant learning rate
    warmup_iters: int = 2000  # iterations of linear warm-up
    lr_decay_iters: int = 600000  # iteration at which min_lr is reached, about max_iters
    min_lr: float = 6e-5  # the lowest learning rate, about learning_rate / 10
    # DDP settings
    backend: Literal["nccl", "gloo"] = "nccl"  # between GPUs; without a GPU always gloo
    # system
    device: str = "cuda"  # cuda or cpu; where this machine has no such device: cpu
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: bfloat16, float16 or, on a CPU, float32
    compile: bool = True  # torch.compile the model; without a compiler it runs uncompiled
    # memory of a training step (ours from here on)
    activation_checkpointing: bool = False  # keep only what goes into each block, compute it again: a third more time
    loss_chunk: int = 0  # tokens whose logits exist at the same time, such as 1024; 0 = all of a micro-step
    # the cluster
    num_workers: int | str = 1  # DDP workers, one per GPU; 2-8: as many as there is room for, fewer when machines go
    cpus_per_worker: float = 1.0  # CPUs reserved for each worker, and its number of threads
    gpus_per_worker: float | None = None  # GPUs reserved for each worker; None: 1 where the cluster has or can get any
    max_failures: int = 8  # failures of one cause, without a checkpoint's progress in between; -1 = no limit
    max_preemptions: int = -1  # the same for machines that were taken away with notice
    hang_timeout_s: float = 600.0  # seconds without progress (or 20 median steps, if longer) after which it restarts
    max_bad_steps: int = 10  # bad steps in a row (they are skipped) after which it goes back a checkpoint; 0 = never
    loss_spike_z: float = 0.0  # robust z-score from which a loss makes a bad step, 0 = only NaN and infinity do
    replica_check_interval: int = 0  # iterations between comparisons of all workers' weights, 0 = never
    resubmit: bool = False  # start the driver again when it or the cluster is lost, but not after an error of yours
    warm_spares: bool = True  # keep idle processes ready on every node, for quick restarts (0.4 GB each)
    # the order of the data
    seed: int = 1337  # of the initial weights, the batches and dropout
    data_dir: str = "data"  # where datasets lie, on every node
    sampling: Literal["random", "epoch"] = "random"  # epoch: every block once per epoch; random: with replacement
    deterministic: bool = True  # same bits after a restart; False: nondeterministic GPU kernels, which may be faster
    # what a new run takes of init_from
    init_checkpoint: str = "auto"  # of a run: latest, best, a name; auto: the latest, or as always_save_checkpoint says
    init_weights_only: bool = False  # the weights alone: it begins at iteration 0, with new moments and no best loss
    # keeping and telling
    checkpoint_interval: int = 0  # iterations between checkpoints in out_dir, 0 = eval_interval
    snapshot_interval: int = 0  # iterations between states in node memory, 0 = as many as cost under 1% of the time
    memory_dir: str = "/dev/shm"  # memory file system in which every node keeps the newest states, "" = none
    keep_checkpoints: int = 2  # newest checkpoints kept; the best one stays besides
    storage_options: str = ""  # fsspec's options of out_dir: a JSON object; with secrets a .json file, on every node
    tensorboard_log: bool = False  # write TensorBoard files to out_dir/tensorboard

    @property
    def iters_per_checkpoint(self) -> int:
        return self.checkpoint_interval or self.eval_interval

    @property
    def min_workers(self) -> int:
        return int(str(self.num_workers).split("-")[0])

    @property
    def max_workers(self) -> int:
        return int(str(self.num_workers).split("-")[-1])

    @property
    def is_elastic(self) -> bool:
        return self.min_workers < self.max_workers


def _is_count(x: int | str) -> bool:
    found = re.fullmatch(r"([0-9]{1,6})(?:-([0-9]{1,6}))?", str(x))
    return found is not None and 1 <= int(found[1]) <= int(found[2] or found[1])


_AT_LEAST_0 = ("0 or more", lambda x: 0 <= x < math.inf)
_AT_LEAST_1 = ("1 or more", lambda x: x >= 1)
_FRACTION = ("from 0 up to, not including, 1", lambda x: 0 <= x < 1)
_POSITIVE = ("more than 0", lambda x: 0 < x < math.inf)
_BOUNDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(("eval_interval", "log_interval", "eval_iters", "gradient_accumulation_steps"), _AT_LEAST_1),
    **dict.fromkeys(("batch_size", "block_size", "n_layer", "n_head", "n_embd"), _AT_LEAST_1),
    "keep_checkpoints": _AT_LEAST_1,
    **dict.fromkeys(("max_iters", "warmup_iters", "lr_decay_iters", "min_lr", "weight_decay"), _AT_LEAST_0),
    **dict.fromkeys(("grad_clip", "gpus_per_worker"), _AT_LEAST_0),
    "seed": ("from 0 to 2**64 - 1", lambda x: 0 <= x < 2**64),
    **dict.fromkeys(("checkpoint_interval", "snapshot_interval", "loss_chunk"), _AT_LEAST_0),
    **dict.fromkeys(("max_bad_steps", "loss_spike_z", "replica_check_interval"), _AT_LEAST_0),
    **dict.fromkeys(("dropout", "beta1", "beta2"), _FRACTION),
    **dict.fromkeys(("learning_rate", "cpus_per_worker", "hang_timeout_s"), _POSITIVE),
    **dict.fromkeys(("max_failures", "max_preemptions"), ("-1 (no limit) or more", lambda x: x >= -1)),
    "num_workers": ("1 or more, or a range such as 2-8", _is_count),
    "out_dir": ("a path or URL with a last part to name the run", lambda x: bool(x.split("://")[-1].strip("/. "))),
    "dataset": ("the name of a folder under data_dir", lambda x: bool(x.strip("/. "))),
    "device": ("cpu, cuda or cuda:<index>", lambda x: bool(re.fullmatch(r"cpu|(cuda|mps|xpu)(:\d+)?", x))),
}


def check(config: TrainConfig) -> TrainConfig:
    """Return the config if every value is in range and none contradicts another.

    Raises:
        ConfigError: naming the key, the value and what would be right.
    """
    for key in _BOUNDS:
        _check_range(key, getattr(config, key))
    for problem in _contradictions(config):
        raise ConfigError(problem)
    return config


def _check_range(key: str, value: Any, where: str = "") -> None:
    rule, holds = _BOUNDS[key]
    if value is not None and not holds(value):
        raise ConfigError(f"{where}{key}={value!r} is out of range: {rule}")


def _contradictions(config: TrainConfig) -> Iterator[str]:
    for key in ("out_dir", "init_from"):
        if re.search(r"://[^/]*:[^/]*@", getattr(config, key)):  # it would lie in run.json and in logs
            yield f"{key} holds a password: leave it out of the URL, storage takes it from the environment or a profile"
    if config.n_embd % config.n_head:
        yield f"n_embd={config.n_embd} is not divisible by n_head={config.n_head}: every head needs the same width"
    if config.max_workers > config.gradient_accumulation_steps:
        yield (
            f"num_workers={config.num_workers} is more than gradient_accumulation_steps="
            f"{config.gradient_accumulation_steps}: each worker needs a micro-step of its own. "
            f"Give --gradient_accumulation_steps={config.max_workers} or more (it is the global batch over all workers)"
        )
    starts = ("scratch", "resume", *GPT2_NAMES)
    if not (config.init_from in starts or "://" in config.init_from or os.path.lexists(config.init_from)):
        yield (
            f"init_from={config.init_from!r} is neither {', '.join(starts)} nor an existing ckpt.pt, Hugging Face "
            f"folder or run{nearest(config.init_from, starts)}"
        )
    if config.init_weights_only and config.init_from == "scratch":
        yield "init_weights_only=True takes the weights of init_from, and init_from=scratch has none: give --init_from"
    if config.init_checkpoint != "auto" and config.init_from in ("scratch", "resume"):
        yield (
            f"init_checkpoint={config.init_checkpoint} chooses a checkpoint of another run: give --init_from=RUN too "
            "(a run that goes on, goes on from its newest)"
        )


C = TypeVar("C")
_VALUES = (bool, int, float, str, list, tuple, dict, type(None))  # what looks like a setting, unlike a module


def parse(kind: type[C], argv: Sequence[str], prog: str, description: str | None = None) -> C:
    """Read settings files and `--key=value` flags into a settings class, the later one winning.

    `--key` alone is `--key=True` for a setting that is on or off.
    description: what `--help` says before it lists the keys; else it is the docstring of the class.

    Raises:
        ConfigError: naming the settings file and line, the key, the value and the nearest valid key.
        SystemExit: 0 after `--help`; 2 after a wrong flag, which tyro has explained with the nearest one.
    """
    values: dict[str, Any] = {}
    for is_file, words in _runs(list(_completed(kind, argv))):
        if is_file:
            for word in words:
                values |= _read_file(kind, _settings_file(word), values)
        else:
            values = _parse_flags(kind, words, values, prog, description)
    return with_paths(kind(**values))


def _settings_file(word: str) -> Path:
    return Path(at_home("settings file", word) if word.startswith("~") else word)


def _completed(kind: Any, argv: Sequence[str]) -> Iterator[str]:
    """Yield argv's words, with True for each setting that is on or off and is given without a value."""
    switches = {name for name, its_type in typing.get_type_hints(kind).items() if its_type is bool}
    for word, following in zip_longest(argv, argv[1:]):
        is_switch = word.startswith("--") and word[2:].replace("-", "_") in switches
        yield f"{word}=True" if is_switch and following not in ("True", "False") else word


def _runs(argv: Sequence[str]) -> Iterator[tuple[bool, list[str]]]:
    """Cut argv into runs of settings files and runs of flags, in order; a word after `--key` is that key's value."""
    runs: list[tuple[bool, list[str]]] = []
    awaits_value = False
    for word in argv:
        is_flag = word.startswith("-")
        is_file = not is_flag and not awaits_value
        awaits_value = is_flag and "=" not in word
        if not runs or runs[-1][0] is not is_file:
            runs.append((is_file, []))
        runs[-1][1].append(word)
    yield from runs


def _parse_flags(
    kind: type[C], flags: list[str], values: dict[str, Any], prog: str, description: str | None
) -> dict[str, Any]:
    import tyro

    options = (tyro.conf.FlagConversionOff,)  # --key=False, as in nanoGPT, instead of --no-key
    parsed = tyro.cli(
        kind,
        args=flags,
        prog=prog,
        description=description,
        default=kind(**values),
        use_underscores=True,
        config=options,
    )
    return {f.name: getattr(parsed, f.name) for f in dataclasses.fields(cast(Any, kind))}


def _read_file(kind: Any, path: Path, values: dict[str, Any]) -> dict[str, Any]:
    """Run a settings file and return the keys that it sets; it sees the values that stand so far, as in nanoGPT."""
    types = typing.get_type_hints(kind)
    scope = {f.name: f.default for f in dataclasses.fields(kind)} | values
    before = dict(scope)
    source = _run_file(path, scope)
    passing = _passing_names(source)
    settings = {}
    for key, value in scope.items():
        where = f"{path}, line {_line_of(key, source)}: "
        if key not in types and not key.startswith("_") and isinstance(value, _VALUES) and key not in passing:
            hint = nearest(key, types)
            raise ConfigError(
                f"{where}{key}={_shown(value)}: no such setting{hint} (a variable of your own starts with _)"
            )
        if key in types and value is not before[key]:
            settings[key] = _of_type(types[key], value, f"{where}{key}")
            if kind is TrainConfig and key in _BOUNDS:
                _check_range(key, settings[key], where)
    return settings


def _run_file(path: Path, scope: dict[str, Any]) -> str:
    """Run a settings file in a scope and return its text.

    Raises:
        ConfigError: it is not there, or its line such and such fails.
    """
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.py")], n=1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        word = str(path).partition("{")[0]  # storage_options may hold secrets
        hint = f"; did you mean --{word}?" if "=" in word else hint
        raise ConfigError(f"settings file {word} does not exist{hint}")
    try:
        source = path.read_text(encoding="utf-8")
        exec(compile(source, str(path), "exec"), scope)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}{_line_in(error, path)} cannot be read: {error}") from None
    except SyntaxError as error:
        raise ConfigError(f"{error.filename}, line {error.lineno}: {error.msg}") from None
    except (Exception, SystemExit) as error:
        raise ConfigError(f"{path}{_line_in(error, path)}: {type(error).__name__}: {error}") from None
    return source


def _shown(value: Any) -> str:
    """Return a wrong value for a message; of several in one the kind only: storage_options may be, with its secrets."""
    return f"<{type(value).__name__}>" if isinstance(value, dict | list | tuple) or "{" in str(value) else repr(value)


def _line_in(error: BaseException, path: Path) -> str:
    """Return the line of the settings file at which it failed, nothing where it did not get as far."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    return f", line {lines[-1]}" if lines else ""


def _passing_names(source: str) -> set[str]:
    """Return the names that a settings file binds without assigning to them: of a loop, a `with`, a walrus."""
    assigned: set[str] = set()
    bound: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Assign):
            targets = node.targets
        elif isinstance(node, (ast.AnnAssign, ast.AugAssign)):
            targets = [node.target]
        else:
            targets = []
        assigned |= {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            bound.add(node.id)
    return bound - assigned


def _line_of(key: str, source: str) -> int:
    """Return the line that assigns to a key last, 1 where none does so by name."""
    names = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name) and node.id == key]
    return max((node.lineno for node in names if isinstance(node.ctx, ast.Store)), default=1)


def _of_type(wanted: Any, value: Any, where: str) -> Any:
    """Return value in the setting's type: an int will do for a float, 6e5 for an int, True for neither."""
    options = typing.get_args(wanted) or (wanted,)
    if typing.get_origin(wanted) is Literal:
        if value in options:
            return value
        raise ConfigError(f"{where}={value!r} is none of {', '.join(options)}{nearest(str(value), options)}")
    for option in options:
        if type(value) is option:
            return value
        if type(value) in (int, float) and option in (int, float) and value == option(value):
            return option(value)
    names = " or ".join(option.__name__ for option in options)
    raise ConfigError(f"{where}={_shown(value)} should be of type {names}")
