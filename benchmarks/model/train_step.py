"""Time of one training step on CPU: our model, optimizer and batches against nanoGPT's plain loop.

Both sides do the same maths on the same batches from the same weights, and the losses have to agree to 1e-5 at every
step. They take turns in one process, so that other load on the machine meets both alike; medians are compared.

Measured with PyTorch 2.13 on two hyperthreads of one core of an AMD EPYC with AVX-512, shared with other work (a
step of the small size took 36 to 73 ms):

- There is hardly a speedup, far from the 1.15 that was hoped for: nine runs of the small size gave 1.00 to 1.05
  (paired 0.99 to 1.04), three of the larger one 1.00, 1.00 and, under heavy load, 0.84 (paired 1.02 to 1.04).
  Under load trust the paired figure.
- What is gained comes from the fused optimizer (2.1 to 3.7 times as fast) and from drawing a batch with one gather
  (twice as fast). Both together are but 4 to 8 % of nanoGPT's step. Forward came out 1 to 8 % slower than the
  baseline's in the small size though it calls the same kernels; seeding explains a part of it, the rest is open.
- Matrix products are 60 to 75 % of a step and run at about 100 GFLOP/s, no faster on two threads than on one, in every
  layout that a linear layer and its gradients use. Attention is 12 %, GELU 6 %. Both sides share these kernels.
- q, k and v by `split`, as nanoGPT does: backward takes 2 % less than with one permuted view of all three.
- No gain: the `math` attention kernel (8 % slower per step), tanh GELU (2.4 times as slow as the exact one), `foreach`
  gradient clipping (within noise; slower for the larger model), an allocator that keeps its pages (page faults
  fall from about 1,500 per step to none; no difference in time that the noise would not hide).
- `torch.compile` makes forward and backward 8 % faster, but nanoGPT has it too; here both sides run uncompiled.
- `torch.manual_seed` costs 0.1 to 0.25 ms per call, `torch.default_generator.manual_seed` 0.001 ms.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model import GPT, GPTConfig
from orchestrator.data.dataset import Dataset
from orchestrator.data.order import BatchOrder, offsets
from orchestrator.data.token_files import open_token_files

VOCAB_SIZE = 65  # tiny shakespeare's characters
LEARNING_RATE, BETAS, WEIGHT_DECAY, GRAD_CLIP = 1e-3, (0.9, 0.99), 0.1, 1.0
PHASES = ("batch", "forward", "backward", "clip", "optimizer")
LOSS_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Size:
    """Sizes of a model and of its batch."""

    n_layer: int
    n_head: int
    n_embd: int
    block_size: int
    batch_size: int


SIZES = {
    "shakespeare_cpu": Size(4, 4, 128, 64, 12),  # Source: nanoGPT's README, "I only have a macbook"
    "larger": Size(6, 6, 384, 128, 8),
}

# Does one step of the given iteration; returns the loss and the seconds at the end of each phase since the first.
Step = Callable[[int], tuple[float, list[float]]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare this benchmark's options."""
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES), help="default: all")
    parser.add_argument("--steps", type=int, default=60, help="measured steps of each side (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=5, help="steps before these (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="PyTorch's threads (default: as PyTorch chooses)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure every chosen size, print a table and return the figures; `speedup` is that of the first size."""
    if args.threads:
        torch.set_num_threads(args.threads)
    results = {}
    for name in args.sizes:
        results[name] = compare(SIZES[name], args.steps, args.warmup)
        print_table(name, results[name])
    return {
        "speedup": results[args.sizes[0]]["speedup"],
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "sizes": results,
    }


def compare(size: Size, n_steps: int, n_warmup: int) -> dict[str, Any]:
    """Return both sides' medians per phase in ms, the speedup, and the largest difference between losses."""
    with tempfile.TemporaryDirectory() as folder:
        data = write_dataset(Path(folder), size)
        torch.manual_seed(1337)
        config = GPTConfig(size.block_size, VOCAB_SIZE, size.n_layer, size.n_head, size.n_embd, bias=False)
        model = GPT(config)
        plain = PlainGPT(config)
        plain.load_state_dict(model.state_dict())
        sides = {"ours": our_loop(model, data), "nanogpt": plain_loop(plain, data, Path(folder))}

        seconds: dict[str, list[list[float]]] = {"ours": [], "nanogpt": []}
        worst = 0.0
        for iter_num in range(n_warmup + n_steps):
            losses = []
            # Who goes first alternates too: the second finds warmer caches.
            for side in sorted(sides, reverse=iter_num % 2 == 0):
                loss, marks = sides[side](iter_num)
                losses.append(loss)
                if iter_num >= n_warmup:
                    seconds[side].append(marks)
            worst = max(worst, abs(losses[0] - losses[1]))
            if not worst <= LOSS_TOLERANCE:
                raise RuntimeError(
                    f"losses differ by {worst} at step {iter_num}: the two sides do not do the same maths"
                )
    ms = {side: medians_ms(marks) for side, marks in seconds.items()}
    pairs = zip(seconds["nanogpt"], seconds["ours"], strict=True)
    return {
        "size": asdict(size),
        "ms": ms,
        "speedup": ms["nanogpt"]["step"] / ms["ours"]["step"],
        "median_of_paired_speedups": median(plain_marks[-1] / our_marks[-1] for plain_marks, our_marks in pairs),
        "largest_loss_difference": worst,
        "steps": n_steps,
    }


def medians_ms(steps: list[list[float]]) -> dict[str, float]:
    """Return the median of each phase and of the whole step, in ms, from the marks of all steps."""
    phases = np.diff(np.array(steps), axis=1, prepend=0.0)  # (steps, phases)
    result = {phase: float(np.median(phases[:, i]) * 1e3) for i, phase in enumerate(PHASES)}
    return result | {"step": median(marks[-1] for marks in steps) * 1e3}


def print_table(name: str, result: dict[str, Any]) -> None:
    """Print both sides' times side by side."""
    ours, nanogpt = result["ms"]["ours"], result["ms"]["nanogpt"]
    print(f"\n{name}: {result['size']}\n{'ms':>10} {'nanoGPT':>9} {'ours':>9} {'ratio':>7}")
    for phase in (*PHASES, "step"):
        print(f"{phase:>10} {nanogpt[phase]:9.3f} {ours[phase]:9.3f} {nanogpt[phase] / ours[phase]:7.2f}")
    print(f"median of paired ratios {result['median_of_paired_speedups']:.3f}", end=", ")
    print(f"largest difference between losses {result['largest_loss_difference']:.1e}")


def write_dataset(folder: Path, size: Size) -> Dataset:
    """Write a million tokens that are about as unevenly distributed as letters, and open them."""
    frequency = 1 / np.arange(1, VOCAB_SIZE + 1)
    rng = np.random.default_rng(0)
    tokens = rng.choice(VOCAB_SIZE, 1_000_000, p=frequency / frequency.sum()).astype(np.uint16)
    (folder / "tokens").mkdir()
    for split in ("train", "val"):
        tokens.tofile(folder / "tokens" / f"{split}.bin")
    return Dataset(open_token_files(folder, "tokens"), BatchOrder(1337, size.batch_size, size.block_size, 1))


def our_loop(model: GPT, data: Dataset) -> Step:
    """Return one step as `orchestrator/loop.py` does it for one micro-step."""
    optimizer = model.configure_optimizers(WEIGHT_DECAY, LEARNING_RATE, BETAS, "cpu")

    def step(iter_num: int) -> tuple[float, list[float]]:
        marks = [time.perf_counter()]
        X, Y = data.batch("train", iter_num, 0)
        marks.append(time.perf_counter())
        torch.manual_seed(iter_num)  # the loop seeds dropout before every forward
        _, loss = model(X, Y)
        marks.append(time.perf_counter())
        loss.backward()
        marks.append(time.perf_counter())
        torch.nn.utils.clip_grad_norm_(model.parameters(), GRAD_CLIP)
        marks.append(time.perf_counter())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss_value = loss.item()
        marks.append(time.perf_counter())
        return loss_value, [mark - marks[0] for mark in marks[1:]]

    return step


def plain_loop(model: PlainGPT, data: Dataset, folder: Path) -> Step:
    """Return one step as nanoGPT's train.py does it on a CPU."""
    params = list(model.parameters())
    groups = [
        {"params": [p for p in params if p.dim() >= 2], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS)  # nanoGPT's fused AdamW is for CUDA alone
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    B, T = data.sampling.batch_size, data.sampling.block_size

    def step(iter_num: int) -> tuple[float, list[float]]:
        starts = start_offsets(data, iter_num)  # not timed: so that both sides see the same batch
        marks = [time.perf_counter()]
        tokens = np.memmap(folder / "tokens" / "train.bin", dtype=np.uint16, mode="r")  # opened for every batch
        torch.randint(len(tokens) - T, (B,))  # its own offsets, timed but not used
        X = torch.stack([torch.from_numpy(tokens[i : i + T].astype(np.int64)) for i in starts])
        Y = torch.stack([torch.from_numpy(tokens[i + 1 : i + 1 + T].astype(np.int64)) for i in starts])
        marks.append(time.perf_counter())
        _, loss = model(X, Y)
        marks.append(time.perf_counter())
        scaler.scale(loss).backward()
        marks.append(time.perf_counter())
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), GRAD_CLIP)
        marks.append(time.perf_counter())
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        loss_value = loss.item()
        marks.append(time.perf_counter())
        return float(loss_value), [mark - marks[0] for mark in marks[1:]]

    return step


def start_offsets(data: Dataset, iter_num: int) -> list[int]:
    """Return where the sequences of our batch start."""
    return [int(i) for i in offsets(data.sampling, len(data.files.splits["train"]), "train", iter_num, 0)]


class PlainNorm(nn.Module):
    """LayerNorm with a weight alone, written out as in nanoGPT."""

    def __init__(self, n_embd: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n_embd))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        return F.layer_norm(x, self.weight.shape, self.weight, None, 1e-5)


class PlainBlock(nn.Module):
    """One block in nanoGPT's operations: three strided views of one product, SDPA, a contiguous copy, exact GELU."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        C = config.n_embd
        self.ln_1, self.ln_2 = PlainNorm(C), PlainNorm(C)
        self.attn = nn.ModuleDict({"c_attn": nn.Linear(C, 3 * C, bias=False), "c_proj": nn.Linear(C, C, bias=False)})
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(C, 4 * C, bias=False), "c_proj": nn.Linear(4 * C, C, bias=False)})
        self.n_head, self.dropout = config.n_head, nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, T, C) for (B, T, C)."""
        B, T, C = x.shape
        qkv = self.attn["c_attn"](self.ln_1(x)).split(C, dim=2)  # 3 times (B, T, C)
        q, k, v = (part.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for part in qkv)  # (B, nh, T, hs)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=True)
        x = x + self.dropout(self.attn["c_proj"](y.transpose(1, 2).contiguous().view(B, T, C)))
        return x + self.dropout(self.mlp["c_proj"](F.gelu(self.mlp["c_fc"](self.ln_2(x)))))  # type: ignore[no-any-return]


class PlainGPT(nn.Module):
    """nanoGPT's forward for training, with its parameter names."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        C = config.n_embd
        parts = {"wte": nn.Embedding(config.vocab_size, C), "wpe": nn.Embedding(config.block_size, C)}
        blocks = nn.Sequential(*(PlainBlock(config) for _ in range(config.n_layer)))
        self.transformer = nn.ModuleDict(
            {**parts, "drop": nn.Dropout(config.dropout), "h": blocks, "ln_f": PlainNorm(C)}
        )
        self.lm_head = nn.Linear(C, config.vocab_size, bias=False)
        self.transformer["wte"].weight = self.lm_head.weight

    def forward(self, idx: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits (B, T, V) and the loss for (B, T) token ids and targets."""
        pos = torch.arange(0, idx.size(1), dtype=torch.long, device=idx.device)  # (T)
        x = self.transformer["drop"](self.transformer["wte"](idx) + self.transformer["wpe"](pos))  # (B, T, C)
        x = self.transformer["h"](x)
        logits = self.lm_head(self.transformer["ln_f"](x))  # (B, T, V)
        return logits, F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)
