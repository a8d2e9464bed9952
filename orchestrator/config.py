"""TrainConfig: every setting of a training run.

`train configs/x.py --key=value`: settings files and flags in any order, the later one wins. Nothing here imports torch
or Ray, so `--help` is quick.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

from orchestrator.errors import ConfigError, nearest
from orchestrator.settings.bounds import (
    AT_LEAST_0,
    Bound,
    FailureLimit,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Seed,
    bounds_of,
)
from orchestrator.settings.file import read_settings
from orchestrator.settings.flags import files_and_flags, read_flags
from orchestrator.storage.paths import with_paths

GPT2_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")


def _is_count(x: int | str) -> bool:
    found = re.fullmatch(r"([0-9]{1,6})(?:-([0-9]{1,6}))?", str(x))
    return found is not None and 1 <= int(found[1]) <= int(found[2] or found[1])


def _names_a_run(out_dir: str) -> bool:
    return bool(out_dir.split("://")[-1].strip("/. "))


RunFolderName = Annotated[str, Bound("a path or URL with a last part to name the run", holds=_names_a_run)]
FolderName = Annotated[str, Bound("the name of a folder under data_dir", holds=re.compile(r"[^/. ]").search)]
WorkerCount = Annotated[int | str, Bound("1 or more, or a range such as 2-8", holds=_is_count)]
GpuShare = Annotated[float | None, AT_LEAST_0]
LORA_TARGETS = ("c_attn", "c_proj", "c_fc", "attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj", "all-linear")
_are_targets = Bound(
    f"some of {', '.join(LORA_TARGETS)}, with commas between",
    holds=lambda words: all(word.strip() in LORA_TARGETS for word in words.split(",")),
)
LoRATargets = Annotated[str, _are_targets]
_DEVICE = re.compile(r"cpu|(cuda|mps|xpu)(:\d+)?")
Device = Annotated[str, Bound("cpu, cuda or cuda:<index>", holds=_DEVICE.fullmatch)]


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run; nanoGPT's keys have nanoGPT's names, defaults and meanings.

    `--help` is made of the comments: one on a line of its own titles a group, one behind a key explains it.
    """

    # run
    out_dir: RunFolderName = "out"  # the run's folder: a path or any fsspec URL (s3://bucket/run); its run is continued
    init_from: str = "scratch"  # scratch, resume, gpt2[-medium, -large, -xl], a ckpt.pt, a Hugging Face folder, a run
    init_checkpoint: str = "auto"  # of a run: latest, best, a name; auto: the latest, or as always_save_checkpoint says
    init_weights_only: bool = False  # take only init_from's weights: iteration 0, new moments and no best loss
    eval_only: bool = False  # evaluate once, print losses, perplexity and bits per byte, and exit
    seed: Seed = 1337  # of the initial weights, the batches and dropout
    deterministic: bool = True  # same bits after a restart; False: nondeterministic GPU kernels, which may be faster
    device: Device = "cuda"  # cuda or cpu; a machine without such a device trains on cpu
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: bfloat16, float16 or, on a CPU, float32
    compile: bool = True  # torch.compile the model; without a compiler it runs uncompiled
    # data
    dataset: FolderName = "openwebtext"  # folder under data_dir, made by `prepare` or by nanoGPT's own prepare.py
    data_dir: str = "data"  # folder of the datasets, on every node
    sampling: Literal["random", "epoch"] = "random"  # epoch: every block once per epoch; random: with replacement
    gradient_accumulation_steps: PositiveInt = 5 * 8  # micro-steps per iteration over all workers together
    batch_size: PositiveInt = 12  # sequences per micro-step on one worker
    block_size: PositiveInt = 1024  # tokens per sequence
    # model
    n_layer: PositiveInt = 12  # transformer blocks
    n_head: PositiveInt = 12  # attention heads per block
    n_embd: PositiveInt = 768  # width: values per token, a multiple of n_head
    dropout: Fraction = 0.0  # probability, 0 up to 1; for pretraining 0 is good, for finetuning try 0.1+
    bias: bool = False  # biases in Linear and LayerNorm layers
    activation_checkpointing: bool = False  # save memory: keep a block's input, compute the rest again; a third slower
    loss_chunk: NonNegativeInt = 0  # save memory: make the logits of this many tokens at a time; 0 = of a micro-step
    # LoRA
    lora_rank: NonNegativeInt = 0  # train two matrices of this rank beside frozen layers of init_from; 0 = all weights
    lora_alpha: PositiveFloat = 16.0  # an adapter's output counts lora_alpha / lora_rank times
    lora_dropout: Fraction = 0.0  # probability, 0 up to 1, of what goes into adapters
    lora_targets: LoRATargets = "c_attn"  # layers with adapters: c_attn, c_proj, c_fc, mlp.c_proj, ...; or all-linear
    lora_base_dtype: Literal["float32", "bfloat16"] = "float32"  # in which frozen matrices are held
    lora_base: str = ""  # where the frozen weights lie, if the run does not find them where it began with them
    # optimizer
    learning_rate: PositiveFloat = 6e-4  # the highest learning rate
    max_iters: NonNegativeInt = 600000  # iterations in all
    weight_decay: NonNegativeFloat = 1e-1  # of matrices and embeddings
    beta1: Fraction = 0.9  # AdamW's first moment decay
    beta2: Fraction = 0.95  # AdamW's second moment decay
    grad_clip: NonNegativeFloat = 1.0  # highest norm of the gradient, 0.0 = no limit
    decay_lr: bool = True  # False: a constant learning rate
    warmup_iters: NonNegativeInt = 2000  # iterations of linear warm-up
    lr_decay_iters: NonNegativeInt = 600000  # iteration at which min_lr is reached, about max_iters
    min_lr: NonNegativeFloat = 6e-5  # the lowest learning rate, about learning_rate / 10
    # cluster
    num_workers: WorkerCount = 1  # DDP workers, one per GPU; 2-8: as many as there is room for, fewer when machines go
    lanes: NonNegativeInt = 0  # in which gradients are summed: same bits on 1 to so many workers; 0 = we choose
    cpus_per_worker: PositiveFloat = 1.0  # CPUs reserved for each worker, and its number of threads
    gpus_per_worker: GpuShare = None  # GPUs reserved for each worker; None: 1 where the cluster has or can get any
    backend: Literal["nccl", "gloo"] = "nccl"  # between GPUs; without a GPU always gloo
    # recovery
    max_failures: FailureLimit = 8  # failures of one cause, without a checkpoint's progress in between; -1 = no limit
    max_preemptions: FailureLimit = -1  # the same for machines that were taken away with notice
    hang_timeout_s: PositiveFloat = 600.0  # seconds without progress (or 20 median steps, if longer) before a restart
    max_bad_steps: NonNegativeInt = 10  # bad steps in a row (we skip them) before it goes back a checkpoint; 0 = never
    loss_spike_z: NonNegativeFloat = 0.0  # robust z-score from which a loss makes a bad step; 0 = only NaN and infinity
    replica_check_interval: NonNegativeInt = 0  # iterations between comparisons of all workers' weights, 0 = never
    resubmit: bool = False  # start the driver again when it or the cluster is lost, but not after an error of yours
    warm_spares: bool = True  # keep idle processes ready on every node, for quick restarts (0.4 GB each)
    # checkpoints
    checkpoint_interval: NonNegativeInt = 0  # iterations between checkpoints in out_dir, 0 = eval_interval
    snapshot_interval: NonNegativeInt = 0  # iterations between states in node memory, 0 = so that they cost under 1%
    memory_dir: str = "/dev/shm"  # memory file system in which every node keeps the newest states, "" = none
    keep_checkpoints: PositiveInt = 2  # newest checkpoints kept; the best one stays besides
    always_save_checkpoint: bool = True  # False: `sample` and `export` take the best state instead of the newest
    storage_options: str = ""  # fsspec's options of out_dir: a JSON object; with secrets a .json file, on every node
    # logging
    log_interval: PositiveInt = 1  # iterations between log lines
    eval_interval: PositiveInt = 2000  # iterations between evaluations
    eval_iters: PositiveInt = 200  # batches per split in an evaluation
    wandb_log: bool = False  # log to Weights & Biases (pip install 'nanogpt-orchestrator[wandb]')
    wandb_project: str = "owt"  # project in Weights & Biases
    wandb_run_name: str = "gpt2"  # name of the run there
    tensorboard_log: bool = False  # write TensorBoard files to out_dir/tensorboard
    mlflow_log: bool = False  # log to MLflow, at MLFLOW_TRACKING_URI or in out_dir/mlflow.db
    mlflow_experiment: str = "owt"  # experiment in MLflow

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


def check(config: TrainConfig) -> TrainConfig:
    """Return the config if every value is in range and none contradicts another.

    Raises:
        ConfigError: naming the key, the value and what would be right.
    """
    for key, bound in bounds_of(TrainConfig).items():
        bound.check(key, getattr(config, key))
    for key in ("out_dir", "init_from"):
        if re.search(r"://[^/]*:[^/]*@", getattr(config, key)):  # it would lie in run.json and in logs
            raise ConfigError(
                f"{key} holds a password: leave it out of the URL, storage takes it from the environment or a profile"
            )
    if config.n_embd % config.n_head:
        raise ConfigError(
            f"n_embd={config.n_embd} is not divisible by n_head={config.n_head}: every head needs the same width"
        )
    if config.max_workers > config.gradient_accumulation_steps:
        raise ConfigError(
            f"num_workers={config.num_workers} is more than gradient_accumulation_steps="
            f"{config.gradient_accumulation_steps}: each worker needs a micro-step of its own. "
            f"Give --gradient_accumulation_steps={config.max_workers} or more (it is the global batch over all workers)"
        )
    if config.lanes:
        _check_lanes(config)
    starts = ("scratch", "resume", *GPT2_NAMES)
    is_there = config.init_from in starts or "://" in config.init_from or os.path.lexists(config.init_from)
    if not is_there and not config.lora_base:  # a run of adapters goes on without the place where it began
        remedy = ". Adapters go on where it has moved to: give --lora_base=PATH too" if config.lora_rank else ""
        raise ConfigError(
            f"init_from={config.init_from!r} is neither {', '.join(starts)} nor an existing ckpt.pt, Hugging Face "
            f"folder or run{nearest(config.init_from, starts)}{remedy}"
        )
    if config.lora_rank and config.init_from == "scratch":
        raise ConfigError(
            f"lora_rank={config.lora_rank} trains adapters of a model that is there, and init_from=scratch has none: "
            "give --init_from=gpt2-xl, a ckpt.pt, a Hugging Face folder or a run"
        )
    if config.init_weights_only and config.init_from == "scratch":
        raise ConfigError(
            "init_weights_only=True takes the weights of init_from, and init_from=scratch has none: give --init_from"
        )
    if config.init_checkpoint != "auto" and config.init_from in ("scratch", "resume"):
        raise ConfigError(
            f"init_checkpoint={config.init_checkpoint} chooses a checkpoint of another run: give --init_from=RUN too "
            "(a run that goes on, goes on from its newest)"
        )
    return config


def check_block_size(config: TrainConfig, model_args: dict[str, Any], where: str) -> None:
    """Check that the model with which a run begins has block_size positions; where: its name in messages.

    Raises:
        ConfigError: it has fewer.
    """
    positions = model_args["block_size"]
    if config.block_size > positions:
        raise ConfigError(
            f"block_size={config.block_size} is over the model's: {where} has {positions} positions. "
            f"Give --block_size={positions} or less"
        )


def check_rank(config: TrainConfig, model_args: dict[str, Any]) -> None:
    """Check the rank of new adapters: over the model's width, a product of larger matrices can do no more.

    Raises:
        ConfigError: it is.
    """
    width = model_args["n_embd"]
    if config.lora_rank > width:
        raise ConfigError(
            f"lora_rank={config.lora_rank} is over the model's width, n_embd={width}: give --lora_rank={width} or "
            "less; 8 to 64 is usual"
        )


def _check_lanes(config: TrainConfig) -> None:
    if not config.deterministic:
        raise ConfigError(
            f"lanes={config.lanes} fixes the order of summation, and deterministic=False does not: leave one out"
        )
    if config.lanes < config.max_workers:
        raise ConfigError(
            f"lanes={config.lanes} is less than num_workers={config.num_workers}: each worker needs a lane of its own. "
            f"Give --lanes={config.max_workers} or more, or none: then we choose"
        )
    if config.lanes > config.gradient_accumulation_steps:
        raise ConfigError(
            f"lanes={config.lanes} is more than gradient_accumulation_steps={config.gradient_accumulation_steps}: each "
            f"lane needs a micro-step of its own. Give --lanes={config.gradient_accumulation_steps} or fewer"
        )


C = TypeVar("C")


def parse(kind: type[C], argv: Sequence[str], prog: str, description: str | None = None) -> C:
    """Read settings files and `--key=value` flags into a settings class, the later one winning.

    `--key` alone is `--key=True` for a setting that is on or off.
    description: `--help` prints it before the keys, instead of the docstring of the class.

    Raises:
        ConfigError: naming the settings file and line, the key, the value and the nearest valid key.
        SystemExit: 0 after `--help`; 2 after a wrong flag, which tyro has explained with the nearest one.
    """
    values: dict[str, Any] = {}
    for is_file, words in files_and_flags(kind, argv):
        if is_file:
            for word in words:
                values |= read_settings(kind, word, values)
        else:
            values = vars(read_flags(kind, words, values, prog, description))
    return with_paths(kind(**values))
