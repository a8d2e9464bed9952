"""Print text from a model as it is drawn: nanoGPT's sample.py, for a run, a ckpt.pt, Hugging Face folders and GPT-2.

Knows no Ray and nothing of training.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TextIO

import torch
from torch import Tensor

from model import GPT, GPTConfig, PretrainedError
from model.sampling import skip_draws
from orchestrator.checkpoint.nanogpt import HEAD, read_nanogpt
from orchestrator.checkpoint.snapshot import Snapshot
from orchestrator.checkpoint.store import Checkpoint, CheckpointStore
from orchestrator.checkpoint.stream import first_whole, outline, stream
from orchestrator.checkpoint.transfer import exists
from orchestrator.config import GPT2_NAMES, nearest
from orchestrator.data.tokenizers import Tokenizer
from orchestrator.errors import CheckpointError, ConfigError, DataError
from orchestrator.prompt import encode_prompt, folder_tokenizer, tokenizer_of
from orchestrator.sample_text import Texts, print_text
from orchestrator.storage_options import storage_options_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SampleConfig:
    """Which model to sample from, and how; the first block is nanoGPT's."""

    init_from: str = "resume"  # resume: the run in out_dir; or gpt2, gpt2-xl, ..., a ckpt.pt, a Hugging Face folder
    out_dir: str = "out"  # the run's folder, a path or URL; nanoGPT's, with a ckpt.pt, as well
    start: str = "\n"  # the prompt, or FILE:prompt.txt
    num_samples: int = 10  # samples to draw
    max_new_tokens: int = 500  # tokens in each; quick up to the model's block_size, beyond it each reads all anew
    temperature: float = 0.8  # below 1 less random, above 1 more, 0 always the likeliest token
    top_k: int = 200  # draw from the k likeliest tokens only
    seed: int = 1337  # of the draws
    device: str = "cuda"  # cuda, cuda:1, cpu; where no GPU is: cpu
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = (
        "auto"  # auto: bfloat16 on a GPU that has it, float32 on CPU
    )
    compile: bool = False  # torch.compile the model: slower to begin, then faster

    top_p: float = 1.0  # draw from the fewest likeliest tokens that have this probability together; 1: from all
    batch_size: int = 8  # samples drawn at once; fewer take less memory, and each is the same however many there are
    stop_at_end: bool = True  # a sample ends where the model ends its text; False: it goes on, as nanoGPT's do
    checkpoint: str = "auto"  # of a run: best, latest, a name; auto: the best if it has always_save_checkpoint=False
    storage_options: str = ""  # fsspec's options of out_dir: a JSON object, or the path of a .json file that holds one
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
    if not 0 < config.top_p <= 1:
        raise ConfigError(f"top_p={config.top_p!r} is out of range: above 0, at most 1")
    try:
        torch.device(config.device)
    except RuntimeError:
        raise ConfigError(f"device={config.device!r} is no device; give cuda, cuda:<index> or cpu") from None
    if _is_missing(config.init_from):
        raise ConfigError(
            f"init_from={config.init_from!r} is neither resume, {', '.join(GPT2_NAMES)} nor an existing ckpt.pt or "
            f"Hugging Face folder{nearest(config.init_from, ('resume', *GPT2_NAMES))}"
        )
    return config


def sample(config: SampleConfig, out: TextIO | None = None) -> None:
    """Print num_samples samples to out (standard output), in order, each token's text as soon as it is drawn.

    Of those that are drawn together the first is shown as it grows, and what the others have when their turn comes.
    On a CPU, the same ckpt.pt and seed give the text that nanoGPT's sample.py gives. Ctrl-C ends it.

    Raises:
        ConfigError, CheckpointError, DataError: a setting, the model or the prompt is not usable.
    """
    check(config)
    device = _device(config)
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
    source = config.init_from
    if source != "resume" and not _is_nanogpt(source):
        try:
            model = GPT.from_pretrained(source)
        except PretrainedError as error:
            raise CheckpointError(f"init_from={source}: {error}") from error
        return model, folder_tokenizer(source, model.config.vocab_size)
    if source == "resume":
        model, snapshot = _load_run(config)
    else:
        snapshot = read_nanogpt(source, model_only=True, storage_options=storage_options_of(config, source))
        model = build(snapshot, snapshot.model.items())
    store = CheckpointStore(config.out_dir, storage_options_of(config)) if source == "resume" else None
    return model, tokenizer_of(snapshot.config, config.data_dir, store)


def _load_run(config: SampleConfig) -> tuple[GPT, Snapshot]:
    """Load a run's checkpoint; where it has none, nanoGPT's out_dir/ckpt.pt."""
    options = storage_options_of(config)
    store = CheckpointStore(config.out_dir, options)
    nanogpt_file = f"{config.out_dir.rstrip('/')}/ckpt.pt"
    if config.checkpoint == "auto" and next(store.newest_first(), None) is None and exists(nanogpt_file, options):
        logger.info("sampling from %s", nanogpt_file)
        snapshot = read_nanogpt(nanogpt_file, model_only=True, storage_options=options)
        return build(snapshot, snapshot.model.items()), snapshot

    def load_whole(checkpoint: Checkpoint) -> tuple[GPT, Snapshot]:
        found = outline(checkpoint, model_only=True)
        torch.manual_seed(config.seed)  # again, where a damaged checkpoint was tried before
        return build(found, stream(store, checkpoint, model_only=True)), found

    checkpoint, loaded = first_whole(store, config.checkpoint, load_whole)
    logger.info("sampling from %s in %s (iteration %d)", checkpoint.name, config.out_dir, checkpoint.iter_num)
    return loaded


def build(snapshot: Snapshot, tensors: Iterable[tuple[str, Tensor]]) -> GPT:
    """Return the model of a snapshot.

    tensors: the snapshot's model, by name and one at a time: no second model has to fit into memory.

    Raises:
        CheckpointError: its model_args are no GPT's, or its tensors are not theirs.
    """
    try:
        # Its weights are drawn before they are replaced, as in nanoGPT: after that, a seed draws the same text.
        model = GPT(GPTConfig(**{**snapshot.model_args, "dropout": 0.0}))
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
        remedy = (
            f"the model was trained on another dataset than data_dir={config.data_dir} tells; give the --data_dir that "
            f"has its meta"
            if config.init_from == "resume" or _is_nanogpt(config.init_from)
            else f"the tokenizer in {config.init_from} is another model's"
        )
        raise DataError(
            f"the model has vocab_size={vocab_size}, but the tokenizer {tokenizer.vocab_size} tokens: {remedy}"
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


def _is_nanogpt(source: str) -> bool:
    return source.endswith((".pt", ".pth")) or Path(source).is_file()


def _is_missing(source: str) -> bool:
    return not (source in ("resume", *GPT2_NAMES) or "://" in source or Path(source).exists())


def _device(config: SampleConfig) -> torch.device:
    device = torch.device(config.device)
    if device.type != "cuda" or torch.cuda.is_available():
        return device
    logger.info("no GPU here: device=cpu")
    return torch.device("cpu")


def _weight_dtype(config: SampleConfig, device: torch.device) -> torch.dtype:
    """Return the weights' type: float32 on a GPU, where each operation chooses its own, as in nanoGPT."""
    is_chosen = device.type == "cpu" and config.dtype != "auto"
    return getattr(torch, config.dtype) if is_chosen else torch.float32


def _autocast(config: SampleConfig, device: torch.device) -> AbstractContextManager[Any]:
    if device.type != "cuda":
        return nullcontext()
    best = "bfloat16" if torch.cuda.is_bf16_supported() else "float16"
    dtype = getattr(torch, best if config.dtype == "auto" else config.dtype)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    return torch.autocast(device_type="cuda", dtype=dtype)


def _can_compile(device: torch.device) -> bool:
    if device.type == "cuda" or any(shutil.which(name) for name in ("g++", "clang++")):
        return True
    logger.warning("compile=True, but no C++ compiler is here: the model runs uncompiled")
    return False
