"""GPTConfig: the sizes that fix a model's architecture. Must not know how the model is built or trained."""

from dataclasses import dataclass

GPT2_VOCAB_SIZE = 50257
ACTIVATIONS = ("gelu", "gelu_tanh")


@dataclass(frozen=True)
class GPTConfig:
    """nanoGPT's seven settings and the activation.

    activation: "gelu" is the exact GELU that nanoGPT trains with, "gelu_tanh" the tanh approximation that OpenAI
        trained GPT-2 with. Mixing them up shifts logits by up to 0.02.

    Raises:
        ValueError: a size that is not positive, heads that do not divide the width, an unknown activation.
    """

    block_size: int = 1024
    vocab_size: int = 50304  # GPT-2's 50257, padded up to a multiple of 64 for speed
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # biases in Linear and LayerNorm, as in GPT-2; without them a bit better and faster
    activation: str = "gelu"

    def __post_init__(self) -> None:
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
            size = getattr(self, name)
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"{name} must be a positive integer, got {size!r}")
        if self.n_embd % self.n_head != 0:
            raise ValueError(f"n_embd must be a multiple of n_head, got n_embd={self.n_embd} and n_head={self.n_head}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout!r}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {self.activation!r}")
