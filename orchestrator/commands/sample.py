"""Print text from a model as it is drawn: nanoGPT's sample.py, for a run, a ckpt.pt, Hugging Face's folders and GPT-2.

Knows no Ray and nothing of training.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, TextIO

import torch
from torch import Tensor

from model import GPT, GPTConfig
from model.generation import NotFiniteError, skip_draws
from model.names import HEAD
from orchestrator.checkpoint.formats.sources import Kind, find_source, refuse_missing
from orchestrator.checkpoint.formats.weights import Weights, using
from orchestrator.checkpoint.snapshot import Snapshot
from orchestrator.commands.prompt import encode_prompt, folder_tokenizer, tokenizer_of
from orchestrator.commands.sample_text import Texts, print_text
from orchestrator.data.tokenizers import Tokenizer
from orchestrator.distributed.device import device_here
from orchestrator.distributed.numerics import compiler_fault
from orchestrator.errors import CheckpointError, ConfigError, DataError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SampleConfig:
    """Which model to sample from, and how; the first block is nanoGPT's."""

    init_from: str = (
        "resume"  # resume: what out_dir holds; or a run, a ckpt.pt, a Hugging Face folder, gpt2, gpt2-xl, ...
    )
    out_dir: str = "out"  # the run's folder, a path or URL; nanoGPT's, with a ckpt.pt, as well
    start: str = "\n"  # the prompt, or FILE:prompt.txt
    num_samples: int = 10  # samples to draw
    max_new_tokens: int = 500  # tokens in each; quick up to the model's block_size, beyond it each reads all anew
    temperature: float = 0.8  # below 1 less random, above 1 more, 0 always the likeliest token
    top_k: int = 200  # draw from the k likeliest tokens only
    seed: int = 1337  # of the draws
    device: str = "cuda"  # cuda, cuda:1, mps, cpu; where this machine has no such device: cpu
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = (
        "auto"  # auto: bfloat16 on a GPU that has it, float32 on CPU
    )
    compile: bool = False  # torch.compile the model: slower to begin, then faster

    top_p: float = 1.0  # draw from the fewest likeliest tokens that have this probability together; 1: from all
    batch_size: int = 8  # samples drawn at once; fewer take less memory, and each is the same however many there are
    stop_at_end: bool = True  # a sample ends where the model ends its text; False: it goes on, as nanoGPT's do
    checkpoint: str = "auto"  # of a run: best, latest, a name; auto: the best if it has always_save_checkpoint=False
    storage_options: str = ""  # fsspec's options of out_dir: a JSON object, or the path of a .json file that holds one
    lora_base: str = ""  # of a run of adapters: where the frozen weights lie, if not where it began with them
    data_dir: str = "data"  # where the dataset lies that tells the characters of a ckpt.pt


def check(config: SampleConfig) -> SampleConfig:
    """Return the config if every value is in range.

    Raises:
        ConfigError: naming the key, the value and what would be right.
    """
    leasts = {"temperature": 0, "top_k": 1, "num_samples": 1, "max_new_tokens": 1, "seed": 0, "batch_size": 1}
    for key, least in leasts.items():
        value = getattr(config, key)
        if not least <= value < float("inf"):
            raise ConfigError(f"{key}={value!r} is out of range: {least} or more")
    if config.seed >= 2**64:
        raise ConfigError(f"seed={config.seed} is out of range: from 0 to 2**64 - 1")
    if not 0 < config.top_p <= 1:
        raise ConfigError(f"top_p={config.top_p!r} is out of range: above 0, at most 1")
    refuse_missing(config)
    return config


def sample(config: SampleConfig, out: TextIO | None = None) -> None:
    """Print num_samples samples to out (standard output), in order, each token's text as soon as it is drawn.

    Of those that are drawn together the first is shown as it grows, and what the others have when their turn comes.
    On a CPU, the same ckpt.pt and seed give the text that nanoGPT's sample.py gives. Ctrl-C ends it.

    Raises:
        ConfigError, CheckpointError, DataError: a setting, the model or the prompt is not usable.
    """
    check(config)
    device = torch.device(device_here(config.device, ("cuda", "mps", "xpu")))
    torch.manual_seed(config.seed)
    torch.cuda.manual_seed(config.seed)
    model, tokenizer = load(config)
    ids = _encode(config, tokenizer, model.config.vocab_size)

    model.eval().to(device, _weight_dtype(config, device))
    if config.compile and _can_compile(device):
        model.compile()
    with _autocast(config, device):
        _print_samples(config, model, tokenizer, ids, device, out or sys.stdout)


def load(config: SampleConfig) -> tuple[GPT, Tokenizer]:
    """Return the model that the settings name, on the CPU, and its tokenizer.

    Raises:
        CheckpointError, DataError: the model or its tokenizer is missing or damaged.
    """
    source = find_source(config, config.checkpoint)
    is_pretrained = source.kind in (Kind.HUGGINGFACE, Kind.HUB)
    draws = source.kind in (Kind.RUN, Kind.NANOGPT)

    def build_whole(weights: Weights) -> tuple[GPT, Weights]:
        torch.manual_seed(config.seed)  # again, where a damaged checkpoint was tried before
        return build(weights.snapshot, weights.tensors, draws=draws), weights

    model, weights = using(source, build_whole)
    logger.info(
        "sampling from %s", weights.name if source.kind is not Kind.RUN else f"{weights.name} in {source.where}"
    )
    if is_pretrained:
        fs = source.folder.fs if source.folder else None
        return model, folder_tokenizer(source.where, model.config.vocab_size, fs)
    folder = source.folder if source.kind is Kind.RUN else None
    return model, tokenizer_of(weights.snapshot.config, config.data_dir, folder)


def build(snapshot: Snapshot, tensors: Iterable[tuple[str, Tensor]], *, draws: bool = True) -> GPT:
    """Return the model of a snapshot.

    tensors: the snapshot's model, by name and one at a time: no second model has to fit into memory.
    draws: its weights are drawn before they are replaced, as in nanoGPT: after that, a seed draws the same text.

    Raises:
        CheckpointError: its model_args are no GPT's, or its tensors are not theirs.
    """
    try:
        args = GPTConfig(**{**snapshot.model_args, "dropout": 0.0})
        model = GPT(args) if draws else GPT.empty(args)
        odd = (model.state_dict().keys() - {HEAD}) ^ (snapshot.model.keys() - {HEAD})
        if odd:
            raise ValueError(f"tensors missing or unexpected: {', '.join(sorted(odd))}")
        for name, tensor in tensors:
            model.load_state_dict({name: tensor}, strict=False)
    except (TypeError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"the checkpoint holds no GPT: {type(error).__name__}: {error}") from error
    return model


def _encode(config: SampleConfig, tokenizer: Tokenizer, vocab_size: int) -> list[int]:
    """Return the prompt's token ids; for nanoGPT's default prompt, where it is not known, those of another one."""
    if tokenizer.vocab_size > vocab_size:
        raise DataError(
            f"the model has vocab_size={vocab_size}, but the tokenizer {tokenizer.vocab_size} tokens: the model was "
            f"trained on another dataset than data_dir={config.data_dir} tells; give the --data_dir that has its meta"
        )
    return encode_prompt(config.start, tokenizer, is_default=config.start == SampleConfig.start)


def _print_samples(
    config: SampleConfig, model: GPT, tokenizer: Tokenizer, ids: Sequence[int], device: torch.device, out: TextIO
) -> None:
    x = torch.tensor([ids], dtype=torch.long, device=device)  # (1, T)
    end = tokenizer.end_of_text if config.stop_at_end else None
    draw = (config.max_new_tokens, config.temperature, config.top_k)
    generators = _generators(config, model.config.vocab_size, device)
    try:
        for first in range(0, config.num_samples, config.batch_size):
            own = list(islice(generators, min(config.batch_size, config.num_samples - first)))
            texts = Texts(tokenizer, ids, len(own), end, out)
            for tokens in model.generate_stream(x.expand(len(own), -1), *draw, own, top_p=config.top_p, end=end):
                texts.push(tokens[:, 0].tolist())
            texts.finish()
    except NotFiniteError as error:
        raise CheckpointError(
            f"nothing can be drawn: {error}; the weights are damaged or too large for dtype={config.dtype}: try "
            "--dtype=float32, or another checkpoint"
        ) from None
    except KeyboardInterrupt:
        print_text(out, "\n")
    except BrokenPipeError:  # `... | head` has seen enough; Python would complain again when it closes the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())


def _generators(config: SampleConfig, vocab_size: int, device: torch.device) -> Iterator[torch.Generator]:
    """Yield the source of randomness of each sample, as if those before it had drawn all their tokens from one.

    That is how nanoGPT's samples follow each other, one by one; here each can be drawn beside others, or end early.
    """
    shared = torch.Generator(device)
    if device.type == "cpu":
        shared.set_state(torch.get_rng_state())  # where the model's weights, drawn on the CPU, have left it
    else:
        shared.manual_seed(config.seed)
    while True:
        own = torch.Generator(device)
        own.set_state(shared.get_state())
        yield own
        if config.temperature > 0:
            skip_draws(shared, config.max_new_tokens, vocab_size)


def _weight_dtype(config: SampleConfig, device: torch.device) -> torch.dtype:
    """Return the weights' type: float32 on a GPU, where each operation chooses its own, as in nanoGPT."""
    is_chosen = device.type == "cpu" and config.dtype != "auto"
    return getattr(torch, config.dtype) if is_chosen else torch.float32


def _autocast(config: SampleConfig, device: torch.device) -> AbstractContextManager[Any]:
    if device.type != "cuda":
        return nullcontext()
    best = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    dtype = getattr(torch, best if config.dtype == "auto" else config.dtype)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    return torch.autocast(device_type="cuda", dtype=dtype)


def _can_compile(device: torch.device) -> bool:
    fault = compiler_fault(device)
    if fault:
        logger.warning("compile=True, but the compiler does not work (%s): the model runs uncompiled", fault)
    return fault is None
