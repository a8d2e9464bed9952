"""What people's meta.pkl and meta.json say: words, numpy's numbers, keys of other programs, and nothing that runs."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestrator.data.token_files import TokenFiles, open_token_files, read_tokenizer
from orchestrator.data.tokenizers import CharTokenizer, GPT2Tokenizer, tokenizer_from_json
from orchestrator.data.word_tokenizer import WordTokenizer
from orchestrator.errors import DataError

WORDS = ["the ", "quick ", "brown ", "fox", "\n", "the "]


def folder_of(data_dir: Path, meta: Any = None, plain: Any = None, dtype: str = "<u2", protocol: int = 4) -> TokenFiles:
    """Write a dataset as a script of somebody's does, and open it."""
    folder = data_dir / "mine"
    folder.mkdir(exist_ok=True)
    for split in ("train", "val"):
        (np.arange(200) % 3).astype(dtype).tofile(folder / f"{split}.bin")
    if meta is not None:
        (folder / "meta.pkl").write_bytes(pickle.dumps(meta, protocol))
    if plain is not None:
        (folder / "meta.json").write_bytes(plain if isinstance(plain, bytes) else json.dumps(plain).encode())
    return open_token_files(data_dir, "mine")


def test_itos_of_words_is_joined_and_encodes_by_the_longest_entry(tmp_path):
    itos = dict(enumerate([*WORDS, "the quick "]))
    files = folder_of(tmp_path, {"vocab_size": 7, "itos": itos})
    assert files.vocab_size == 7
    assert files.tokenizer.decode([0, 1, 2, 3, 4, 7]) == "the quick brown fox\n\N{REPLACEMENT CHARACTER}"
    assert files.tokenizer.encode("the brown the quick fox").tolist() == [0, 2, 6, 3]
    assert files.tokenizer.sizes_bytes().tolist() == [4, 6, 6, 3, 1, 4, 10]
    with pytest.raises(DataError, match=r"no entry of the vocabulary fits 'dog' at position 4; its 7 entries .*'fox'"):
        files.tokenizer.encode("the dog")
    assert tokenizer_from_json(json.loads(json.dumps(files.tokenizer.to_json()))) == files.tokenizer


def test_what_stoi_spells_otherwise_is_kept(tmp_path):
    meta = {"itos": ["a", "b", "a"], "stoi": {"A": 0, "a": 2, "b": 1, "": 1}, "vocab_size": 3}
    tokenizer = folder_of(tmp_path, meta).tokenizer
    assert tokenizer == WordTokenizer(("a", "b", "a"), (("A", 0), ("a", 2)))
    assert tokenizer.encode("aAb").tolist() == [2, 0, 1]
    assert tokenizer_from_json(tokenizer.to_json()) == tokenizer
    assert tokenizer.to_json() != WordTokenizer(("a", "b", "a")).to_json()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("integer", [np.int64, np.int32, np.uint16, np.dtype(">i4").type])
def test_numpys_numbers_and_strings_are_taken(tmp_path, protocol, integer):
    itos = {integer(i): np.str_(char) for i, char in enumerate("\nab")}
    meta = {"vocab_size": integer(3), "itos": itos, "stoi": {char: i for i, char in itos.items()}}
    files = folder_of(tmp_path, meta, protocol=protocol)
    assert (files.vocab_size, files.tokenizer) == (3, CharTokenizer("\nab"))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_other_plain_keys_are_left_out_with_a_note(tmp_path, caplog, protocol):
    others = {"seed": 1, "split": 0.9, "files": ["a"], "ok": True, "none": None, "raw": b"\xff", "pair": (1, 2)}
    others |= {"names": {"x"}, "more": frozenset({1}), "rate": np.float64(0.5), "z": 1}
    with caplog.at_level("INFO"):
        files = folder_of(tmp_path, {"vocab_size": 3, "itos": list("\nab"), **others}, protocol=protocol)
    assert (files.vocab_size, files.tokenizer) == (3, CharTokenizer("\nab"))
    assert "not used here: seed, split, files, ok, none, raw, pair, names, ..." in caplog.text


class Malicious:
    def __reduce__(self):
        return (Path.touch, (Path("pwned"),))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    "value",
    [Malicious(), np.arange(3), np.array([None]), np.datetime64(0, "s"), np.dtype([("a", "i4")]), complex(1, 2)],
)
def test_what_asks_for_more_than_plain_values_is_refused(tmp_path, monkeypatch, protocol, value):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"it asks for .*nothing in it was run"):
        folder_of(tmp_path, {"vocab_size": 3, "extra": value}, protocol=protocol)
    assert not Path("pwned").exists()


@pytest.mark.parametrize(
    "pickled",
    [
        b"cnumpy\ndtype\n(S'O8'\ntR.",
        b"cnumpy\ndtype\n(S'i4'\nI00\nI01\ntR(I3\nS'<'\nNNNI-1\nI-1\nI0\ntb.",
        b"cnumpy\ndtype\n(S'i4'\ntRNb.",
        b"cnumpy._core.multiarray\nscalar\n(cnumpy\ndtype\n(S'i4'\ntRS'abc'\ntR.",
        b"cnumpy._core.multiarray\nscalar\n(cnumpy\ndtype\n(S'i4'\ntRS''\ntR.",
        b"cnumpy._core.multiarray\nscalar\n(I1\nI2\ntR.",
        b"c_codecs\nencode\n(I1\nS'latin1'\ntR.",
        b"cbuiltins\neval\n.",
    ],
)
def test_pickles_that_misuse_what_is_allowed_are_refused(tmp_path, pickled):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/meta.pkl").write_bytes(pickled)
    with pytest.raises(DataError, match=r"meta\.pkl"):
        read_tokenizer(tmp_path, "mine")


@pytest.mark.parametrize(
    ("itos", "why"),
    [
        ({0: b"a", 1: b"b"}, r"has bytes in itos \(id 0\), not text"),
        ([["a"], ["b"]], "has list in itos"),
        ({}, "has an itos without any text"),
        ("ab", "has an itos without any text"),
    ],
)
def test_itos_without_text_trains_and_sampling_says_why_it_cannot(tmp_path, caplog, itos, why):
    with caplog.at_level("INFO"):
        files = folder_of(tmp_path, {"vocab_size": 3, "itos": itos})
    assert (files.vocab_size, files.tokenizer) == (3, None)
    assert "samples cannot be shown as text" in caplog.text
    with pytest.raises(DataError, match=rf"its meta\.pkl {why}.*, so token ids cannot be turned into text"):
        read_tokenizer(tmp_path, "mine")


def test_ids_without_an_entry_show_as_such(tmp_path):
    tokenizer = folder_of(tmp_path, {"vocab_size": 4, "itos": {0: "a", 2: "b"}}).tokenizer
    assert tokenizer.decode([0, 1, 2, 3]) == "a\N{REPLACEMENT CHARACTER}b\N{REPLACEMENT CHARACTER}"
    assert tokenizer_from_json(json.loads(json.dumps(tokenizer.to_json()))) == tokenizer


def test_the_size_may_follow_from_the_entries(tmp_path):
    assert folder_of(tmp_path, {"itos": {0: "a", 1: "b", 2: "c"}}).vocab_size == 3
    assert folder_of(tmp_path, {"stoi": {"a": 0, "b": 1, "c": 2}}).tokenizer == CharTokenizer("abc")


def test_a_vocabulary_beyond_uint16_must_state_its_width(tmp_path):
    with pytest.raises(DataError, match=r'says vocab_size=70,000, and nothing says how wide .*"dtype": "uint32"'):
        folder_of(tmp_path, {"vocab_size": 70_000})
    files = folder_of(tmp_path, {"vocab_size": 70_000}, {"dtype": "uint32"}, "<u4")
    assert (files.vocab_size, files.splits["train"][:4].tolist()) == (70_000, [0, 1, 2, 0])
    assert folder_of(tmp_path, {"vocab_size": 65_536}, {"vocab_size": 65_536}).vocab_size == 65_536


@pytest.mark.parametrize(
    ("said", "dtype"), [("int64", "<i8"), ("uint8", "u1"), ("int32", "<i4"), (">u2", ">u2"), ("uint16", "<u2")]
)
def test_a_stated_width_is_taken(tmp_path, said, dtype):
    files = folder_of(tmp_path, None, {"vocab_size": 3, "dtype": said}, dtype)
    assert files.splits["val"][:4].tolist() == [0, 1, 2, 0]
    files.check_fits(block_size=8, vocab_size=3)


def test_negative_tokens_are_outside_the_vocabulary(tmp_path):
    files = folder_of(tmp_path, None, {"vocab_size": 3, "dtype": "int16"})
    np.full(200, -1, "<i2").tofile(tmp_path / "mine/val.bin")
    with pytest.raises(DataError, match="token -1 at position 0 is outside"):
        files.check_fits(block_size=8, vocab_size=3)


def test_somebody_elses_meta_json_is_taken_where_it_is_clear(tmp_path, caplog):
    assert folder_of(tmp_path, None, b'\xef\xbb\xbf{"vocab_size": 300}').vocab_size == 300
    with caplog.at_level("INFO"):
        files = folder_of(tmp_path, None, {"vocab_size": 3.0, "itos": {"0": "a", "1": "b", "2": "c"}, "author": "me"})
    assert (files.vocab_size, files.tokenizer) == (3, CharTokenizer("abc"))
    assert "meta.json: not used here: author" in caplog.text
    files = folder_of(tmp_path, None, {"dtype": "uint16"})
    assert (files.vocab_size, files.tokenizer) == (None, GPT2Tokenizer())


@pytest.mark.parametrize(
    ("plain", "message"),
    [
        ({"size": 3}, "says no vocab_size"),
        ({"vocab_size": "300"}, "says vocab_size='300'"),
        ({"vocab_size": 3, "dtype": "float32"}, "dtype 'float32' is none of"),
        ({"vocab_size": 3, "dtype": 16}, "dtype 16 is none of"),
        ([300], "must hold a dict with vocab_size"),
        (b"\xff\xfe", "is damaged"),
        (b"[" * 100_000, "is damaged"),
    ],
)
def test_meta_json_that_is_unclear_is_refused(tmp_path, plain, message):
    with pytest.raises(DataError, match=rf"meta\.json.*{message}"):
        folder_of(tmp_path, None, plain)


def test_a_size_that_cannot_be_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"meta\.pkl says vocab_size=int too long to be shown"):
        folder_of(tmp_path, {"vocab_size": 10**5000, 10**5000: 1})


def test_an_itos_far_smaller_than_its_size_is_no_list_to_fill(tmp_path):
    meta = {"vocab_size": 4_000_000_000, "itos": ["a"]}
    files = folder_of(tmp_path, meta, {"vocab_size": 4_000_000_000, "dtype": "uint32"}, "<u4")
    assert files.tokenizer is None
