"""A GPT language model in one file: attention, MLP, block, and the model with its optimizer.

State-dict names and initialisation are nanoGPT's, so that its checkpoints load and its seeds give its weights.
Must not know about data, devices, checkpoints or other processes.

Source: https://github.com/openai/gpt-2/blob/master/src/model.py and https://github.com/karpathy/nanoGPT
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from model.cache import KVCache, LayerCache
from model.config import GPTConfig
from model.generation import Generators, SamplingPolicy, stream
from model.linear import Linear
from model.lora import LoRAConfig, freeze
from model.pretrained import read_pretrained

log = logging.getLogger(__name__)

A100_BF16_FLOPS = 312e12  # peak per second, dense; Source: NVIDIA A100 datasheet
FUSED_ADAMW_DEVICES = ("cuda", "cpu", "mps", "xpu")


class CausalSelfAttention(nn.Module):
    """Multi-head attention in which position t sees positions 0..t."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # query, key, value of all heads
        self.c_proj = Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.n_head = config.n_head
        self.dropout = config.dropout

    def forward(self, x: Tensor, cache: LayerCache | None = None) -> Tensor:
        """Mix (B, T, C) over positions; return (B, T, C).

        cache: what came before: nothing, or T is 1. x is added to it.
        """
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=2)  # 3 times (B, T, C)
        q = q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, nh, T, hs)
        k = k.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, nh, T, hs)
        v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, nh, T, hs)
        if cache is not None:
            k, v = cache.append(k, v)  # (B, nh, all positions, hs)
        dropout_p = self.dropout if self.training else 0.0
        is_causal = cache is None or T > 1  # the newest position alone sees all
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=is_causal)  # (B, nh, T, hs)
        y = y.transpose(1, 2).reshape(B, T, C)  # heads side by side again
        return self.resid_dropout(self.c_proj(y))  # type: ignore[no-any-return]


class MLP(nn.Module):
    """Two linear layers, four times as wide in between."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.gelu = nn.GELU(approximate="tanh" if config.activation == "gelu_tanh" else "none")
        self.c_proj = Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Transform every position of (B, T, C) on its own; return (B, T, C)."""
        x = self.gelu(self.c_fc(x))  # (B, T, 4C)
        return self.dropout(self.c_proj(x))  # type: ignore[no-any-return]  # (B, T, C)


class Block(nn.Module):
    """Attention, then MLP, each normalised before and added to the residual stream after."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cache: LayerCache | None = None) -> Tensor:
        """Return (B, T, C) for (B, T, C)."""
        x = x + self.attn(self.ln_1(x), cache)
        return x + self.mlp(self.ln_2(x))  # type: ignore[no-any-return]


class Transformer(nn.Module):
    """Embeddings and blocks: token ids in, normalised residual stream out.

    recompute: keep of every block only what goes in, and compute the rest again in the backward pass (activation
        checkpointing): the same bits, dropout too, with a fraction of the memory and a third more time.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.recompute = False
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList([Block(config) for _ in range(config.n_layer)])
        self.ln_f = nn.LayerNorm(config.n_embd, bias=config.bias)

    def forward(self, idx: Tensor, cache: KVCache | None = None) -> Tensor:
        """Return (B, T, C) for (B, T) token ids, which follow those in the cache."""
        start = 0 if cache is None else cache.length
        pos = torch.arange(start, start + idx.size(1), dtype=torch.long, device=idx.device)  # (T)
        tok_emb = self.wte(idx)  # (B, T, C)
        pos_emb = self.wpe(pos)  # (T, C), the same for every row
        x = self.drop(tok_emb + pos_emb)
        for layer, block in enumerate(self.h):
            if self.recompute and self.training:
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x, None if cache is None else cache.layers[layer])
        return self.ln_f(x)  # type: ignore[no-any-return]


class GPT(nn.Module):
    """The transformer and a head that shares the token embedding's weight.

    loss_chunk: tokens whose logits exist at the same time while the loss is computed, 0 for all of them. In chunks,
        logits are computed again in the backward pass, and sums are rounded in another order.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.loss_chunk = 0
        # The order of construction is the order in which random numbers are drawn: a seed stands for nanoGPT's weights.
        self.transformer = Transformer(config)
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        self._tie_weights()
        log.info("number of parameters: %.2fM", self.get_num_params() / 1e6)
        if self.lm_head.weight.is_meta:  # to be filled in later; to draw nothing takes PyTorch milliseconds a tensor
            return
        self.apply(self._init_weights)
        # Every block adds to the residual stream twice: scaled down so that its variance does not grow with depth.
        for name, param in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(param, mean=0.0, std=0.02 / math.sqrt(2 * config.n_layer))

    @classmethod
    def empty(cls, config: GPTConfig, device: torch.device | str = "cpu", lora: LoRAConfig | None = None) -> GPT:
        """Return a GPT whose weights are still to be filled in: none are drawn, and no memory is touched.

        lora: freezes them, and adds adapters, which are still to be filled in as well.
        """
        with _without_weights():
            model = cls(config)
            if lora:
                freeze(model, lora)
        model.to_empty(device=device)
        model._tie_weights()  # which are two tensors now
        return model

    def _tie_weights(self) -> None:
        self.transformer.wte.weight = self.lm_head.weight  # Source: https://arxiv.org/abs/1608.05859

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, mean=0.0, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def forward(
        self, idx: Tensor, targets: Tensor | None = None, cache: KVCache | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return logits and the mean cross-entropy of the targets.

        idx: (B, T) token ids, T at most block_size. targets: (B, T), -1 where a position does not count.
        cache: the tokens before idx, read earlier; idx is added to it. Where it is not empty, T is 1.
        Logits are (B, T, vocab_size) with targets; without, only the last position's, (B, 1, vocab_size), and no loss.
        With loss_chunk they are the last position's, too.

        Raises:
            ValueError: the sequence is longer than block_size, or does not fit the cache.
        """
        T = idx.size(1)
        if self.config.block_size < T:
            raise ValueError(f"sequence of {T} tokens is longer than block_size={self.config.block_size}")
        if cache is not None:
            cache.check_room(T)
        x = self.transformer(idx, cache)  # (B, T, C)
        if targets is None:
            return self.lm_head(x[:, -1:, :]), None  # (B, 1, V): the only position that generation needs
        if self.loss_chunk:
            return self.lm_head(x[:, -1:, :]), self._loss_in_chunks(x, targets)
        logits = self.lm_head(x)  # (B, T, V)
        loss = F.cross_entropy(logits.view(-1, logits.size(-1)), targets.reshape(-1), ignore_index=-1)
        return logits, loss

    def _loss_in_chunks(self, x: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross-entropy; x: (B, T, C), targets: (B, T)."""

        def summed(x: Tensor, targets: Tensor) -> Tensor:
            return F.cross_entropy(self.lm_head(x), targets, ignore_index=-1, reduction="sum")

        of_x, of_targets = (torch.split(every, self.loss_chunk) for every in (x.flatten(0, 1), targets.flatten()))
        chunks = zip(of_x, of_targets, strict=True)
        sums = [checkpoint(summed, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
        return torch.stack(sums).sum() / (targets != -1).sum()

    @torch.no_grad()
    def generate(
        self,
        idx: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        generator: Generators = None,
        **options: Any,
    ) -> Tensor:
        """Return (B, T) token ids continued to (B, T + max_new_tokens), less where all rows end. Call `eval()` first.

        options: `generate_stream`'s. After its `end`, a row's tokens mean nothing.

        Raises:
            ValueError: as `generate_stream`.
        """
        tokens = self.generate_stream(idx, max_new_tokens, temperature, top_k, generator, **options)
        return torch.cat((idx, *tokens), dim=1)

    def generate_stream(
        self,
        idx: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        generator: Generators = None,
        *,
        top_p: float | None = None,
        end: int | None = None,
    ) -> Iterator[Tensor]:
        """Return an iterator over next tokens, one for each row of (B, T) token ids, as (B, 1). Call `eval()` first.

        With temperature 0 the tokens are those of a model that reads the whole text again for each; only where two
        tokens are as likely as each other, up to rounding, this one does so too. Beyond block_size it always does.

        temperature, top_k, top_p: see `SamplingPolicy`.
        generator: the source of randomness, or one for each row; PyTorch's global one by default.
        end: the token at which a text ends. When every row has drawn it, no more come; until then a row goes on.

        Raises:
            ValueError: temperature below 0, top_k below 1, top_p outside (0, 1], or no token to continue from.
        """
        if idx.dim() != 2 or idx.size(1) == 0:
            raise ValueError(f"idx must be (B, T) token ids with T at least 1, got shape {tuple(idx.shape)}")
        return stream(self, idx, max_new_tokens, SamplingPolicy(temperature, top_k, top_p), generator, end)

    def crop_block_size(self, block_size: int) -> None:
        """Shorten the context, for instance of a pretrained GPT-2, to block_size positions.

        Raises:
            ValueError: block_size is larger than the model's.
        """
        if block_size > self.config.block_size:
            raise ValueError(f"cannot crop block_size={self.config.block_size} to the larger {block_size}")
        self.config = replace(self.config, block_size=block_size)
        wpe = self.transformer.wpe
        wpe.weight = nn.Parameter(wpe.weight.detach()[:block_size].clone())  # a view would keep the whole table alive
        wpe.num_embeddings = block_size

    @classmethod
    def from_pretrained(cls, model_type: str, override_args: dict[str, Any] | None = None) -> GPT:
        """Return a GPT with the weights of a Hugging Face GPT-2.

        model_type: gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a folder or fsspec URL with config.json and tensors.
        override_args: {"dropout": p} or nothing: all else is fixed by the weights.

        Raises:
            PretrainedError: (a ValueError) the source is unreachable, incomplete or not a GPT-2.
            ValueError: override_args holds anything but dropout.
        """
        overrides = override_args or {}
        if set(overrides) - {"dropout"}:
            raise ValueError(f"only dropout can be overridden for pretrained weights, got {sorted(overrides)}")
        args, state = read_pretrained(model_type, parameter_shapes)
        with _without_weights():  # those that are about to be replaced are never drawn
            model = cls(GPTConfig(**{**args, **overrides}))
        model.load_state_dict(state, assign=True)
        model._tie_weights()  # assigned tensors are new parameters
        return model

    def configure_optimizers(
        self, weight_decay: float, learning_rate: float, betas: tuple[float, float], device_type: str
    ) -> torch.optim.AdamW:
        """Return AdamW with two groups: matrices and embeddings decay, biases and norms do not.

        The fused kernel is used wherever PyTorch has one. On CPU it takes less than half the plain one's time.
        """
        params = [p for p in self.parameters() if p.requires_grad]
        decayed = [p for p in params if p.dim() >= 2]
        others = [p for p in params if p.dim() < 2]
        for kind, group in (("decayed", decayed), ("other", others)):
            log.info("%s parameters: %d tensors, %d values", kind, len(group), sum(p.numel() for p in group))
        fused = device_type in FUSED_ADAMW_DEVICES
        log.info("fused AdamW: %s", fused)
        groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=fused)

    def get_num_params(self, non_embedding: bool = True) -> int:
        """Return the number of parameters, by default without position embeddings.

        Token embeddings count: they are the head's weight as well.
        """
        count = sum(p.numel() for p in self.parameters())
        return count - self.transformer.wpe.weight.numel() if non_embedding else count

    def _num_frozen_params(self) -> int:
        frozen = [p for p in self.parameters() if not p.requires_grad and p is not self.transformer.wpe.weight]
        return sum(p.numel() for p in frozen)

    def estimate_mfu(self, fwdbwd_per_iter: float, dt: float, peak_flops: float = A100_BF16_FLOPS) -> float:
        """Return model FLOPs utilisation: the share of peak_flops (per second) that went into the model.

        fwdbwd_per_iter: sequences of block_size per iteration. dt: seconds per iteration.
        A frozen weight has no gradient, which is a third of the work of one that is trained.

        Source: PaLM, appendix B, https://arxiv.org/abs/2204.02311
        """
        cfg = self.config
        head_size = cfg.n_embd // cfg.n_head
        weights = 6 * self.get_num_params() - 2 * self._num_frozen_params()
        flops_per_token = weights + 12 * cfg.n_layer * cfg.n_head * head_size * cfg.block_size
        flops_per_iter = flops_per_token * cfg.block_size * fwdbwd_per_iter
        return flops_per_iter / dt / peak_flops


def parameter_shapes(args: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the parameters of a GPT, name -> shape, in the order of its named_parameters(); args are GPTConfig's."""
    with _without_weights():
        transformer = Transformer(GPTConfig(**args))  # the head's weight is the token embedding's
    return {f"transformer.{name}": tuple(weight.shape) for name, weight in transformer.named_parameters()}


@contextmanager
def _without_weights() -> Iterator[None]:
    """Build modules whose weights have a shape, but no memory and no values."""
    with torch.device("meta"), _DrawNothing():
        yield


class _DrawNothing(TorchFunctionMode):
    """Skips the random numbers of PyTorch's layers: to draw none, on device meta, it imports sympy for a second."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return None if func in (nn.init.normal_, nn.init.kaiming_uniform_) else func(*args, **(kwargs or {}))
