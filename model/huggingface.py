"""What a GPT-2 of ours is called in Hugging Face's files, and back: names, layout and config.json, as pure functions.

Must not know where files lie (`pretrained.py` reads them).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from model.config import GPT2_VOCAB_SIZE, GPTConfig
from model.names import EMBEDDING, HEAD, MASK_BUFFERS, renamed, without_wrappers

HUB_OWNER = "openai-community"  # of GPT-2 at the Hub
# OpenAI's GPT-2 keeps these as Conv1D, (in, out), where nn.Linear holds (out, in).
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
ACTIVATION_NAMES = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
_BARE = ("wte.", "wpe.", "h.", "ln_f.")  # how names begin in files of the transformer alone
_SIZES = {"n_layer": 12, "n_head": 12, "n_embd": 768, "n_positions": 1024, "vocab_size": GPT2_VOCAB_SIZE}

# Settings of GPT2Config that change the maths: ours is the default of each, so a key may be missing.
FIXED_SETTINGS = {
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}


class PretrainedError(ValueError):
    """Pretrained weights that cannot be reached, are damaged, or belong to another architecture."""


class UnreachableError(PretrainedError):
    """Pretrained weights whose storage, or the Hub, has failed: its exception is the cause."""


def names_in(names: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """Return our name -> the file's name, and the names that are left out: of other heads, such as `score.weight`.

    Names may come with or without `transformer.`, and with what wrappers put before them. Causal masks are no weights.
    Names within the transformer that GPT-2 does not have stay, for the caller to compare with its model.

    Raises:
        PretrainedError: two names become one.
    """
    ours: list[tuple[str, str]] = []
    left_out = []
    for name in names:
        plain = without_wrappers(name)
        if plain.startswith(_BARE):
            plain = f"transformer.{plain}"
        if not plain.startswith(("transformer.", "lm_head.")):
            left_out.append(name)
        elif not plain.endswith(MASK_BUFFERS):
            ours.append((name, plain))
    try:
        found = renamed(ours)
    except ValueError as error:
        raise PretrainedError(str(error)) from None
    return found, left_out


def from_huggingface(tensors: Iterable[tuple[str, Tensor]], *, views: bool = False) -> dict[str, Tensor]:
    """Return a GPT state dict for the tensors of a GPT-2 file, float32, `lm_head.weight` tied.

    tensors: by name, one at a time: each is copied before the next is asked for.
    views: copy nothing that is float32 already, and hand out linear weights as transposed views.
    Names are `names_in`'s; linear weights arrive as (in, out) and leave as (out, in). Either name of the tied tensor
    will do.

    Raises:
        PretrainedError: the head's weight is not the token embedding's, or two names become one.
    """
    state: dict[str, Tensor] = {}
    for name, tensor in tensors:
        for full_name in names_in([name])[0]:
            if full_name in state:
                raise PretrainedError(f"{name} is there twice, as {full_name}")
            ours = transpose_if_linear(full_name, tensor)
            is_copied = not views and full_name != HEAD  # the head is only compared
            state[full_name] = torch.empty(ours.shape).copy_(ours) if is_copied else ours.float()
    if HEAD in state and EMBEDDING not in state:
        state[EMBEDDING] = state[HEAD] if views else state[HEAD].clone()
    if EMBEDDING in state:
        if HEAD in state:
            check_tied(state[HEAD], state[EMBEDDING])
        state[HEAD] = state[EMBEDDING]
    return state


def check_tied(head: Tensor, embedding: Tensor) -> None:
    """Check that the head's weight is the token embedding's, bit for bit: what is no number equals itself, too.

    Raises:
        PretrainedError: it is not.
    """
    is_one = head.shape == embedding.shape and head.data_ptr() == embedding.data_ptr()
    if not is_one and not _same_bits(head, embedding):
        raise PretrainedError(f"{HEAD} differs from {EMBEDDING}: a model with an untied head cannot be loaded")


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def to_huggingface(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a GPT's tensors under the names and in the layout of GPT2LMHeadModel.

    The tied `lm_head.weight` is left out, as Hugging Face leaves it out. A model without biases gets zero ones, which
    compute the same: GPT-2 has no such option, so read back it is a model with bias=True.
    """
    tensors: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        if name == HEAD:
            continue
        tensors[name] = transpose_if_linear(name, tensor).contiguous()
        bias = name.removesuffix(".weight") + ".bias"
        if name.endswith(".weight") and bias not in state_dict and not name.endswith(("wte.weight", "wpe.weight")):
            tensors[bias] = tensor.new_zeros(tensor.size(0))  # (out)
    return tensors


def transpose_if_linear(name: str, tensor: Tensor) -> Tensor:
    """Return a view of the tensor in the other layout: Hugging Face's for ours, ours for Hugging Face's."""
    # Anything but a matrix is left alone: the comparison of shapes then says what is wrong with it.
    return tensor.t() if name.endswith(TRANSPOSED) and tensor.dim() == 2 else tensor


def huggingface_config(config: GPTConfig) -> dict[str, Any]:
    """Return the content of the config.json with which GPT2LMHeadModel computes what our GPT computes."""
    end_of_text = 50256 if config.vocab_size > 50256 else None  # a character vocabulary has no such token
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": config.vocab_size,
        "n_positions": config.block_size,
        "n_embd": config.n_embd,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_inner": None,
        "activation_function": "gelu_new" if config.activation == "gelu_tanh" else "gelu",
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
        **FIXED_SETTINGS,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
    }


def config_arguments(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return GPTConfig's arguments for the content of a GPT-2's config.json; missing keys have GPT2Config's defaults.

    Without model_type it is taken for a GPT-2 where it says n_layer, n_head and n_embd, which are GPT-2's words.

    Raises:
        PretrainedError: another architecture, a setting that our GPT does not compute, or no sizes.
    """
    if not isinstance(content, Mapping):
        raise PretrainedError(f"it holds a {type(content).__name__}, not the settings of a model")
    is_nameless = "model_type" not in content and all(key in content for key in ("n_layer", "n_head", "n_embd"))
    if not is_nameless and content.get("model_type") != "gpt2":
        raise PretrainedError(
            f"model_type must be gpt2, got {content.get('model_type')!r}: no other model is trained here"
        )
    sizes = {key: content.get(key, default) for key, default in _SIZES.items()}
    for key, value in sizes.items():
        if type(value) is not int or value < 1:
            raise PretrainedError(f"{key} must be a whole number above 0, got {value!r}")
    n_embd = sizes["n_embd"]
    if n_embd % sizes["n_head"]:
        raise PretrainedError(f"n_embd={n_embd} is not divisible by n_head={sizes['n_head']}")
    if content.get("n_inner") not in (None, 4 * n_embd):
        raise PretrainedError(f"n_inner must be 4 * n_embd = {4 * n_embd}, got {content['n_inner']!r}")
    for key, value in FIXED_SETTINGS.items():
        if content.get(key, value) != value:
            raise PretrainedError(f"{key} must be {value!r}, got {content[key]!r}")
    activation = content.get("activation_function", "gelu_new")
    if not isinstance(activation, str) or activation not in ACTIVATION_NAMES:
        names = ", ".join(ACTIVATION_NAMES)
        raise PretrainedError(f"activation_function must be one of {names}, got {activation!r}")
    return {
        "n_layer": sizes["n_layer"],
        "n_head": sizes["n_head"],
        "n_embd": n_embd,
        "block_size": sizes["n_positions"],
        "vocab_size": sizes["vocab_size"],
        "bias": True,
        "activation": ACTIVATION_NAMES[activation],
    }
