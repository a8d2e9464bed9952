"""Time of sampling 500 tokens: our cached model against nanoGPT's loop without a cache and transformers' generate.

All sides continue the same prompt greedily with the same weights (random ones, GPT-2's size) in one process, and take
turns. Ratios: `vs_recompute` and `vs_transformers` are their seconds over ours for as many tokens, `batch_scaling` is
our tokens per second for 8 prompts at once over those for one. The tokens of ours and of the loop have to be equal.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor

from model import GPT, GPTConfig, huggingface_config, to_huggingface
from model.generation import Reader, SamplingPolicy, choose, is_clear

SIZES = {
    "124M": GPTConfig(1024, 50257, 12, 12, 768, activation="gelu_tanh"),
    "tiny": GPTConfig(64, 300, 2, 2, 32, activation="gelu_tanh"),
}
AT_LEAST = {"vs_recompute": 8.0, "vs_transformers": 1.3, "batch_scaling": 4.0}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare this benchmark's options."""
    parser.add_argument("--size", choices=SIZES, default="124M", help="default: %(default)s")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="default: %(default)s")
    parser.add_argument("--tokens", type=int, default=500, help="new tokens per prompt (default: %(default)s)")
    parser.add_argument("--prompt", type=int, default=8, help="tokens in a prompt (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="prompts at once (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="of all but the slow loop (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1337, help="of weights and prompts (default: %(default)s)")


@torch.no_grad()
def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure all sides, print them and return the figures."""
    room = SIZES[args.size].block_size - args.prompt
    if args.tokens > room:
        raise SystemExit(f"--tokens={args.tokens}: beyond {room} the text outgrows the context, where none has a cache")
    model = new_model(args)
    prompts = torch.randint(model.config.vocab_size, (args.batch, args.prompt))  # (B, T)
    one, n = prompts[:1], args.tokens
    rival = to_transformers(model)
    sides: dict[str, Callable[[], Tensor]] = {
        "ours": lambda: model.generate(one, n, temperature=0),
        "transformers": lambda: transformers_generate(rival, one, n),
        "ours_batch": lambda: model.generate(prompts, n, temperature=0),
    }
    for side in sides.values():  # the first pass also chooses kernels and fills caches
        side()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    tokens: dict[str, Tensor] = {}
    for _ in range(args.repeats):
        for name, side in sides.items():
            tokens[name], taken_s = timed(side)
            seconds[name].append(taken_s)
    tokens["recompute"], recompute_s = timed(lambda: recompute(model, one, n))
    if not torch.equal(tokens["ours"], tokens["recompute"]):
        raise RuntimeError("the cached model chose other tokens than the loop that recomputes: it is not exact")
    seconds["recompute"] = [recompute_s]
    result = summarise(seconds, n, args.batch)
    result["same_as_transformers"] = share_of_equal(tokens["ours"], tokens["transformers"], args.prompt)
    result["phases_ms"] = phases_ms(model, one, min(n, model.config.block_size - args.prompt))
    result |= {"size": args.size, "dtype": args.dtype, "new_tokens": n, "prompt_tokens": args.prompt}
    result |= {"threads": torch.get_num_threads(), "torch": torch.__version__}
    show(result)
    return result


def new_model(args: argparse.Namespace) -> GPT:
    """Return a model with random weights, the same for the same seed."""
    torch.manual_seed(args.seed)
    return GPT(SIZES[args.size]).to(getattr(torch, args.dtype)).eval()


def to_transformers(model: GPT) -> Any:
    """Return the same model as transformers' GPT2LMHeadModel."""
    from transformers import GPT2Config, GPT2LMHeadModel  # slow to import

    config = GPT2Config(**huggingface_config(model.config))
    rival = GPT2LMHeadModel(config).to(model.lm_head.weight.dtype).eval()
    missing, unexpected = rival.load_state_dict(to_huggingface(model.state_dict()), strict=False)
    if set(missing) - {"lm_head.weight"} or unexpected:  # the head's is the embedding
        raise RuntimeError(f"transformers has other tensors: missing {missing}, unexpected {unexpected}")
    return rival


def transformers_generate(rival: Any, idx: Tensor, n_tokens: int) -> Tensor:
    """Continue (B, T) token ids greedily with transformers' cache; return (B, T + n_tokens)."""
    everything = torch.ones_like(idx)
    lengths = {"max_new_tokens": n_tokens, "min_new_tokens": n_tokens}  # the end of a text does not end it early
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return rival.generate(  # type: ignore[no-any-return]
            idx,
            attention_mask=everything,
            do_sample=False,
            use_cache=True,
            pad_token_id=0,
            eos_token_id=None,
            **lengths,
        )


def recompute(model: GPT, idx: Tensor, n_tokens: int) -> Tensor:
    """Continue (B, T) token ids greedily as nanoGPT does: every token after a pass over the whole context."""
    for _ in range(n_tokens):
        logits, _ = model(idx[:, -model.config.block_size :])
        idx = torch.cat((idx, logits[:, -1].argmax(dim=-1, keepdim=True)), dim=1)
    return idx


def timed(work: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """Return a result and the seconds that it took."""
    start = time.perf_counter()
    result = work()
    return result, time.perf_counter() - start


def summarise(seconds: dict[str, list[float]], n_tokens: int, batch_size: int) -> dict[str, Any]:
    """Return the ratios, from medians, and what they were made of."""
    middle = {name: median(values) for name, values in seconds.items()}
    ratios = {
        "vs_recompute": middle["recompute"] / middle["ours"],
        "vs_transformers": middle["transformers"] / middle["ours"],
        "batch_scaling": batch_size * middle["ours"] / middle["ours_batch"],
    }
    return {**ratios, "ms_per_step": {name: value * 1e3 / n_tokens for name, value in middle.items()}, "s": seconds}


def share_of_equal(ours: Tensor, theirs: Tensor, n_prompt: int) -> float:
    """Return which share of the new tokens, counted up to the first that differs, both sides chose alike."""
    is_equal = (ours[0, n_prompt:] == theirs[0, n_prompt:]).int().cumprod(0)
    return float(is_equal.float().mean())


@torch.no_grad()
def phases_ms(model: GPT, idx: Tensor, n_tokens: int) -> dict[str, float]:
    """Return the median time of each part of a cached step, of whole passes, and how many of them rounding called for.

    The blocks' linear layers and the head are timed by themselves: they read all weights once.
    """
    reader, choice = Reader(model, idx.size(0), idx.size(1) + n_tokens), SamplingPolicy(temperature=0)
    marks: dict[str, list[float]] = {"step": [], "is_clear": [], "choose": [], "linear": [], "head": [], "reread": []}
    linears = [m for block in model.transformer.h for m in block.modules() if isinstance(m, torch.nn.Linear)]
    inputs = [torch.randn(idx.size(0), 1, m.in_features, dtype=m.weight.dtype) for m in linears]
    x = torch.randn(idx.size(0), 1, model.config.n_embd, dtype=model.lm_head.weight.dtype)

    def clock(name: str, work: Callable[[], Any]) -> Any:
        result, taken_s = timed(work)
        marks[name].append(taken_s * 1e3)
        return result

    logits = reader.read(idx)
    for step in range(n_tokens):
        idx = torch.cat((idx, clock("choose", lambda: choose(logits, choice, None))), dim=1)  # noqa: B023
        logits = clock("step", lambda: reader.read(idx))  # noqa: B023
        if not clock("is_clear", lambda: is_clear(logits)):  # noqa: B023
            logits = clock("reread", lambda: reader.reread(idx))  # noqa: B023
        if step % 10 == 0:
            clock("linear", lambda: [m(x) for m, x in zip(linears, inputs, strict=True)])
            clock("head", lambda: model.lm_head(x))
    return {name: median(values) for name, values in marks.items() if values} | {"n_rereads": len(marks["reread"])}


def show(result: dict[str, Any]) -> None:
    """Print the ratios beside their goals, and the times."""
    print(f"{result['size']} {result['dtype']}: {result['new_tokens']} tokens, {result['threads']} threads")
    for name, value in result["ms_per_step"].items():
        print(f"{name:>16} {value:9.2f} ms per step")
    for name, value in result["phases_ms"].items():
        print(f"{name:>16} {value:9.2f}" + (" ms, median of a cached step's parts" if name != "n_rereads" else ""))
    for name, least in AT_LEAST.items():
        print(f"{name:>16} {result[name]:9.2f} (goal: at least {least:g})", end=" ")
        print("reached" if result[name] >= least else "MISSED")
    print(f"transformers chose the same tokens up to {result['same_as_transformers']:.0%} of the way")
