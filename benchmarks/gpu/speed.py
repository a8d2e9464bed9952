"""What the acceptance times: a step of GPT-2 124M beside nanoGPT's own loop, and sampling beside nanoGPT's."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

import orchestrator.loop as loop
from benchmarks.gpu.child import LONG_S, Report, Setting
from benchmarks.gpu.runs import TINY_VOCAB_SIZE, settings, write_tokens
from benchmarks.gpu.watch import StopError, in_steps
from benchmarks.model.train_step import PlainGPT
from model import GPT, GPTConfig
from model.generation import SamplingPolicy, choose
from orchestrator.distributed.join import plain_world
from orchestrator.telemetry.records import Record, Step
from orchestrator.training.attempt import Callbacks

SIDES = ("nanogpt", "strict", "nondeterministic")
AT_MOST = {"nondeterministic": 1.02, "strict": 1.10}  # times nanoGPT's
_BLOCK, _BLOCKS = 5, 8  # iterations between two numbers that are asked for, and how many of these are measured
_COUNTED = 10  # iterations in which synchronisations are counted, after those
_124M = GPTConfig(1024, 50304, 12, 12, 768, bias=False)
_TINY = GPTConfig(32, TINY_VOCAB_SIZE, 1, 2, 32, bias=False)
_PEAK_FLOPS = {"A100": 312e12, "L40S": 362e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12}  # dense bfloat16


def step_time(setting: Setting, report: Report) -> None:
    """One GPU's share of nanoGPT's GPT-2 run, compiled, in bfloat16: its own loop and ours, each in a process."""
    if setting.is_on_gpu and torch.cuda.get_device_capability() < (8, 0):
        report.skip("this card has no bfloat16 of its own")
        return
    found = {}
    for side in SIDES:
        where = f"benchmarks.gpu.speed:{'plain_steps' if side == 'nanogpt' else 'our_steps'}"
        more = {} if side == "nanogpt" else {"changes": {"deterministic": side == "strict"}}
        part = setting.call(where, side, LONG_S, **more)
        if part.failed:
            raise RuntimeError(f"{side} has failed: {part.failed}\n{part.tail}")
        found[side] = part.figures
        report.figure(side, part.figures | {"seconds": part.seconds})
    for side, most in AT_MOST.items():
        over = found[side]["ms"] / found["nanogpt"]["ms"]
        report.figure(f"{side}_over_nanogpt", over)
        if setting.is_on_gpu and not setting.is_tiny:
            name = "deterministic=True" if side == "strict" else "deterministic=False"
            saw = f"{found[side]['ms']:.1f} ms, {over:.3f} times nanoGPT's {found['nanogpt']['ms']:.1f} ms"
            report.claim(f"a step with {name} takes at most {most} times nanoGPT's", over <= most, saw)
    if setting.is_on_gpu:
        most = max(found[side]["synchronisations_per_iteration"] for side in AT_MOST)
        report.claim("at most one synchronisation per iteration", most <= 1, f"{most}")


def plain_steps(setting: Setting, report: Report) -> None:
    """Time nanoGPT's loop: it fetches a batch while the forward pass runs, and reads the loss once per block."""
    config, batch_size, steps = _shape(setting)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    if not setting.is_on_gpu:
        torch.set_num_threads(1)  # as ours, with one CPU per worker
    torch.manual_seed(1337)
    write_tokens(setting.folder / "data", setting.is_tiny)
    model = PlainGPT(config).to(setting.device)
    net: Any = model if setting.is_tiny else torch.compile(model)
    groups = [
        {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=6e-4, betas=(0.9, 0.95), fused=setting.is_on_gpu)
    scaler = torch.amp.GradScaler(setting.device, enabled=False)
    clock = _Clock(report)
    X, Y = _plain_batch(setting, config.block_size, batch_size)
    for iter_num in range(_BLOCK * (_BLOCKS + 2)):
        for group in optimizer.param_groups:
            group["lr"] = 6e-4
        for _ in range(steps):
            with _bfloat16(setting):
                _, loss = net(X, Y)
                loss = loss / steps
            X, Y = _plain_batch(setting, config.block_size, batch_size)
            scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        if iter_num % _BLOCK == 0:
            loss.item()
            clock.block()
    _tell(setting, report, clock)


def _plain_batch(setting: Setting, block_size: int, batch_size: int) -> tuple[Tensor, Tensor]:
    """Return a batch as nanoGPT's get_batch draws it: the file is opened for each."""
    data = np.memmap(Path(setting.folder, "data", "tokens", "train.bin"), dtype=np.uint16, mode="r")
    ix = torch.randint(len(data) - block_size, (batch_size,))
    x = torch.stack([torch.from_numpy(data[i : i + block_size].astype(np.int64)) for i in ix])
    y = torch.stack([torch.from_numpy(data[i + 1 : i + 1 + block_size].astype(np.int64)) for i in ix])
    if not setting.is_on_gpu:
        return x, y
    return x.pin_memory().to(setting.device, non_blocking=True), y.pin_memory().to(setting.device, non_blocking=True)


def our_steps(setting: Setting, report: Report, changes: dict[str, Any]) -> None:
    """Time the loop, with states in node memory as often as it takes them; then count what waits for the device."""
    config, batch_size, steps = _shape(setting)
    more = {
        **{"n_layer": config.n_layer, "n_head": config.n_head, "n_embd": config.n_embd, "bias": False, "dropout": 0.0},
        **{"block_size": config.block_size, "batch_size": batch_size, "gradient_accumulation_steps": steps},
        **{"compile": not setting.is_tiny, "dtype": "bfloat16" if setting.is_on_gpu else "float32"},
        **{"log_interval": _BLOCK, "snapshot_interval": 0, "max_iters": 10**6, "lr_decay_iters": 10**6},
    }
    clock, synchronisations = _Clock(report), _Synchronisations()
    asked = iter(range(10**6))

    def take(record: Record) -> None:
        if isinstance(record, Step):
            clock.block()
            report.figure("told_mfu", record.mfu)
            if setting.is_on_gpu and record.iter == _BLOCK * (_BLOCKS + 1):
                synchronisations.begin()

    def stop_request() -> int:
        if next(asked) <= _BLOCK * (_BLOCKS + 1) + _COUNTED:
            return 0
        if setting.is_on_gpu:
            report.figure("synchronisations_per_iteration", synchronisations.end() / _COUNTED)
        raise StopError  # a checkpoint at the end would only take time

    resolved = settings(setting, setting.folder / "out" / "run", {**more, **changes})
    try:
        loop.train(resolved, plain_world(resolved), Callbacks(take, stop_request=in_steps(stop_request)))
    except StopError:
        _tell(setting, report, clock)


class _Clock:
    """Measures blocks of iterations that end with a number from the device."""

    def __init__(self, report: Report) -> None:
        self._report, self._marks_s = report, [time.perf_counter()]

    def block(self) -> None:
        """End a block; the first is the first iteration, which compiles."""
        self._marks_s.append(time.perf_counter())
        if len(self._marks_s) == 2:
            self._report.figure("first_step_s", self._marks_s[1] - self._marks_s[0])

    def ms(self) -> float:
        """Return the median time of an iteration, without the first blocks, in which things settle."""
        marks = self._marks_s[2 : 3 + _BLOCKS]
        return 1e3 * median(b - a for a, b in pairwise(marks)) / _BLOCK


class _Synchronisations:
    """Counts when a thread waits for the device, as PyTorch sees it."""

    def __init__(self) -> None:
        self._count = 0

    def begin(self) -> None:
        """Count from here on."""
        warnings.simplefilter("always")
        warnings.showwarning = self._note
        cuda: Any = torch.cuda
        cuda.set_sync_debug_mode("warn")

    def end(self) -> int:
        """Return the count."""
        cuda: Any = torch.cuda
        cuda.set_sync_debug_mode("default")
        return self._count

    def _note(self, message: Any, *_: Any, **__: Any) -> None:
        self._count += "called a synchronizing" in str(message)


def _shape(setting: Setting) -> tuple[GPTConfig, int, int]:
    """Return model, batch size and micro-steps of an iteration. Source: nanoGPT's config/train_gpt2.py, one GPU's."""
    return (_TINY, 2, 2) if setting.is_tiny else (_124M, 12, 5)


def _bfloat16(setting: Setting) -> AbstractContextManager[Any]:
    return torch.autocast(setting.device, torch.bfloat16) if setting.is_on_gpu else nullcontext()


def _tell(setting: Setting, report: Report, clock: _Clock) -> None:
    """Note what was measured. Source of the operations: PaLM, appendix B, https://arxiv.org/abs/2204.02311."""
    config, batch_size, steps = _shape(setting)
    tokens = batch_size * steps * config.block_size
    matrices = 12 * config.n_layer * config.n_embd**2 + config.vocab_size * config.n_embd
    flops = tokens * (6 * matrices + 12 * config.n_layer * config.n_embd * config.block_size)
    ms = clock.ms()
    report.figure("ms", ms)
    report.figure("tokens_per_s", 1e3 * tokens / ms)
    report.figure("tflops", flops / ms / 1e9)
    if setting.is_on_gpu:
        name = torch.cuda.get_device_name()
        peak = next((peak for card, peak in _PEAK_FLOPS.items() if card in name), None)
        report.figure("mfu", 1e3 * flops / ms / peak if peak else None)
        report.figure("peak_gb", torch.cuda.max_memory_allocated() / 1e9)


@torch.no_grad()
def sampling(setting: Setting, report: Report) -> None:
    """Tokens per second of 124M: one row, eight with a generator each, and nanoGPT's loop, which reads all again.

    For one row and a short text both are bound by the launches of kernels, of which ours has more: there is nothing to
    claim. Eight long texts are what remembering is for.
    """
    new, length = (8, 16) if setting.is_tiny else (100, 800)
    torch.manual_seed(0)
    model = GPT(_TINY if setting.is_tiny else _124M).to(setting.device).eval()
    long = torch.randint(model.config.vocab_size, (8, length), device=setting.device)
    short = long[:, :8]

    def ours(prompts: Tensor, is_own: bool = True) -> None:
        seeds = [torch.Generator(setting.device).manual_seed(i) for i in range(len(prompts))] if is_own else None
        for tokens in model.generate_stream(prompts, new, 0.8, 200, seeds):
            tokens[:, 0].tolist()

    def nanogpt(prompts: Tensor) -> None:
        idx = prompts
        for _ in range(new):
            logits = model(idx)[0][:, -1]
            idx = torch.cat((idx, choose(logits, SamplingPolicy(0.8, 200), None)), dim=1)
        idx.tolist()

    def rate(name: str, draw: Callable[[Tensor], None], prompts: Tensor) -> float:
        draw(prompts)  # the first time kernels are loaded
        began_s = time.perf_counter()
        draw(prompts)
        per_s = len(prompts) * new / (time.perf_counter() - began_s)
        report.figure(name, per_s)
        return per_s

    with _bfloat16(setting):
        one = rate("ours_1_tokens_s", ours, short[:1])
        eight = rate("ours_8_tokens_s", ours, short)
        rate("ours_8_one_generator_tokens_s", partial(ours, is_own=False), short)
        report.figure("over_nanogpt_1", one / rate("nanogpt_1_tokens_s", nanogpt, short[:1]))
        over = rate("ours_8_long_tokens_s", ours, long) / rate("nanogpt_8_long_tokens_s", nanogpt, long)
        report.figure("over_nanogpt_8_long", over)
    if setting.is_on_gpu and not setting.is_tiny:
        report.claim("eight rows are at least four times as fast as one", eight >= 4 * one, f"{eight / one:.2f} times")
        report.claim("eight long texts go on faster than by nanoGPT's loop", over > 1, f"{over:.2f} times as fast")
