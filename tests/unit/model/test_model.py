"""The GPT against nanoGPT's recorded numbers, and its optimizer, its sampler and its errors."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from model import GPT, GPTConfig, huggingface_config, to_huggingface

SHARED = Path(__file__).resolve().parents[4] / "shared"
NUMBERS = SHARED / "golden" / "nanogpt_numbers.json"
CHECKPOINT = SHARED / "golden" / "nanogpt_ckpt.pt"
TEXT = SHARED / "data" / "tinyshakespeare.txt"
needs_golden = pytest.mark.skipif(not NUMBERS.is_file(), reason=f"golden numbers are not at {NUMBERS.parent}")

TINY: dict[str, Any] = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 8, "vocab_size": 11}


def tiny_gpt(**overrides: Any) -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(**{**TINY, **overrides})).eval()


def test_an_empty_model_is_one_that_is_filled_in() -> None:
    before = torch.get_rng_state()
    empty = GPT.empty(GPTConfig(**TINY))
    assert torch.equal(torch.get_rng_state(), before), "nothing is drawn"
    drawn = tiny_gpt()
    assert [name for name, _ in empty.named_parameters()] == [name for name, _ in drawn.named_parameters()]
    assert empty.lm_head.weight is empty.transformer.wte.weight
    with torch.no_grad():
        for a, b in zip(empty.parameters(), drawn.parameters(), strict=True):
            a.copy_(b)
    idx = torch.randint(11, (2, 8))
    assert torch.equal(empty.eval()(idx, idx)[0], drawn(idx, idx)[0])


def read_train_tokens() -> Tensor:
    text = TEXT.read_text()
    ids = {character: i for i, character in enumerate(sorted(set(text)))}
    return torch.tensor([ids[character] for character in text[: int(0.9 * len(text))]])


def read_cases() -> list[Any]:
    return json.loads(NUMBERS.read_text())["cases"] if NUMBERS.is_file() else [None]


def losses_of_20_steps(
    tokens: Tensor, loss_of: Callable[[Tensor], Tensor], optimizer: torch.optim.Optimizer
) -> list[float]:
    """Train for the 20 steps that nanogpt_numbers.json describes; loss_of takes rows (12, 65) of token ids."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    losses = []
    for step in range(20):
        starts = torch.tensor([(step * 12 + b) * 997 % (len(tokens) - 65) for b in range(12)])
        loss = loss_of(tokens[starts[:, None] + torch.arange(65)])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def our_losses(model: GPT, tokens: Tensor) -> list[float]:
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), "cpu")
    return losses_of_20_steps(tokens, lambda rows: model(rows[:, :-1], rows[:, 1:])[1], optimizer)


def transformers_losses(model: GPT, tokens: Tensor) -> list[float]:
    """Train transformers' GPT-2 from our weights, with PyTorch's plain AdamW: another program, on this processor."""
    config = GPT2Config(**huggingface_config(model.config), attn_implementation="eager")
    theirs = GPT2LMHeadModel(config).train().to(model.lm_head.weight.dtype)
    theirs.load_state_dict(to_huggingface(model.state_dict()), strict=False)
    theirs.tie_weights()
    if not model.config.bias:
        for name, parameter in theirs.named_parameters():
            parameter.requires_grad_(not name.endswith(".bias"))  # which are zeros
    trained = [parameter for parameter in theirs.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99), fused=False, foreach=False)

    def loss_of(rows: Tensor) -> Tensor:
        logits = theirs(rows[:, :-1]).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())

    return losses_of_20_steps(tokens, loss_of, optimizer)


@pytest.mark.parametrize(
    ("bias", "dtype", "tolerance"),
    [
        (False, torch.float32, 1e-5),
        (True, torch.float32, 1e-5),
        pytest.param(False, torch.float64, 1e-10, marks=pytest.mark.slow),
    ],
)
def test_20_steps_lose_what_transformers_gpt2_loses(bias: bool, dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(1337)
    model = GPT(GPTConfig(n_layer=4, n_head=4, n_embd=128, block_size=64, bias=bias, vocab_size=65)).to(dtype)
    tokens = torch.tensor([7, 21, 33, 50]).repeat(250) + torch.randint(2, (1000,))  # a rhythm that can be learned
    theirs = transformers_losses(model, tokens)
    ours = our_losses(model, tokens)
    assert ours == pytest.approx(theirs, abs=tolerance)
    assert ours[-1] < ours[0] - 1, "something was learned"


@needs_golden
@pytest.mark.parametrize("case", read_cases())
def test_seed_gives_nanogpts_weights_and_losses(case: Any) -> None:
    torch.manual_seed(case["seed_before_construction"])
    model = GPT(GPTConfig(**case["model_args"]))
    assert model.get_num_params() == case["n_params_non_embedding"]
    state = model.state_dict()
    for name, total in case["init_abs_sum"].items():
        assert state[name].double().abs().sum().item() == pytest.approx(total, abs=1e-5)
    losses = our_losses(model, read_train_tokens()[: 1_000_000 + 65])
    assert losses == pytest.approx(case["losses"], abs=1e-3), "they were recorded on another processor"


@needs_golden
def test_nanogpts_checkpoint_loads_and_computes_the_same() -> None:
    facts = json.loads(CHECKPOINT.with_suffix(".json").read_text())
    checkpoint = torch.load(CHECKPOINT, weights_only=True)
    model = GPT(GPTConfig(**checkpoint["model_args"])).eval()
    model.load_state_dict(checkpoint["model"], strict=True)

    tokens = read_train_tokens()
    rows = tokens[torch.arange(8)[:, None] * 997 + torch.arange(33)]
    with torch.no_grad():
        _, loss = model(rows[:, :-1], rows[:, 1:])
    assert loss.item() == pytest.approx(facts["eval"]["loss"], abs=1e-4)

    greedy = model.generate(torch.zeros((1, 1), dtype=torch.long), 80, temperature=0)
    assert greedy[0].tolist() == facts["greedy_from_token_0_80_new"]


def test_head_shares_the_embedding() -> None:
    model = tiny_gpt()
    assert model.lm_head.weight is model.transformer.wte.weight
    assert {"lm_head.weight", "transformer.wte.weight"} <= model.state_dict().keys()
    assert "lm_head.weight" not in dict(model.named_parameters())


def test_forward_without_targets_gives_the_last_position() -> None:
    model = tiny_gpt()
    idx = torch.randint(11, (3, 8))
    logits, loss = model(idx)
    all_logits, _ = model(idx, idx)
    assert loss is None
    assert logits.shape == (3, 1, 11)
    torch.testing.assert_close(logits[:, 0], all_logits[:, -1])


def test_targets_of_minus_one_do_not_count() -> None:
    model = tiny_gpt()
    idx = torch.randint(11, (2, 8))
    targets = idx.clone()
    targets[:, 4:] = -1
    _, loss = model(idx, targets)
    logits, _ = model(idx, idx)
    expected = torch.nn.functional.cross_entropy(logits[:, :4].reshape(-1, 11), idx[:, :4].reshape(-1))
    torch.testing.assert_close(loss, expected)


def test_attention_sees_no_later_position() -> None:
    model = tiny_gpt()
    idx = torch.randint(11, (1, 8))
    changed = idx.clone()
    changed[0, 5] = (idx[0, 5] + 1) % 11
    before, after = model(idx, idx)[0], model(changed, idx)[0]
    torch.testing.assert_close(before[:, :5], after[:, :5])
    assert not torch.allclose(before[:, 5:], after[:, 5:])


def test_dropout_works_in_training_only() -> None:
    model = tiny_gpt(dropout=0.5)
    idx = torch.randint(11, (2, 8))
    torch.testing.assert_close(model(idx)[0], model(idx)[0])
    model.train()
    assert not torch.allclose(model(idx)[0], model(idx)[0])


def test_model_can_be_built_without_memory() -> None:
    with torch.device("meta"):
        model = GPT(GPTConfig())
    assert model.lm_head.weight.is_meta
    assert model.get_num_params() == 124_475_904 - 1024 * 768 + 0


def test_optimizer_decays_matrices_only_and_is_fused_on_cpu() -> None:
    model = tiny_gpt()
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    decayed, others = optimizer.param_groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert all(p.dim() >= 2 for p in decayed["params"])
    assert all(p.dim() < 2 for p in others["params"])
    assert len(decayed["params"]) + len(others["params"]) == len(list(model.parameters()))
    assert decayed["fused"]
    assert others["fused"]
    assert optimizer.defaults["betas"] == (0.9, 0.95)


def test_generate_is_reproducible_beyond_the_block_size() -> None:
    model = tiny_gpt()
    start = torch.randint(11, (2, 3))

    def draw(seed: int) -> Tensor:
        return model.generate(start, 20, temperature=0.8, top_k=5, generator=torch.Generator().manual_seed(seed))

    assert draw(1).shape == (2, 23)
    assert torch.equal(draw(1)[:, :3], start)
    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


def test_generate_uses_the_global_seed_by_default() -> None:
    model = tiny_gpt()
    start = torch.zeros((1, 1), dtype=torch.long)
    torch.manual_seed(5)
    first = model.generate(start, 12)
    torch.manual_seed(5)
    assert torch.equal(first, model.generate(start, 12))


def test_top_1_is_greedy() -> None:
    model = tiny_gpt()
    start = torch.randint(11, (2, 3))
    assert torch.equal(model.generate(start, 12, top_k=1), model.generate(start, 12, temperature=0))


def test_stream_yields_what_generate_collects() -> None:
    model = tiny_gpt()
    start = torch.randint(11, (2, 3))
    tokens = list(model.generate_stream(start, 6, temperature=0))
    assert all(token.shape == (2, 1) for token in tokens)
    assert torch.equal(torch.cat((start, *tokens), dim=1), model.generate(start, 6, temperature=0))


def test_crop_keeps_the_first_positions() -> None:
    model = tiny_gpt()
    config = model.config
    idx = torch.randint(11, (2, 4))
    before, _ = model(idx)
    model.crop_block_size(4)
    assert (model.config.block_size, config.block_size) == (4, 8)
    assert model.state_dict()["transformer.wpe.weight"].shape == (4, 16)
    torch.testing.assert_close(model(idx)[0], before)
    with pytest.raises(ValueError, match="sequence of 5 tokens is longer than block_size=4"):
        model(torch.zeros((1, 5), dtype=torch.long))
    with pytest.raises(ValueError, match="block_size=4 to the larger 8"):
        model.crop_block_size(8)


def test_mfu_is_the_share_of_the_peak() -> None:
    model = tiny_gpt()
    flops_per_token = 6 * model.get_num_params() + 12 * 2 * 2 * 8 * 8
    assert model.estimate_mfu(10, dt=0.5, peak_flops=1e9) == pytest.approx(flops_per_token * 8 * 10 / 0.5 / 1e9)
    assert model.estimate_mfu(1, dt=1.0) == pytest.approx(flops_per_token * 8 / 312e12)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"n_embd": 10, "n_head": 3}, "n_embd=10 and n_head=3"),
        ({"n_layer": 0}, "n_layer must be a positive integer, got 0"),
        ({"vocab_size": None}, "vocab_size must be a positive integer, got None"),
        ({"dropout": 1.5}, "1.5"),
        ({"activation": "relu"}, "'relu'"),
    ],
)
def test_impossible_config_is_an_error(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GPTConfig(**{**TINY, **overrides})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"temperature": -1.0}, "-1.0"), ({"top_k": 0}, "top_k must be 1 or more, got 0")],
)
def test_impossible_sampling_is_an_error(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_gpt().generate(torch.zeros((1, 1), dtype=torch.long), 1, **arguments)


def test_generating_from_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"shape \(1, 0\)"):
        tiny_gpt().generate(torch.zeros((1, 0), dtype=torch.long), 1)
