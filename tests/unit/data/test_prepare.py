"""Prepare: nanoGPT's numbers, one text or many, and nothing lost by a second call."""

from __future__ import annotations

import json
import random
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from orchestrator.data import prepare as prepare_module
from orchestrator.data import texts, token_writer
from orchestrator.data.gpt2_vocabulary import load_gpt2_encoding
from orchestrator.data.prepare import PrepareConfig, PreparedInfo, prepare
from orchestrator.data.token_files import open_token_files
from orchestrator.data.tokenizers import CharTokenizer, GPT2Tokenizer
from orchestrator.errors import DataError

TINY_SHAKESPEARE = Path(__file__).resolve().parents[4] / "shared/data/tinyshakespeare.txt"
TEXT = "to be or not to be\n" * 30


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def tiny_shakespeare() -> str:
    if not TINY_SHAKESPEARE.exists():
        pytest.skip(f"Tiny Shakespeare is not at {TINY_SHAKESPEARE}")
    return str(TINY_SHAKESPEARE)


@pytest.fixture
def _no_network(monkeypatch) -> None:
    def no_network(*_args, **_kwargs):
        raise OSError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", no_network)


def prepare_in(folder: Path, name: str, *text: Path | str, tokenizer="char", overwrite=False) -> PreparedInfo:
    return prepare(PrepareConfig(name, tuple(map(str, text)), tokenizer, str(folder / "data"), overwrite))


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}


def test_shakespeare_char_has_nanogpts_numbers(tmp_path, tiny_shakespeare):
    info = prepare_in(tmp_path, "shakespeare_char", tiny_shakespeare, tokenizer=None)
    assert (info.meta.train_tokens, info.meta.val_tokens, info.meta.vocab_size) == (1_003_854, 111_540, 65)
    files = open_token_files(tmp_path / "data", "shakespeare_char")
    assert files.splits["train"][:5].tolist() == [18, 47, 56, 57, 58]  # "First"
    assert "train 1,003,854 tokens, val 111,540 tokens, char vocabulary of 65" in str(info)


@pytest.mark.usefixtures("_gpt2_vocabulary")
def test_shakespeare_has_nanogpts_numbers(tmp_path, tiny_shakespeare):
    info = prepare_in(tmp_path, "shakespeare", tiny_shakespeare, tokenizer=None)
    assert (info.meta.train_tokens, info.meta.val_tokens, info.meta.vocab_size) == (301_966, 36_059, 50_257)
    assert open_token_files(tmp_path / "data", "shakespeare").vocab_size is None


@pytest.mark.usefixtures("_no_network")
def test_prepared_shakespeare_needs_no_download(tmp_path, tiny_shakespeare):
    prepare_in(tmp_path, "shakespeare_char", tiny_shakespeare)
    assert prepare_in(tmp_path, "shakespeare_char").was_up_to_date


@pytest.mark.usefixtures("_no_network")
@pytest.mark.parametrize("name", ["shakespeare", "shakespeare_char"])
def test_shakespeare_without_a_network_says_both_remedies(tmp_path, name):
    with pytest.raises(DataError, match=rf"machine with a network .*prepare {name} --text FILE"):
        prepare_in(tmp_path, name)
    assert not (tmp_path / "data" / name).exists()


def test_download_of_something_else_is_refused(tmp_path, monkeypatch, source):
    real_open = urllib.request.urlopen
    monkeypatch.setattr(urllib.request, "urlopen", lambda _url, timeout: real_open(source.as_uri(), timeout=timeout))
    with pytest.raises(DataError, match="something else than Tiny Shakespeare"):
        prepare_in(tmp_path, "shakespeare_char")


@pytest.mark.usefixtures("_no_network")
@pytest.mark.parametrize("has_package", [True, False])
def test_quickstart_needs_neither_text_nor_network(tmp_path, monkeypatch, has_package):
    if not has_package:
        monkeypatch.setattr(texts.importlib.util, "find_spec", lambda _name: None)
    info = prepare_in(tmp_path, "quickstart", tokenizer=None)
    assert info.meta.tokenizer["kind"] == "char"
    assert info.meta.train_tokens > 300_000
    assert has_package or "pydoc_data.topics" in info.meta.source_name
    assert prepare_in(tmp_path, "quickstart", tokenizer=None).was_up_to_date


def test_split_is_by_characters_and_token_files_are_the_text(tmp_path, source):
    prepare_in(tmp_path, "mine", source)
    files = open_token_files(tmp_path / "data", "mine")
    parts = [files.tokenizer.decode(files.splits[split]) for split in ("train", "val")]
    assert parts == [TEXT[:513], TEXT[513:]]  # int(570 * 0.9)


def test_several_texts_globs_and_urls_are_joined_in_order(tmp_path):
    for name in ("b.txt", "a.txt", "c[1].txt"):
        (tmp_path / name).write_text(name[0] * 10)
    text = texts.read_texts([f"file://{tmp_path}/[ab].txt", str(tmp_path / "c[1].txt"), str(tmp_path / "a.txt")])
    assert text.content == "a" * 10 + "b" * 10 + "c" * 10 + "a" * 10


def test_remote_text_is_read_through_fsspec(tmp_path):
    import fsspec

    fsspec.filesystem("memory").pipe("/corpus/one.txt", TEXT.encode())
    assert prepare_in(tmp_path, "mine", "memory://corpus/*.txt").meta.train_tokens == 513


def test_line_ends_become_newlines(tmp_path):
    (tmp_path / "dos.txt").write_bytes(b"one\r\ntwo\rthree\n")
    assert texts.read_texts([str(tmp_path / "dos.txt")]).content == "one\ntwo\nthree\n"


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("missing.txt", "cannot read the text .*missing.txt"),
        ("*.md", r"--text .*\*\.md matches no file"),
        ("nosuch://bucket/text", "cannot read the text nosuch://"),
    ],
)
def test_text_that_cannot_be_read_is_named(tmp_path, pattern, message):
    path = pattern if "://" in pattern else str(tmp_path / pattern)
    with pytest.raises(DataError, match=message):
        texts.read_texts([path])


def test_bytes_that_are_not_utf8_are_located(tmp_path):
    path = tmp_path / "latin1.txt"
    path.write_bytes(b"caf\xe9 au lait")
    with pytest.raises(DataError, match=r"latin1\.txt: the byte 0xe9 at offset 3 is not UTF-8"):
        texts.read_texts([str(path)])


def test_other_name_needs_a_text(tmp_path):
    with pytest.raises(DataError, match="'mine' needs a text: --text"):
        prepare_in(tmp_path, "mine")


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/tmp/x"])
def test_name_must_be_a_folder_name(tmp_path, source, name):
    with pytest.raises(DataError, match="name of a folder"):
        prepare_in(tmp_path, name, source)


@pytest.mark.parametrize("content", ["", "x"])
def test_text_too_short_to_split_is_refused(tmp_path, source, content):
    source.write_text(content)
    with pytest.raises(DataError, match="too few to split"):
        prepare_in(tmp_path, "mine", source)


def test_second_call_does_nothing(tmp_path, source):
    assert not prepare_in(tmp_path, "mine", source).was_up_to_date
    before = snapshot(tmp_path / "data/mine")
    assert set(before) == {"train.bin", "val.bin", "meta.json"}
    info = prepare_in(tmp_path, "mine", source)
    assert info.was_up_to_date
    assert "up to date" in str(info)
    assert snapshot(tmp_path / "data/mine") == before


@pytest.mark.usefixtures("_gpt2_vocabulary")
@pytest.mark.parametrize("change", ["text", "tokenizer"])
def test_another_text_or_tokenizer_is_refused_unless_overwrite(tmp_path, source, change):
    prepare_in(tmp_path, "mine", source)
    before = snapshot(tmp_path / "data/mine")
    tokenizer = "gpt2" if change == "tokenizer" else "char"
    if change == "text":
        source.write_text(TEXT + "!")
    with pytest.raises(DataError, match=r"already holds char tokens of .*--overwrite"):
        prepare_in(tmp_path, "mine", source, tokenizer=tokenizer)
    assert snapshot(tmp_path / "data/mine") == before
    assert not prepare_in(tmp_path, "mine", source, tokenizer=tokenizer, overwrite=True).was_up_to_date
    assert open_token_files(tmp_path / "data", "mine").meta.tokenizer["kind"] == tokenizer


def test_nanogpts_own_folder_is_never_overwritten_unasked(tmp_path, source):
    folder = tmp_path / "data/mine"
    folder.mkdir(parents=True)
    for name in ("train.bin", "val.bin"):
        np.zeros(10, np.uint16).tofile(folder / name)
    (folder / "prepare.py").write_text("# mine\n")
    before = snapshot(folder)
    with pytest.raises(DataError, match=r"token files that nanoGPT made.*--overwrite"):
        prepare_in(tmp_path, "mine", source)
    assert snapshot(folder) == before
    prepare_in(tmp_path, "mine", source, overwrite=True)
    assert (folder / "prepare.py").exists()
    assert open_token_files(tmp_path / "data", "mine").meta is not None


def test_damaged_dataset_of_the_same_text_is_prepared_again(tmp_path, source, caplog):
    prepare_in(tmp_path, "mine", source)
    path = tmp_path / "data/mine/train.bin"
    path.write_bytes(path.read_bytes()[:-2])
    assert not prepare_in(tmp_path, "mine", source).was_up_to_date
    assert "meta.json says 513" in caplog.text
    assert prepare_in(tmp_path, "mine", source).was_up_to_date


def test_unreadable_meta_needs_overwrite(tmp_path, source):
    prepare_in(tmp_path, "mine", source)
    (tmp_path / "data/mine/meta.json").write_text("{")
    with pytest.raises(DataError, match=r"damaged .*--overwrite"):
        prepare_in(tmp_path, "mine", source)
    prepare_in(tmp_path, "mine", source, overwrite=True)


@pytest.mark.parametrize("dies_at", [0, 1, 2, 3])
@pytest.mark.parametrize("had_dataset", [False, True])
def test_interrupted_preparation_is_never_read_as_a_dataset(tmp_path, monkeypatch, source, dies_at, had_dataset):
    folder = tmp_path / "data/mine"
    if had_dataset:
        prepare_in(tmp_path, "mine", source)
        source.write_text(TEXT.upper())  # as many tokens, other ones
    real_replace, calls = Path.replace, []

    def replace_until(self, target):
        calls.append(target)
        if len(calls) > dies_at:
            raise KeyboardInterrupt
        return real_replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", replace_until)
        with pytest.raises(KeyboardInterrupt):
            prepare_in(tmp_path, "mine", source, overwrite=True)
    assert len(calls) == dies_at + 1  # of four: the mark, two splits, meta.json

    if dies_at == 0 and had_dataset:
        files = open_token_files(tmp_path / "data", "mine")
        assert files.tokenizer.decode(files.splits["train"]) == TEXT[:513]
    else:
        with pytest.raises(DataError, match=r"did not finish|train\.bin is missing"):
            open_token_files(tmp_path / "data", "mine")
        prepare_in(tmp_path, "mine", source)  # goes on without being told to overwrite
        assert open_token_files(tmp_path / "data", "mine").tokenizer is not None
    assert not [path for path in folder.iterdir() if path.name.endswith("bin.tmp")]


def test_missing_vocabulary_leaves_nothing_behind(tmp_path, monkeypatch, source):
    def fail(*_args, **_kwargs):
        raise DataError("no vocabulary")

    monkeypatch.setattr(prepare_module.GPT2Tokenizer, "encode", fail)
    with pytest.raises(DataError, match="no vocabulary"):
        prepare_in(tmp_path, "mine", source, tokenizer="gpt2")
    assert not (tmp_path / "data").exists()


@pytest.mark.usefixtures("_gpt2_vocabulary")
def test_pieces_have_the_ids_of_one_encoding(tmp_path, monkeypatch):
    monkeypatch.setattr(token_writer, "CHUNK_CHARACTERS", 5)
    chance = random.Random(0)
    alphabet = ["\n", "\n", " ", "\r", "\t", "\x0b", "\x1c", "\x85", "\u2028", "\u3000", "a", "don't", "'", "ll", "1",
                "23", "!", "é", "日", "\U0001f680", "\u0301", "<|endoftext|>"]  # fmt: skip
    for _ in range(300):
        text = "".join(chance.choices(alphabet, k=60))
        pieces = list(token_writer.chunks(text, 5))
        assert "".join(text[start:stop] for start, stop in pieces) == text
        ids = [token for start, stop in pieces for token in GPT2Tokenizer().encode(text[start:stop]).tolist()]
        assert ids == load_gpt2_encoding().encode_ordinary(text), repr(text)
    n_tokens = token_writer.write_tokens(tmp_path / "x.bin", TEXT, GPT2Tokenizer())
    assert np.fromfile(tmp_path / "x.bin", "<u2").tolist() == load_gpt2_encoding().encode_ordinary(TEXT)
    assert n_tokens == len(load_gpt2_encoding().encode_ordinary(TEXT))
    assert len(list(token_writer.chunks(TEXT, 5))) > 20


def test_long_work_reports_progress(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(token_writer, "_PROGRESS_EVERY_S", -1.0)
    with caplog.at_level("INFO"):
        token_writer.write_tokens(tmp_path / "x.bin", TEXT, CharTokenizer.of_text(TEXT))
    assert "of 0 million characters" in caplog.text


def test_meta_json_is_plain(tmp_path, source):
    prepare_in(tmp_path, "mine", source)
    meta = json.loads((tmp_path / "data/mine/meta.json").read_text())
    assert meta["format_version"] == 1
    assert meta["tokenizer"] == {"kind": "char", "chars": "\n benort"}
    assert meta["dtype"] == "uint16"
    assert len(meta["source_sha256"]) == 64
