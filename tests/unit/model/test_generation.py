"""Sampling with a cache: the tokens of a model that reads the whole text again for each; draws; the layers used."""

from __future__ import annotations

import shutil
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from model import GPT, GPTConfig
from model.cache import KVCache
from model.generation import ROUNDING, Reader, SamplingPolicy, choose, draw, is_clear, skip_draws
from model.linear import Copies, Linear, has_onednn

SMALL: dict[str, Any] = {"n_layer": 3, "n_head": 4, "n_embd": 64, "block_size": 48, "vocab_size": 97}
WIDE: dict[str, Any] = {
    "n_layer": 2,
    "n_head": 8,
    "n_embd": 512,
    "block_size": 24,
    "vocab_size": 1031,
}  # Linear in parts
SHAPES = pytest.mark.parametrize("shape", [SMALL, WIDE], ids=["small", "wide"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def new_gpt(shape: dict[str, Any], dtype: torch.dtype = torch.float32, seed: int = 0) -> GPT:
    """Return a model that is surer of its tokens than one with fresh weights, and does not repeat itself."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**shape))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(1 if ".ln_" in name else 30 if ".wpe." in name else 3)  # where it is decides what comes
    return model.to(dtype).eval()


@torch.no_grad()
def uncached(model: GPT, idx: Tensor, n_tokens: int) -> Tensor:
    """Continue greedily as nanoGPT does."""
    for _ in range(n_tokens):
        logits, _ = model(idx[:, -model.config.block_size :])
        idx = torch.cat((idx, logits[:, -1].argmax(dim=-1, keepdim=True)), dim=1)
    return idx


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # torch and its compiler warn of themselves
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("n_prompts", [1, 3])
def test_a_compiled_model_chooses_the_same_tokens(n_prompts: int) -> None:
    prompts = torch.randint(WIDE["vocab_size"], (n_prompts, 5))
    compiled = new_gpt(WIDE)
    compiled.compile()
    assert torch.equal(compiled.generate(prompts, 15, temperature=0), uncached(new_gpt(WIDE), prompts, 15))


@SHAPES
@DTYPES
@pytest.mark.parametrize("n_prompts", [1, 3])
def test_greedy_tokens_are_those_of_the_uncached_model(
    shape: dict[str, Any], dtype: torch.dtype, n_prompts: int
) -> None:
    model = new_gpt(shape, dtype)
    prompts = torch.randint(shape["vocab_size"], (n_prompts, 5))
    n_tokens = shape["block_size"] + 10  # beyond the context too, where the oldest token is cut off
    found = model.generate(prompts, n_tokens, temperature=0)
    assert torch.equal(found, uncached(model, prompts, n_tokens))
    assert len(found[0, 5:].unique()) > 3, "a model that repeats itself would show little"


@SHAPES
@DTYPES
@torch.no_grad()
def test_the_cache_rounds_by_less_than_is_allowed_for(shape: dict[str, Any], dtype: torch.dtype) -> None:
    worst = 0.0
    for seed in range(3):
        model = new_gpt(shape, dtype, seed)
        idx = torch.randint(shape["vocab_size"], (2, shape["block_size"]))
        reader = Reader(model, 2, shape["block_size"])
        reader.read(idx[:, :1])
        assert not reader.is_approximate
        for length in range(2, shape["block_size"] + 1):
            remembered = reader.read(idx[:, :length]).float()
            whole = model(idx[:, :length])[0][:, -1].float()
            assert reader.is_approximate
            worst = max(worst, float((remembered - whole).abs().max() / whole.abs().max()))
    assert 0 < worst < ROUNDING[dtype] / 2, "two logits may move towards each other"


def test_where_two_tokens_are_as_likely_a_whole_pass_decides() -> None:
    model = new_gpt(SMALL)
    with torch.no_grad():
        model.lm_head.weight[1::2] = model.lm_head.weight[:-1:2]  # every token has a twin
    idx = torch.randint(SMALL["vocab_size"], (1, 5))
    assert not is_clear(model(idx)[0][:, -1])
    with mock.patch.object(Reader, "reread", autospec=True, side_effect=Reader.reread) as reread:
        found = model.generate(idx, 20, temperature=0)
    assert reread.call_count >= 20
    assert torch.equal(found, uncached(model, idx, 20))


def test_whole_passes_are_few() -> None:
    model = new_gpt(SMALL)
    with mock.patch.object(Reader, "reread", autospec=True, side_effect=Reader.reread) as reread:
        model.generate(torch.randint(SMALL["vocab_size"], (1, 5)), 40, temperature=0)
    assert reread.call_count <= 4, "the prompt, and what rounding could decide"


def test_a_row_is_drawn_alike_alone_and_beside_others() -> None:
    model = new_gpt(SMALL)
    prompt = torch.randint(SMALL["vocab_size"], (1, 5))

    def draw(seeds: list[int]) -> Tensor:
        own = [torch.Generator().manual_seed(seed) for seed in seeds]
        return model.generate(prompt.expand(len(seeds), -1), 60, 1.0, 50, own, top_p=0.95)

    together = draw([1, 2, 3])
    for row, seed in enumerate((1, 2, 3)):
        assert torch.equal(together[row], draw([seed])[0])
    assert not torch.equal(together[0], together[1])


def test_a_stream_ends_when_every_row_has_ended() -> None:
    model, end = new_gpt(SMALL), 0
    prompts = torch.randint(1, SMALL["vocab_size"], (2, 5))
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    tokens = torch.cat(list(model.generate_stream(prompts, 4000, 2.0, generator=generators, end=end)), dim=1)
    assert tokens.size(1) < 4000
    firsts = [int((row == end).nonzero()[0]) for row in tokens]
    assert max(firsts) == tokens.size(1) - 1
    assert min(firsts) < max(firsts), "one row has waited for the other"


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(0.05, {2}), (0.49, {2}), (0.51, {2, 0}), (0.79, {2, 0}), (0.81, {2, 0, 3}), (0.999, {0, 1, 2, 3})],
)
def test_top_p_draws_from_the_fewest_that_have_it(top_p: float, kept: set[int]) -> None:
    logits = torch.tensor([[0.3, 0.05, 0.5, 0.15]]).log()
    generator = torch.Generator().manual_seed(0)
    drawn = [int(choose(logits, SamplingPolicy(top_p=top_p), generator)) for _ in range(400)]
    assert set(drawn) == kept
    share = drawn.count(2) / len(drawn)
    assert share == pytest.approx(0.5 / float(logits.exp()[0, sorted(kept)].sum()), abs=0.08), (
        "as likely as among these"
    )


def test_top_p_comes_after_top_k() -> None:
    logits = torch.tensor([[0.3, 0.05, 0.5, 0.15]]).log()
    generator = torch.Generator().manual_seed(0)
    drawn = {int(choose(logits, SamplingPolicy(top_k=2, top_p=0.7), generator)) for _ in range(200)}
    assert drawn == {0, 2}, "of the two, the likelier has 0.625"


@pytest.mark.parametrize("top_k", [None, 7])
def test_skipped_draws_leave_the_generator_as_draws_do(top_k: int | None) -> None:
    logits, drawn, skipped = torch.randn(1, 311), torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    for _ in range(25):
        choose(logits, SamplingPolicy(0.8, top_k), drawn)
    skip_draws(skipped, 25, 311)
    assert torch.equal(drawn.get_state(), skipped.get_state())


def test_a_cache_takes_a_prompt_then_single_tokens() -> None:
    model = new_gpt(SMALL)
    cache = KVCache.empty(model.config, 1, 8, model.lm_head.weight)
    with torch.no_grad():
        model(torch.zeros((1, 6), dtype=torch.long), cache=cache)
        with pytest.raises(ValueError, match="one token at a time"):
            model(torch.zeros((1, 2), dtype=torch.long), cache=cache)
        for _ in range(2):
            model(torch.zeros((1, 1), dtype=torch.long), cache=cache)
        with pytest.raises(ValueError, match="room for 0 more"):
            model(torch.zeros((1, 1), dtype=torch.long), cache=cache)
    cache.clear()
    assert cache.length == 0


@pytest.mark.parametrize("out_features", [2048, 2017])
@pytest.mark.parametrize("shape", [(1,), (1, 1), (3, 1), (2, 4), (32, 1), (33, 1)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_a_large_layer_multiplies_few_rows_another_way(
    out_features: int, shape: tuple[int, ...], has_bias: bool
) -> None:
    torch.manual_seed(0)
    layer, x = Linear(512, out_features, bias=has_bias), torch.randn(*shape, 512)
    usual = F.linear(x, layer.weight, layer.bias)
    assert torch.equal(layer(x), usual), "with gradients it is nn.Linear"
    with torch.no_grad(), mock.patch.object(nn.Linear, "forward") as forward:
        found = layer(x)
    if x.numel() // 512 > 32:
        assert forward.called
        return
    assert not forward.called
    assert found.shape == usual.shape
    torch.testing.assert_close(found, usual, rtol=1e-5, atol=1e-6)


def test_this_torch_has_the_operators_that_are_not_documented() -> None:
    assert has_onednn(), "several prompts at once are multiplied at half the speed: look for their new names"


@torch.no_grad()
def test_copies_of_weights_are_for_several_rows_and_for_the_time_of_a_with() -> None:
    torch.manual_seed(0)
    layer, x = Linear(512, 2048), torch.randn(4, 1, 512)
    plain = layer(x)
    with Copies([layer], 1):
        assert layer.copy is None
    with Copies([layer], 4):
        assert layer.copy is not None
        layer.weight, weight = nn.Parameter(torch.zeros_like(layer.weight)), layer.weight
        torch.testing.assert_close(layer(x), plain, rtol=1e-5, atol=1e-6)
        layer.weight = weight
    assert layer.copy is None
    with mock.patch("model.linear._MOST_COPIED_BYTES", layer.weight.nbytes - 1), Copies([layer], 4):
        assert layer.copy is None


@torch.no_grad()
def test_without_those_operators_a_layer_is_plain() -> None:
    layer, x = Linear(512, 2048), torch.randn(4, 512)
    with mock.patch("model.linear.has_onednn", return_value=False), Copies([layer], 4):
        assert torch.equal(layer(x), nn.Linear.forward(layer, x))


@torch.no_grad()
def test_other_layers_are_plain() -> None:
    torch.manual_seed(0)
    for layer, x in (
        (Linear(64, 64), torch.randn(1, 64)),
        (Linear(512, 2048).bfloat16(), torch.randn(1, 512).bfloat16()),
        (Linear(512, 2048), torch.randn(0, 512)),
    ):
        assert torch.equal(layer(x), nn.Linear.forward(layer, x))
    with torch.autocast("cpu", torch.bfloat16):
        assert Linear(512, 2048)(torch.randn(1, 512)).dtype == torch.bfloat16


@pytest.mark.parametrize("vocab_size", [1, 7, 65, 1000, 50304])
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_draws_are_those_of_multinomial(vocab_size: int, rows: int) -> None:
    logits = 3 * torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(vocab_size))
    for logits_of in (logits, logits.masked_fill(logits < logits.topk(min(5, vocab_size)).values[:, -1:], -torch.inf)):
        probabilities = logits_of.softmax(dim=-1)
        theirs, ours = ([torch.Generator().manual_seed(seed) for seed in range(rows)] for _ in range(2))
        for _ in range(3):
            each = zip(probabilities, theirs, strict=True)
            expected = torch.stack([torch.multinomial(row, 1, generator=own) for row, own in each])
            assert torch.equal(draw(probabilities, ours), expected)
        assert torch.equal(draw(probabilities, ours[0]), torch.multinomial(probabilities, 1, generator=theirs[0]))
        assert all(torch.equal(a.get_state(), b.get_state()) for a, b in zip(ours, theirs, strict=True))


def test_all_rows_are_drawn_at_once_and_nothing_is_read_from_the_device() -> None:
    called: list[str] = []

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            called.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    generators = [torch.Generator().manual_seed(seed) for seed in range(8)]
    with Calls():
        draw(torch.full((8, 65), 1 / 65), generators)
    assert (called.count("exponential_"), called.count("div"), called.count("argmax")) == (8, 1, 1)
    assert not {"_local_scalar_dense", "multinomial"} & set(called)


@pytest.mark.parametrize("temperature", [1e-20, 1e-39, 5e-324])
def test_a_temperature_next_to_zero_takes_the_likeliest(temperature: float) -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0], [-5.0, -7.0, -6.0]])
    assert choose(logits, SamplingPolicy(temperature), None).flatten().tolist() == [1, 0]
