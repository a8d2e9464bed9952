"""The moments of a step, and what each holds besides weights, gradients and AdamW's moments.

The highest one is the step's memory. Which one that is depends on the settings: each of them is the highest for some.
AdamW's step is none of them: its fused kernel copies nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from orchestrator.capacity.kept import FLOAT32, KeptTensors


@dataclass(frozen=True)
class Moment:
    """Bytes at one moment.

    copies: of weights, in autocast's type. activations: that wait for the backward pass. logits: with their gradients.
    passing: gradients on their way, and of matrices until they are added up.
    """

    when: str
    copies: int = 0
    activations: int = 0
    logits: int = 0
    passing: int = 0

    @property
    def total(self) -> int:
        return self.copies + self.activations + self.logits + self.passing


def highest(kept: KeptTensors) -> Moment:
    """Return the moment that holds most: of a step, or of a run that only evaluates."""
    found = in_evaluation(kept) if kept.config.eval_only else moments(kept)
    return max(found, key=lambda moment: moment.total)


def moments(kept: KeptTensors) -> Iterator[Moment]:
    """Yield all moments that can be the highest."""
    yield _in_last_block(kept)
    yield from _after_forward(kept)
    yield from _in_loss(kept)
    yield from _in_head(kept)
    yield from _in_last_block_backward(kept)
    yield _in_embedding(kept)


def in_evaluation(kept: KeptTensors) -> Iterator[Moment]:
    """Yield the moments of a forward pass without gradients: GELU in a block, and the loss.

    Autocast keeps copies of weights that could be trained till its end, and of frozen ones none.
    """
    c, x, shape, logits = kept.c, kept.x, kept.shape, _logits(kept)
    copies, frozen = kept.copies_in_evaluation()
    variables = 4 * FLOAT32 * x  # the embedding's, the block's input, what attention has made of it, its norm
    inner = (12 if "mlp.c_fc" in shape.targets else 8) * c * x  # with an adapter, both products and the scaled one
    yield Moment("a block's evaluation", copies, variables + inner)
    yield Moment("a block's evaluation", copies + frozen, variables + 5 * c * x)
    head = kept.copy_of_head()
    yield Moment("the head's evaluation", copies + head, (FLOAT32 + c) * x, c * logits, kept.widened(shape.embedding))
    in_float32 = (2 if kept.is_mixed else 1) * FLOAT32 * logits  # with the logarithm of softmax
    yield Moment("the evaluation's loss", copies + (0 if shape.rank else head), FLOAT32 * x, c * logits + in_float32)


def _logits(kept: KeptTensors) -> int:
    """Return the values of the logits that exist at a time."""
    chunk = kept.config.loss_chunk or kept.tokens
    return min(chunk, kept.tokens) * kept.shape.vocab_size


def _in_last_block(kept: KeptTensors) -> Moment:
    c, x = kept.c, kept.x
    copies = kept.copies_in_forward()
    if kept.is_mixed and not kept.shape.rank:
        copies -= 2 * 4 * kept.shape.n_embd**2  # mlp.c_proj's comes next
    embedding = FLOAT32 * x  # a variable for as long as blocks are computed
    inner = 2 * FLOAT32 * x + 8 * c * x if kept.config.activation_checkpointing else 0
    return Moment("the last block's forward", copies, kept.blocks() + inner + embedding)


def _after_forward(kept: KeptTensors) -> Iterator[Moment]:
    """The head's product; then its copy in float32, if it is not, and the logarithm of its softmax."""
    when, c, logits = "the end of the forward", kept.c, _logits(kept)
    copies = kept.copies_in_forward() + kept.copy_of_head()
    is_variable = not kept.config.loss_chunk and (kept.is_mixed or kept.shape.rank)  # the last LayerNorm's output
    activations = kept.blocks() + kept.tail() + (FLOAT32 * kept.x if is_variable else 0)
    in_float32 = FLOAT32 * logits if kept.is_mixed else 0
    yield Moment(when, copies, activations, c * logits, kept.widened(kept.shape.embedding))
    yield Moment(when, copies, activations, c * logits + in_float32 + FLOAT32 * logits)


def _in_loss(kept: KeptTensors) -> Iterator[Moment]:
    """The logarithm of softmax, its gradient, and that of the logits; a loss in chunks has the sums of those before."""
    copies = kept.copies_in_backward() + kept.copy_of_head()
    yield Moment(
        "the loss's backward", copies, kept.blocks() + kept.tail(), 3 * FLOAT32 * _logits(kept), _of_chunks(kept)
    )


def _of_chunks(kept: KeptTensors) -> int:
    """Return the bytes of gradients of chunks: of the head's matrix, in autocast's type, and of the head's input."""
    if not kept.config.loss_chunk:
        return 0
    return (0 if kept.shape.rank else kept.c * kept.shape.embedding) + FLOAT32 * kept.x


def _in_head(kept: KeptTensors) -> Iterator[Moment]:
    when, c, logits, matrix = "the head's backward", kept.c, _logits(kept), kept.shape.embedding
    copies, activations = kept.copies_in_backward(), kept.blocks() + kept.tail()
    with_own = copies + kept.copy_of_head()
    is_chunked, is_trained = bool(kept.config.loss_chunk), not kept.shape.rank
    if kept.is_mixed:
        yield Moment(when, with_own, activations, (c + FLOAT32) * logits, _of_chunks(kept))
    product = (0 if is_chunked else c * kept.x) + (c * matrix if is_trained else kept.widened(matrix))
    yield Moment(when, with_own, activations, c * logits, product + _of_chunks(kept))
    if is_trained and is_chunked and kept.config.loss_chunk < kept.tokens:  # added up out of place
        yield Moment(when, copies, activations, 0, 3 * c * matrix + FLOAT32 * kept.x)
    if is_trained and kept.is_mixed:
        gradient = 2 * FLOAT32 * kept.x if is_chunked else c * kept.x
        yield Moment(when, copies, activations, 0, (c + FLOAT32) * matrix + gradient)


def _in_last_block_backward(kept: KeptTensors) -> Iterator[Moment]:
    """mlp.c_proj and GELU: nothing of any block is freed yet."""
    when, c, x, shape, lora_dropout = "the last block's backward", kept.c, kept.x, kept.shape, kept.config.lora_dropout
    recompute, is_trained, has_adapter = (
        kept.config.activation_checkpointing,
        not shape.rank,
        "mlp.c_proj" in shape.targets,
    )
    matrix = 4 * shape.n_embd**2  # values of mlp.c_proj's
    copies = kept.copies_in_backward() + (kept.copies_of_block() if recompute else 0)
    copies_left = max(0, copies - 2 * matrix) if kept.is_mixed else copies
    saved = kept.blocks() + (kept.block() if recompute else 0)
    saved_left = saved - (4 * c * x if has_adapter or is_trained else 0)  # without GELU's output
    head = FLOAT32 * shape.embedding if is_trained else 0  # the head's gradient waits for the embedding's
    grad, cast, inner = FLOAT32 * x, c * x if kept.is_mixed else 0, 4 * c * x
    product = c * matrix if is_trained else kept.widened(matrix)
    if recompute:  # it ends with variables that frozen layers do not keep
        is_variable = not is_trained and (not has_adapter or lora_dropout)
        variables = FLOAT32 * x + (inner if is_variable else 0)
        yield Moment("the last block's recomputation", copies, saved, 0, head + grad + cast + variables + product)
    yield Moment(when, copies, saved, 0, head + grad + cast + inner + product)
    if has_adapter and lora_dropout:
        yield Moment(when, copies, saved, 0, grad + cast + 2 * inner)
    elif has_adapter:
        yield Moment(when, copies_left, saved, 0, grad + 2 * inner)
    elif is_trained and kept.is_mixed:
        yield Moment(when, copies_left, saved_left, 0, head + grad + inner + (c + FLOAT32) * matrix)
    yield Moment(when, copies_left, saved_left, 0, head + grad + 2 * inner)


def _in_embedding(kept: KeptTensors) -> Moment:
    """The embedding's gradient and the head's, which are one matrix: PyTorch adds them up in place.

    Not so where the head's is a transposed view, in float32 without chunks.
    """
    matrix = 0 if kept.shape.rank else FLOAT32 * kept.shape.embedding
    is_view = not kept.is_mixed and not kept.config.loss_chunk
    return Moment(
        "the embedding's backward",
        passing=2 * matrix + (max(matrix, FLOAT32 * kept.x) if is_view else FLOAT32 * kept.x),
    )
