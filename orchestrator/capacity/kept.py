"""KeptTensors: what autograd and autocast keep of a micro-step until its backward pass, in bytes.

They are counted for nanoGPT's GPT, not compiled, layer by layer. Together with `moments.py` these are all formulas of a
step's memory; tests/unit/capacity/ compares them with fake tensors, and `python -m benchmarks small_gpus` with what a
CPU's allocator gives out. A CPU differs in two places: a dropout mask has its values' type instead of a byte for each,
and attention with dropout keeps (T, T) matrices, in float32.
"""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.capacity.shape import ModelShape
from orchestrator.config import TrainConfig

FLOAT32 = 4  # bytes
_HALF = 2  # bytes of bfloat16 and float16


@dataclass(frozen=True)
class KeptTensors:
    """Bytes that wait for the backward pass.

    In the formulas: x is the values of (B, T, C), c the bytes of a value in config.dtype.
    """

    config: TrainConfig
    shape: ModelShape
    on_gpu: bool = True

    @property
    def c(self) -> int:
        is_float32 = self.config.dtype == "float32" or (self.config.dtype == "auto" and not self.on_gpu)
        return FLOAT32 if is_float32 else _HALF

    @property
    def tokens(self) -> int:
        return self.config.batch_size * self.config.block_size

    @property
    def x(self) -> int:
        return self.tokens * self.shape.n_embd

    @property
    def is_mixed(self) -> bool:
        """Whether autocast copies weights to a shorter type."""
        return self.c != FLOAT32

    @property
    def _base_is_float32(self) -> bool:
        return not self.shape.rank or self.config.lora_base_dtype == "float32"

    def _mask(self, rate: float, value_bytes: int) -> int:
        """Return the bytes of a dropout mask over (B, T, C)."""
        return self.x * (1 if self.on_gpu else value_bytes) if rate else 0

    # activations

    def linear_inputs(self) -> int:
        """Return what a block's linear layers keep of their inputs: all of it if trained, nothing if frozen.

        An adapter keeps its layer's input, after its own dropout with the mask, and that times lora_A.
        """
        c, shape, rate = self.c, self.shape, self.config.lora_dropout
        if not shape.rank:
            return (1 + 1 + 4) * c * self.x  # of c_attn, c_fc and mlp.c_proj; attention keeps that of attn.c_proj
        kept = 0
        for layer in shape.targets:
            is_norms = layer in ("attn.c_attn", "mlp.c_fc")  # a LayerNorm's output is float32
            width = 4 if layer == "mlp.c_proj" else 1
            if layer != "attn.c_proj" or rate:
                kept += width * (c * self.x + self._mask(rate, FLOAT32 if is_norms else c))
            kept += c * self.tokens * shape.rank
        return kept

    def block(self) -> int:
        """Return the bytes of one block, without its input."""
        c, x, config = self.c, self.x, self.config
        residual = FLOAT32 * x  # between attention and MLP
        norms = 2 * 2 * FLOAT32 * self.tokens  # mean and deviation of each token, twice
        rows = config.batch_size * self.shape.n_head * config.block_size  # (B, nh, T)
        if self.on_gpu or not config.dropout:
            attention = (3 + 1) * c * x + FLOAT32 * rows  # query, key, value; output; logarithms of softmax's sums
        else:  # softmax, mask and product, each (B, nh, T, T); in float32
            attention = (3 * FLOAT32 + c) * x + 3 * FLOAT32 * rows * config.block_size
        gelu = 4 * c * x
        return residual + norms + attention + gelu + self.linear_inputs() + 2 * self._mask(config.dropout, c)

    def blocks(self) -> int:
        """Return the bytes of all blocks at the end of the forward pass: with activation checkpointing, their inputs.

        With adapters nothing before the first of them needs a gradient.
        """
        shape, config = self.shape, self.config
        inputs = shape.n_layer * FLOAT32 * self.x
        mask = 0 if shape.rank else self._mask(config.dropout, FLOAT32)  # of the embedding
        if config.activation_checkpointing:
            return inputs + mask
        unneeded = 0
        if shape.rank and "attn.c_attn" in shape.targets:
            unneeded = FLOAT32 * self.x + self._mask(config.lora_dropout, FLOAT32)
        elif shape.rank:
            first = "attn.c_proj" in shape.targets
            unneeded = (
                FLOAT32 * self.x + 4 * self.c * self.x + (self._mask(config.lora_dropout, self.c) if first else 0)
            )
        return inputs + mask + shape.n_layer * self.block() - unneeded

    def tail(self) -> int:
        """Return the bytes of the last LayerNorm and the head. A loss in chunks keeps the head's input, in float32."""
        norm = FLOAT32 * self.x + 2 * FLOAT32 * self.tokens
        if self.config.loss_chunk:
            return norm + FLOAT32 * self.x
        return norm + (0 if self.shape.rank else self.c * self.x)

    # copies of weights

    def copies_of_block(self) -> int:
        """Return the bytes of autocast's copies of a block's matrices, of those that are held in float32."""
        if not self.is_mixed:
            return 0
        base = self.shape.block_matrices if self._base_is_float32 else 0
        return _HALF * (base + self.shape.adapter_params // self.shape.n_layer)

    def copy_of_head(self) -> int:
        """Return the bytes of autocast's copy of the head's matrix."""
        return _HALF * self.shape.embedding if self.is_mixed and self._base_is_float32 else 0

    def copies_in_forward(self) -> int:
        """Return the bytes of the blocks' copies when the forward pass ends.

        Autocast keeps those of trained weights till then, autograd those with which a gradient goes on.
        """
        shape = self.shape
        if shape.rank and self.config.activation_checkpointing:
            return _HALF * shape.adapter_params if self.is_mixed else 0
        needs_none = shape.rank and self.is_mixed and self._base_is_float32  # the first c_attn
        return shape.n_layer * self.copies_of_block() - (_HALF * 3 * shape.n_embd**2 if needs_none else 0)

    def copies_in_backward(self) -> int:
        """Return the bytes of the blocks' copies that the backward pass finds: recomputed blocks make them anew."""
        return 0 if self.config.activation_checkpointing else self.copies_in_forward()

    def copies_in_evaluation(self) -> tuple[int, int]:
        """Return the bytes of copies that autocast keeps, the head's apart, and of the largest one that it does not."""
        shape = self.shape
        if not shape.rank:
            return shape.n_layer * self.copies_of_block(), 0
        frozen = _HALF * 4 * shape.n_embd**2 if self.is_mixed and self._base_is_float32 else 0
        return _HALF * shape.adapter_params if self.is_mixed else 0, frozen or self.widened(4 * shape.n_embd**2)

    def widened(self, values: int) -> int:
        """Return the bytes of a matrix in float32 for the time of a product, where it is held in bfloat16."""
        return 0 if self._base_is_float32 or self.is_mixed else FLOAT32 * values
