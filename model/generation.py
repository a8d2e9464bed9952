"""Continues token ids with a GPT: draws by temperature, top-k and top-p, from a model that remembers what it has read.

Must not know text, files or how a model is built: it asks a `LanguageModel`, which a GPT is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.cache import KVCache
from model.config import GPTConfig
from model.linear import Copies

Generators = torch.Generator | Sequence[torch.Generator] | None

# Remembered keys and values are those of other matrix products than a whole pass computes: they differ by rounding, and
# so do the logits. Measured as a share of the largest logit (tests/unit/test_sampling.py has the models): at most 2e-6
# in float32, 0.02 in bfloat16. Where the two best are closer than this, a whole pass decides.
ROUNDING = {torch.float32: 2**-16, torch.bfloat16: 2**-5, torch.float16: 2**-8, torch.float64: 2**-40}
TF32_ROUNDING = 2**-8  # float32 products on a GPU that rounds their factors
_TINY = 1e-30  # a temperature below is as good as 0, and would make logits infinite


class LanguageModel(Protocol):
    """A model that text can be continued with."""

    config: GPTConfig

    @property
    def lm_head(self) -> nn.Linear:
        """The layer that makes logits."""

    def __call__(self, idx: Tensor, *, cache: KVCache | None = None) -> tuple[Tensor, Tensor | None]:
        """Return the logits (B, 1, V) after (B, T) token ids, which follow those in the cache, and no loss."""

    def modules(self) -> Iterator[nn.Module]:
        """Yield all layers."""


class NotFiniteError(ArithmeticError):
    """The model has computed logits from which nothing can be drawn: NaN or infinity."""


@dataclass(frozen=True)
class SamplingPolicy:
    """How the next token is chosen from the logits.

    temperature: below 1 sharper, above 1 flatter, 0 always the likeliest token.
    top_k: draw from the k likeliest tokens only.
    top_p: of these, draw from the fewest likeliest that together have at least this probability.

    Raises:
        ValueError: temperature below 0, top_k below 1, top_p outside (0, 1].
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature must be 0 or more, got {self.temperature!r}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be 1 or more, got {self.top_k!r}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p!r}")

    @property
    def is_greedy(self) -> bool:
        """Whether nothing is drawn: it is always the likeliest token."""
        return self.temperature < _TINY or self.top_k == 1


@torch.no_grad()
def stream(
    model: LanguageModel,
    idx: Tensor,
    max_new_tokens: int,
    choice: SamplingPolicy,
    generator: Generators,
    end: int | None,
) -> Iterator[Tensor]:
    """Yield one next token for each row of (B, T) token ids, as (B, 1), at most max_new_tokens times.

    end: the id after which a row's tokens mean nothing; the stream ends when every row has drawn it.

    Raises:
        NotFiniteError: the model's weights, or the type in which it computes, are of no use.
    """
    reader = Reader(model, idx.size(0), idx.size(1) + max_new_tokens)
    is_done = torch.zeros_like(idx[:, :1], dtype=torch.bool)  # (B, 1)
    for _ in range(max_new_tokens):
        logits = reader.read(idx)  # (B, V)
        if not torch.isfinite(logits).all():
            raise NotFiniteError(f"the logits after {idx.size(1)} tokens are not finite")
        if choice.is_greedy and reader.is_approximate and not is_clear(logits):
            logits = reader.reread(idx)
        idx_next = choose(logits, choice, generator)  # (B, 1)
        yield idx_next
        idx = torch.cat((idx, idx_next), dim=1)  # (B, T + 1)
        if end is not None:
            is_done |= idx_next == end
            if is_done.all():
                return


class Reader:
    """Computes the logits that follow a text which grows by a token at a time.

    Positions are absolute: once a text is longer than the context and loses its first token, all others stand
    elsewhere, nothing that is remembered holds any longer, and each token costs a pass over the whole context.
    """

    def __init__(self, model: LanguageModel, batch_size: int, max_tokens: int) -> None:
        self.model, self.block_size = model, model.config.block_size
        self.cache = KVCache.empty(model.config, batch_size, min(max_tokens, self.block_size), model.lm_head.weight)
        self.copies = Copies(model.modules(), batch_size)
        self.is_approximate = False  # whether the last logits came from remembered keys and values

    def read(self, idx: Tensor) -> Tensor:
        """Return the logits (B, V) after (B, T) token ids, of which all but the last were read before."""
        if idx.size(1) > self.block_size or self.cache.length == 0:
            return self.reread(idx)
        self.is_approximate = True
        with self.copies:
            logits, _ = self.model(idx[:, self.cache.length :], cache=self.cache)  # (B, 1, V)
        return logits[:, -1]

    def reread(self, idx: Tensor) -> Tensor:
        """Return the same from a pass over the whole context, bit for bit what the model gives without a cache."""
        self.is_approximate = False
        if idx.size(1) > self.block_size:
            logits, _ = self.model(idx[:, -self.block_size :])  # no more context than there are positions
        else:
            self.cache.clear()
            logits, _ = self.model(idx, cache=self.cache)
        return logits[:, -1]


def is_clear(logits: Tensor) -> bool:
    """Return whether in each row of (B, V) the best is further ahead than rounding could have put it."""
    best, second = torch.topk(logits, min(2, logits.size(-1))).values.float().T[[0, -1]]  # 2 times (B)
    uses_tf32 = logits.is_cuda and logits.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    share = TF32_ROUNDING if uses_tf32 else ROUNDING[logits.dtype]
    return bool((best - second > share * logits.abs().amax(dim=-1)).all())


def choose(logits: Tensor, choice: SamplingPolicy, generator: Generators) -> Tensor:
    """Choose one token id per row, (B, V) -> (B, 1).

    Source: top-p is nucleus sampling, https://arxiv.org/abs/1904.09751
    """
    if choice.temperature < _TINY:
        return logits.argmax(dim=-1, keepdim=True)
    logits = logits.float() / choice.temperature
    if choice.top_k is not None:
        kth_best = torch.topk(logits, min(choice.top_k, logits.size(-1))).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < kth_best, -torch.inf)
    probabilities = F.softmax(logits, dim=-1)
    if choice.top_p is not None and choice.top_p < 1:
        probabilities = _nucleus(probabilities, choice.top_p)
    return draw(probabilities, generator)


def draw(probabilities: Tensor, generator: Generators) -> Tensor:
    """Draw one index per row by its probabilities, (B, V) -> (B, 1): the one that `torch.multinomial` draws.

    Of exponential numbers, divided by their rates, the smallest is that of entry i with the probability of i. Rows that
    draw from generators of their own are put together before they are compared, and nothing is read from the device.
    """
    races = torch.empty_like(probabilities)
    if isinstance(generator, Sequence):
        for row, own in zip(races, generator, strict=True):
            row.exponential_(generator=own)
    else:
        races.exponential_(generator=generator)
    return (probabilities / races).argmax(dim=-1, keepdim=True)


def skip_draws(generator: torch.Generator, n_draws: int, vocab_size: int) -> None:
    """Leave a generator as `n_draws` tokens that are drawn from it would: one row, temperature above 0."""
    if generator.device.type == "cpu":  # `draw` takes 64 random bits for each entry, and then a logarithm
        for _ in range(n_draws):
            torch.empty(vocab_size, dtype=torch.int64).random_(generator=generator)
        return
    races = torch.empty(vocab_size, device=generator.device)
    for _ in range(n_draws):
        races.exponential_(generator=generator)


def _nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Set to 0 what does not belong to the fewest entries of each row of (B, V) that have top_p together."""
    ranked, order = probabilities.sort(dim=-1, descending=True)
    before = ranked.cumsum(dim=-1) - ranked  # what the likelier ones have together: 0 for the first, which stays
    return torch.zeros_like(probabilities).scatter(-1, order, ranked.masked_fill(before >= top_p, 0.0))
