"""Dataset: batches of token ids as a pure function of the position in the run.

Moving a batch to a device is the loop's business; this module must not know devices, ranks or the world size.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from orchestrator.data.order import BatchOrder, Split, Stream, offsets
from orchestrator.data.token_files import TokenFiles
from orchestrator.data.tokenizers import GPT2Tokenizer
from orchestrator.errors import DataError

_AT_ONCE = 2**20  # tokens that are counted at once


@dataclass(frozen=True, eq=False)
class Dataset:
    """Token files and the way in which blocks are drawn from them."""

    files: TokenFiles
    sampling: BatchOrder

    def bytes_per_token(self, split: Split) -> float | None:
        """Return the mean length in UTF-8 of a token of this split, None where the tokenizer's tokens are not known.

        A folder without a description, as nanoGPT makes it of OpenWebText, is taken for GPT-2's tokens.
        """
        tokenizer = self.files.tokenizer or (GPT2Tokenizer() if self.files.vocab_size is None else None)
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
        # the widening copy makes them contiguous as well
        X, Y = (torch.from_numpy(tokens.astype(np.int64, order="C")) for tokens in (block[:, :-1], block[:, 1:]))
        return X, Y
