"""Stateless sampling: which block starts where, as a pure function of the seed and the position in the run.

Nothing is remembered between calls: where the epochs of a run were when its settings changed is one of the settings.
Nothing here knows the world size: every rank computes the offsets of any micro-step by itself. It must not know files,
tokens or torch. A change of these numbers changes what a resumed run sees, so the tests freeze them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Split = Literal["train", "val"]
Stream = Literal["train", "eval"]

_SPLITS: dict[str, int] = {"train": 0, "val": 1}
_STREAMS: dict[str, int] = {"train": 0, "eval": 1, "epoch": 2}
_UINT64_MASK = (1 << 64) - 1
_FEISTEL_ROUNDS = 8
_NUMBERS = ("seed", "batch_size", "block_size", "gradient_accumulation_steps")


@dataclass(frozen=True)
class BatchOrder:
    """How blocks are drawn; the defaults are nanoGPT's.

    batch_size: sequences in one micro-step.
    block_size: tokens in one sequence.
    gradient_accumulation_steps: micro-steps of one iteration, over all ranks.
    mode: "random" draws with replacement, as nanoGPT; "epoch" visits every block exactly once per epoch.
    began: (iteration, sequence): from that iteration on, sequences of the epochs are numbered from that one.
    """

    seed: int = 1337
    batch_size: int = 12
    block_size: int = 1024
    gradient_accumulation_steps: int = 40
    mode: Literal["random", "epoch"] = "random"
    began: tuple[int, int] = (0, 0)


def offsets(
    sampling: BatchOrder, n_tokens: int, split: Split, iter_num: int, micro_step: int, stream: Stream = "train"
) -> NDArray[np.int64]:
    """Return the start offsets (B,) in tokens of one micro-step's sequences.

    Each start leaves room for block_size + 1 tokens, the last of which is only a target. Evaluation (`stream="eval"`)
    draws at random in either mode, so that the losses of both modes compare, and from a stream of its own.

    Raises:
        ValueError: the split is shorter than one sequence, or a step is negative.
    """
    if n_tokens <= sampling.block_size:
        raise ValueError(f"{n_tokens} tokens are fewer than block_size + 1 = {sampling.block_size + 1}")
    if iter_num < 0 or micro_step < 0:
        raise ValueError(f"iter_num={iter_num}, micro_step={micro_step}: neither may be negative")
    if stream == "train" and sampling.mode == "epoch":
        return _epoch_offsets(sampling, n_tokens, split, iter_num, micro_step)
    raw = _philox(sampling.seed, split, stream, iter_num, micro_step).random_raw(sampling.batch_size)
    # 64 random bits modulo the range: the bias, below range / 2**64, is far under what any run could observe.
    return (raw % np.uint64(n_tokens - sampling.block_size)).astype(np.int64)


def sequences_before(sampling: BatchOrder, iter_num: int) -> int:
    """Return how many sequences of the epochs come before an iteration's."""
    iteration, sequence = sampling.began if iter_num >= sampling.began[0] else (0, 0)
    return sequence + (iter_num - iteration) * sampling.gradient_accumulation_steps * sampling.batch_size


def going_on(sampling: BatchOrder, before: Mapping[str, Any], iter_num: int) -> tuple[BatchOrder, str]:
    """Return the sampling that goes on at an iteration where other settings have left off, and what is to be said.

    before: the settings that the state was made with, and `began` as "epoch_began" if it was another than (0, 0).
    In "epoch" mode no block is skipped or repeated, whatever becomes of batch_size and gradient_accumulation_steps.
    """
    if sampling.mode != "epoch" or before.get("sampling") != "epoch" or iter_num == 0:
        return sampling, ""
    was = replace(sampling, **{key: before[key] for key in _NUMBERS if type(before.get(key)) is int})
    was = replace(was, began=_began(before))
    changed = [
        f"{key}={getattr(sampling, key)} instead of {getattr(was, key)}"
        for key in ("seed", "block_size")
        if getattr(sampling, key) != getattr(was, key)
    ]
    warning = (
        f"sampling=epoch with {' and '.join(changed)}: this epoch goes on in another order, so that some of its tokens "
        f"come twice and some not at all"
    )
    if _per_iteration(sampling) == _per_iteration(was) and sampling.block_size == was.block_size:
        return replace(sampling, began=was.began), warning if changed else ""
    position = sequences_before(was, iter_num) * was.block_size // sampling.block_size
    return replace(sampling, began=(iter_num, position)), warning if changed else ""


def _began(before: Mapping[str, Any]) -> tuple[int, int]:
    match before.get("epoch_began"):
        case [int(iteration), int(sequence)]:
            return iteration, sequence
    return 0, 0


def _per_iteration(sampling: BatchOrder) -> int:
    return sampling.batch_size * sampling.gradient_accumulation_steps


def permute(index: NDArray[Any], size: int, seed: int, split: Split, epoch: NDArray[Any]) -> NDArray[np.uint64]:
    """Map index (B,) in [0, size) to its place (B,) in the pseudo-random order of its epoch (B,), in O(1) memory.

    For one epoch this is a bijection of [0, size): a Feistel network over a grid that just covers the range, walked
    again from every value that falls outside.

    Source: Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002 (generalized Feistel, cycle
        walking).
    """
    columns = math.isqrt(size - 1) + 1  # ceil(sqrt(size))
    rows = -(-size // columns)
    base_keys = _philox(seed, split, "epoch", 0, 0).random_raw(_FEISTEL_ROUNDS)
    keys = _mix(base_keys[:, None] + epoch.astype(np.uint64))  # (rounds, B): a row's epoch picks its permutation
    value = _feistel(index.astype(np.uint64), keys, columns, rows)
    while (outside := value >= np.uint64(size)).any():
        value[outside] = _feistel(value[outside], keys[:, outside], columns, rows)
    return value


def _epoch_offsets(
    sampling: BatchOrder, n_tokens: int, split: Split, iter_num: int, micro_step: int
) -> NDArray[np.int64]:
    n_blocks = (n_tokens - 1) // sampling.block_size
    first = sequences_before(sampling, iter_num) + micro_step * sampling.batch_size
    sequence = first + np.arange(sampling.batch_size)  # numbers every sequence of the run; may straddle epochs
    blocks = permute(sequence % n_blocks, n_blocks, sampling.seed, split, sequence // n_blocks)
    return blocks.astype(np.int64) * sampling.block_size


def _philox(seed: int, split: str, stream: str, iter_num: int, micro_step: int) -> np.random.Philox:
    """Return the counter-based generator of one micro-step.

    Only its raw output is used: numpy keeps that stable across versions, unlike the methods of Generator. The lowest
    word of the counter numbers the blocks of four outputs, so no two micro-steps ever share one.
    """
    key = np.array([seed & _UINT64_MASK, _SPLITS[split] + len(_SPLITS) * _STREAMS[stream]], dtype=np.uint64)
    return np.random.Philox(key=key, counter=np.array([0, micro_step, iter_num, 0], dtype=np.uint64))


def _feistel(value: NDArray[np.uint64], keys: NDArray[np.uint64], columns: int, rows: int) -> NDArray[np.uint64]:
    """Permute the grid [0, rows * columns): each round shifts one coordinate by a hash of the other."""
    n_columns, n_rows = np.uint64(columns), np.uint64(rows)
    row, column = value // n_columns, value % n_columns
    for key in range(0, _FEISTEL_ROUNDS, 2):
        column = (column + _mix(row + keys[key]) % n_columns) % n_columns
        row = (row + _mix(column + keys[key + 1]) % n_rows) % n_rows
    return row * n_columns + column


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Scramble 64-bit integers elementwise; arithmetic wraps. Source: Steele et al., SplitMix64, OOPSLA 2014."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
