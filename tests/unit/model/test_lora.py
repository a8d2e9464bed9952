"""LoRA's layers: what they compute, what is trained, and what is kept in memory for the backward pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from model import GPT, GPTConfig, LoRAConfig
from model.lora import (
    BASE_DTYPES,
    LAYERS,
    adapter_shapes,
    frozen_parameters,
    init_adapters,
    is_adapter,
    merged,
    targets_of,
)
from orchestrator.config import LORA_TARGETS

ARGS: dict[str, Any] = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 16, "vocab_size": 97}
ALL = targets_of("all-linear")


def adapted(lora: LoRAConfig, plain: GPT) -> GPT:
    """Return a model with the plain one's weights, and adapters that compute something."""
    torch.manual_seed(3)
    model = GPT.empty(plain.config, lora=lora)
    init_adapters(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_(std=0.1)
            elif not is_adapter(name):
                parameter.copy_(plain.get_parameter(name))
    return model


def plain_gpt(**changes: Any) -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(**{**ARGS, **changes}))


def merged_gpt(model: GPT, lora: LoRAConfig) -> GPT:
    adapters = {name: each.detach() for name, each in model.named_parameters() if is_adapter(name)}
    plain = GPT.empty(model.config)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parameter.copy_(merged(name, model.get_parameter(name).detach(), adapters, lora))
    return plain


def tokens(seed: int = 5) -> Tensor:
    return torch.randint(97, (3, 16), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("base_dtype", BASE_DTYPES)
@pytest.mark.parametrize("targets", ["c_attn", "c_attn,mlp.c_proj", "all-linear"])
@pytest.mark.parametrize("bias", [True, False])
def test_adapters_compute_what_the_merged_model_computes(base_dtype: str, targets: str, bias: bool) -> None:
    lora = LoRAConfig(4, 16.0, targets_of(targets), base_dtype)
    plain = plain_gpt(bias=bias)
    model = adapted(lora, plain)
    logits, loss = model(tokens(), tokens(6))
    expected, expected_loss = merged_gpt(model, lora)(tokens(), tokens(6))
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss, expected_loss)
    assert (logits - plain(tokens(), tokens(6))[0]).abs().max() > 1e-2, "the adapters do nothing"


def test_new_adapters_leave_the_model_as_it_was() -> None:
    plain = plain_gpt()
    model = GPT.empty(plain.config, lora=LoRAConfig(4, targets=ALL))
    torch.manual_seed(1)
    init_adapters(model)
    with torch.no_grad():
        for name in frozen_parameters(model.named_parameters()):
            model.get_parameter(name).copy_(plain.get_parameter(name))
    assert torch.equal(model.transformer(tokens()), plain.transformer(tokens()))
    assert all(each.abs().max() > 0 for name, each in model.named_parameters() if name.endswith("lora_A"))


@pytest.mark.parametrize("base_dtype", BASE_DTYPES)
def test_gradients_are_those_of_the_products_and_of_nothing_else(base_dtype: str) -> None:
    """A widened weight has a backward pass of ours; PyTorch's own, for the same weights in float32, is the measure."""
    plain = plain_gpt()
    for parameter in plain.parameters():
        parameter.data = parameter.data.to(BASE_DTYPES[base_dtype]).float() if parameter.dim() >= 2 else parameter.data
    ours = adapted(LoRAConfig(4, targets=ALL, base_dtype=base_dtype), plain)
    theirs = adapted(LoRAConfig(4, targets=ALL), plain)
    for model in (ours, theirs):
        model(tokens(), tokens(6))[1].backward()
    gradients = [
        {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
        for model in (ours, theirs)
    ]
    assert (
        gradients[0].keys() == gradients[1].keys() == {name for name, _ in ours.named_parameters() if is_adapter(name)}
    )
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-5, atol=1e-7)
        assert gradient.abs().max() > 0


def kept_bytes(model: GPT) -> int:
    """Return the bytes that a forward pass keeps for the backward pass, beside the model's own weights."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        _loss = model(tokens(), tokens(6))[1]
    return sum(kept.values())


def test_no_wide_copy_of_a_frozen_weight_is_kept() -> None:
    """Frozen matrices in bfloat16 halve the weights; kept in float32 for the backward pass, they would cost more."""
    plain = plain_gpt(n_embd=128)  # weights outweigh activations
    kept = [kept_bytes(adapted(LoRAConfig(4, targets=ALL, base_dtype=dtype), plain)) for dtype in BASE_DTYPES]
    assert kept[1] <= kept[0]


def test_matrices_are_held_in_base_dtype_and_vectors_in_float32() -> None:
    model = GPT.empty(GPTConfig(**ARGS), lora=LoRAConfig(4, targets=ALL, base_dtype="bfloat16"))
    for name, parameter in model.named_parameters():
        is_wide = is_adapter(name) or parameter.dim() < 2
        assert parameter.dtype == (torch.float32 if is_wide else torch.bfloat16), name
        assert parameter.requires_grad == is_adapter(name), name
    assert model.lm_head.weight is model.transformer.wte.weight


def test_the_residual_stream_stays_float32() -> None:
    model = adapted(LoRAConfig(4, base_dtype="bfloat16"), plain_gpt())
    with torch.autocast("cpu", torch.bfloat16):
        assert model.transformer(tokens()).dtype == torch.float32
        streams: list[torch.dtype] = []
        model.transformer.h[0].register_forward_hook(lambda _module, _input, output: streams.append(output.dtype))
        model(tokens())
    assert streams == [torch.float32]


def test_dropout_is_a_function_of_the_seed_and_of_training() -> None:
    model = adapted(LoRAConfig(4, targets=ALL, dropout=0.5), plain_gpt())
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(model(tokens(), tokens(6))[1].item())
    assert losses[0] == losses[1] != losses[2]
    model.eval()
    assert model(tokens(), tokens(6))[1].item() == model(tokens(), tokens(6))[1].item()


def test_flops_of_frozen_weights_are_two_thirds() -> None:
    """Of 6 FLOPs per weight and token, 2 each are the forward pass, the inputs' gradient and the weight's gradient."""
    plain, lora = plain_gpt(), LoRAConfig(4, targets=ALL)
    model = adapted(lora, plain)
    n_adapters = sum(each.numel() for name, each in model.named_parameters() if is_adapter(name))
    tokens_per_step, attention = 16 * 3, 12 * 2 * 32 * 16
    expected = (4 * plain.get_num_params() + 6 * n_adapters + attention) * tokens_per_step
    assert model.estimate_mfu(3, 1.0, peak_flops=1.0) == expected
    assert model.get_num_params() == plain.get_num_params() + n_adapters


def test_shapes_of_adapters_are_the_models() -> None:
    lora = LoRAConfig(3, targets=("attn.c_attn", "mlp.c_proj"))
    plain = plain_gpt()
    shapes = {name: tuple(each.shape) for name, each in plain.named_parameters()}
    trained = {
        name: tuple(each.shape)
        for name, each in GPT.empty(plain.config, lora=lora).named_parameters()
        if each.requires_grad
    }
    assert adapter_shapes(shapes, lora) == trained
    assert trained["transformer.h.1.mlp.c_proj.lora_A"] == (3, 128)
    assert trained["transformer.h.1.mlp.c_proj.lora_B"] == (32, 3)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("c_attn", ("attn.c_attn",)),
        ("c_proj", ("attn.c_proj", "mlp.c_proj")),
        ("mlp.c_proj, c_attn", ("attn.c_attn", "mlp.c_proj")),
        ("all-linear", LAYERS),
    ],
)
def test_targets(words: str, expected: tuple[str, ...]) -> None:
    assert targets_of(words) == expected


def test_words_of_targets_are_the_settings() -> None:
    assert set().union(*(targets_of(word) for word in LORA_TARGETS)) == set(LAYERS)
    assert set(LAYERS) < set(LORA_TARGETS)


@pytest.mark.parametrize("words", ["", "c_attn,", "attn", "wte", "_attn", "lm_head"])
def test_a_target_that_names_no_layer(words: str) -> None:
    with pytest.raises(ValueError, match="names no layer: give some of c_attn, c_proj"):
        targets_of(words)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rank": 0}, "rank must be 1 or more"),
        ({"rank": 4, "targets": ()}, "targets must be some of"),
        ({"rank": 4, "targets": ("wte",)}, "got wte"),
        ({"rank": 4, "base_dtype": "int4"}, "base_dtype must be one of float32, bfloat16"),
    ],
)
def test_settings_that_mean_nothing(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoRAConfig(**wrong)
