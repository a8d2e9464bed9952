"""Dataset: batches of token ids as a pure function of the position in the run.

Moving a batch to a device is the loop's business; this module must not know devices, ranks or the world size.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from orchestrator.data.order import BatchOrder, Split, Stream, offsets
from orchestrator.data.token_files import TokenFiles, open_token_files
from orchestrator.data.tokenizers import GPT2Tokenizer, Tokenizer
from orchestrator.errors import DataError

_AT_ONCE = 2**20  # tokens that are counted at once


@dataclass(frozen=True, eq=False)
class Dataset:
    """Token files and the way in which blocks are drawn from them."""

    files: TokenFiles
    sampling: BatchOrder

    @property
    def vocab_size(self) -> int | None:
        """The vocabulary that a new model takes; None means GPT-2's, padded to 50,304."""
        return self.files.vocab_size

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer of the text, None where the dataset folder does not tell it."""
        return self.files.tokenizer

    def check_fits(self, vocab_size: int) -> None:
        """Check that both splits hold at least one sequence and only tokens of the model's vocabulary.

        Raises:
            DataError: they do not.
        """
        self.files.check_fits(self.sampling.block_size, vocab_size)

    def fingerprint(self) -> str:
        """Return a hash that tells one dataset from another, for comparing nodes and attempts."""
        return self.files.fingerprint()

    def bytes_per_token(self, split: Split) -> float | None:
        """Return the mean length in UTF-8 of a token of this split, None where the tokenizer's tokens are not known.

        A folder without a description, as nanoGPT makes it of OpenWebText, is taken for GPT-2's tokens.
        """
        tokenizer = self.tokenizer or (GPT2Tokenizer() if self.vocab_size is None else None)
        try:
            sizes = tokenizer.sizes_bytes() if tokenizer else None
        except DataError:
            sizes = None
        if sizes is None:
            return None
        tokens = self.files.splits[split]
        chunks = (tokens[i : i + _AT_ONCE] for i in range(0, len(tokens), _AT_ONCE))
        # An id beyond the tokenizer's, which a padded model knows, is no text.
        return sum(int(sizes[chunk[chunk < len(sizes)]].sum()) for chunk in chunks) / len(tokens)

    def batch(self, split: Split, iter_num: int, micro_step: int, *, evaluation: bool = False) -> tuple[Tensor, Tensor]:
        """Return inputs and next-token targets, contiguous int64 (B, T) each, of one micro-step of one iteration.

        A micro-step is numbered over all ranks. An evaluation draws from a stream of its own, in which `micro_step`
        numbers its batches, so measuring the loss does not look at the batches that are trained on.
        """
        tokens = self.files.splits[split]
        stream: Stream = "eval" if evaluation else "train"
        starts = offsets(self.sampling, len(tokens), split, iter_num, micro_step, stream)
        block = tokens.take(starts[:, None] + np.arange(self.sampling.block_size + 1))  # (B, T + 1)
        return _int64(block[:, :-1]), _int64(block[:, 1:])


def open_dataset(data_dir: str | Path, name: str, sampling: BatchOrder) -> Dataset:
    """Open the dataset folder `data_dir/name` for drawing batches.

    Raises:
        DataError: the folder or a file in it is missing, empty, truncated or not what its meta says.
    """
    return Dataset(open_token_files(data_dir, name), sampling)


def _int64(tokens: NDArray[Any]) -> Tensor:
    return torch.from_numpy(tokens.astype(np.int64, order="C"))  # the widening copy makes it contiguous as well
