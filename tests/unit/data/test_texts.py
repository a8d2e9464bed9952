"""Texts as people have them: byte order marks, other encodings, files that are no text, and ends of text in them."""

from __future__ import annotations

import gzip
import io
import json
import random
import zipfile
from pathlib import Path

import numpy as np
import pytest

from orchestrator.__main__ import main
from orchestrator.data import token_writer
from orchestrator.data.gpt2_vocabulary import load_gpt2_encoding
from orchestrator.data.prepare import PrepareConfig, PreparedInfo, prepare
from orchestrator.data.texts import Text, read_texts
from orchestrator.data.token_files import open_token_files
from orchestrator.data.token_writer import encode, write_documents, write_tokens
from orchestrator.data.tokenizers import GPT2Tokenizer
from orchestrator.errors import DataError

END = "<|endoftext|>"
TEXT = "to be or not to be\n" * 30


def written(folder: Path, name: str, content: bytes | str) -> str:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def prepare_in(folder: Path, *text: str, **settings) -> PreparedInfo:
    return prepare(PrepareConfig("mine", text, data_dir=str(folder / "data"), **settings))


def tokens_of(folder: Path, split: str) -> list[int]:
    return open_token_files(folder / "data", "mine").splits[split].tolist()


def test_a_byte_order_mark_is_no_text_in_any_file(tmp_path):
    first = written(tmp_path, "a.txt", b"\xef\xbb\xbfone\n")
    second = written(tmp_path, "b.txt", b"\xef\xbb\xbftwo\xef\xbb\xbf\n")
    text = read_texts([first, second])
    assert text.content == "one\ntwo\ufeff\n"  # within a text it is a character, U+FEFF
    assert prepare_in(tmp_path, first, first, first, tokenizer="char").meta.tokenizer["chars"] == "\neno"


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-16-be", "utf-32-be", "utf-16-le", "utf-32-le"])
def test_a_mark_of_another_encoding_is_believed(tmp_path, encoding, caplog):
    content = "Größe\r\n日本 \U0001f680\n"
    mark = "" if encoding in ("utf-16", "utf-32") else "\ufeff"
    with caplog.at_level("INFO"):
        assert read_texts([written(tmp_path, "a.txt", (mark + content).encode(encoding))]).content == (
            "Größe\n日本 \U0001f680\n"
        )
    assert f"a.txt: read as {encoding[:6].upper()}, which its byte order mark says" in caplog.text


def test_wide_characters_without_a_mark_are_refused_with_the_command(tmp_path):
    for order in ("LE", "BE"):
        path = written(tmp_path, "a.txt", "plain words".encode(f"utf-16-{order}"))
        with pytest.raises(
            DataError, match=rf"a\.txt: 11 of its 22 characters are NUL.*iconv -f UTF-16{order} -t UTF-8"
        ):
            read_texts([path])


def test_a_cut_file_of_wide_characters_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"a\.txt: the byte 0x.. at offset .* is not UTF-16"):
        read_texts([written(tmp_path, "a.txt", "words".encode("utf-16")[:-1])])


def test_few_nuls_are_characters_with_a_warning(tmp_path, caplog):
    assert len(read_texts([written(tmp_path, "a.txt", TEXT + "\0" + TEXT)]).content) == 2 * len(TEXT) + 1
    assert f"1 NUL characters (the first at {len(TEXT)}) are taken as they are" in caplog.text


def zipped() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as opened:
        opened.writestr("a.txt", TEXT)
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gzip.compress(TEXT.encode()), "is a gzip file, not text; unpack it first: gunzip"),
        (zipped(), "is a zip file, not text; unpack it first: unzip"),
        (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", "is a PDF, not text; take its text out first: pdftotext"),
        (b"PAR1\x15\x04", "is a parquet file, not text; `prepare openwebtext --text FILE`"),
        (b"BZh91AY&SY\x00", "is a bzip2 file, not text; unpack it first: bunzip2"),
        (b"\x28\xb5\x2f\xfd\x00", "is a zstd file, not text; unpack it first: unzstd"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "is an old Word document, not text"),
        (b"\x89PNG\r\n\x1a\n", "the byte 0x89 at offset 0 is not UTF-8"),
    ],
    ids=lambda value: value if isinstance(value, str) else "file",  # bytes of now would name a test anew each time
)
def test_files_that_are_no_text_are_refused_by_name(tmp_path, content, message):
    with pytest.raises(DataError, match=rf"odd\.txt:? {message}"):
        prepare_in(tmp_path, written(tmp_path, "odd.txt", content))
    assert not (tmp_path / "data").exists()


def test_a_folder_is_refused_with_the_glob_and_a_glob_takes_files_alone(tmp_path):
    (tmp_path / "books/more.txt").mkdir(parents=True)
    written(tmp_path, "books/a.txt", TEXT)
    with pytest.raises(DataError, match=r"--text .*/books/ is a folder: give '.*/books/\*\.txt'"):
        read_texts([f"{tmp_path}/books/"])
    assert read_texts([f"{tmp_path}/books/*.txt"]).content == TEXT


def test_an_empty_file_is_said(tmp_path, caplog):
    empty = written(tmp_path, "empty.txt", b"")
    assert read_texts([empty, written(tmp_path, "a.txt", TEXT)]).content == TEXT
    assert "empty.txt is empty" in caplog.text
    with pytest.raises(DataError, match="has 0 characters, too few to split"):
        prepare_in(tmp_path, empty, tokenizer="char")


def test_where_each_file_begins_is_known_and_a_line_end_across_two_is_one(tmp_path):
    names = [written(tmp_path, f"{i}.txt", part) for i, part in enumerate([b"a\r", b"\nb\r\n", b"", b"c"])]
    assert read_texts(names) == Text(", ".join(names), read_texts(names).sha256, "a\nb\nc", (0, 2, 4, 4))
    assert read_texts(names).documents == ["a\n", "b\n", "", "c"]


@pytest.mark.usefixtures("_gpt2_vocabulary")
def test_an_end_of_text_is_text_unless_asked_and_is_always_counted(tmp_path, caplog):
    caplog.set_level("INFO")
    path = written(tmp_path, "a.txt", f"{TEXT}{END}" * 5)
    prepare_in(tmp_path, path)
    assert f"{END}: 5 in the text, encoded as text like any other" in caplog.text
    assert "--end_of_text puts the end-of-text token in both places" in caplog.text
    assert 50256 not in tokens_of(tmp_path, "train") + tokens_of(tmp_path, "val")
    with pytest.raises(DataError, match=r"already holds gpt2 tokens of .*, not gpt2 tokens of this text with end-of-"):
        prepare_in(tmp_path, path, end_of_text=True)
    assert prepare_in(tmp_path, path, end_of_text=True, overwrite=True).meta.end_of_text
    assert f"{END}: 5 in the text; the end-of-text token stands there and nowhere else" in caplog.text
    assert tokens_of(tmp_path, "train").count(50256) + tokens_of(tmp_path, "val").count(50256) == 5
    assert prepare_in(tmp_path, path, end_of_text=True).was_up_to_date
    caplog.clear()
    prepare_in(tmp_path, written(tmp_path, "b.txt", TEXT), overwrite=True)
    assert f"{END}: 0 in the text" in caplog.text


@pytest.mark.usefixtures("_gpt2_vocabulary")
def test_files_are_parted_by_one_end_of_text(tmp_path):
    names = [written(tmp_path, f"{i}.txt", part) for i, part in enumerate(["one", f"two{END}\n", "three", "four" * 50])]
    prepare_in(tmp_path, *names, end_of_text=True)
    tokens = tokens_of(tmp_path, "train") + tokens_of(tmp_path, "val")
    assert GPT2Tokenizer().decode(tokens) == f"one{END}two{END}\nthree{END}" + "four" * 50
    other = written(tmp_path, "other.txt", "onetwo")
    assert read_texts(names[:2]).documents_sha256 != read_texts([other]).documents_sha256


@pytest.mark.usefixtures("_gpt2_vocabulary")
@pytest.mark.parametrize("length", range(86, 104))
def test_the_split_never_cuts_an_end_of_text(tmp_path, length):
    content = f"{'x' * (length - 13)}{END}{'y' * 12}"  # nine tenths of it end before, in or after the end of text
    prepare_in(tmp_path, written(tmp_path, "a.txt", content), end_of_text=True)
    parts = [tokens_of(tmp_path, split) for split in ("train", "val")]
    assert sum(part.count(50256) for part in parts) == 1
    assert GPT2Tokenizer().decode(parts[0] + parts[1]) == content


def test_characters_have_no_end_of_text(tmp_path, caplog):
    path = written(tmp_path, "a.txt", f"{TEXT}{END}" * 3)
    prepare_in(tmp_path, path, tokenizer="char")
    assert f"{END}: 3 in the text, as its characters: this vocabulary has no such token" in caplog.text
    with pytest.raises(DataError, match="end_of_text=True, but the tokenizer char has no end-of-text token"):
        prepare_in(tmp_path, path, tokenizer="char", end_of_text=True)


@pytest.mark.usefixtures("_gpt2_vocabulary")
def test_pieces_with_ends_of_text_have_the_ids_of_one_encoding(tmp_path, monkeypatch):
    monkeypatch.setattr(token_writer, "CHUNK_CHARACTERS", 5)
    chance = random.Random(1)
    alphabet = ["\n", "\n", " ", "a", "don't", "1", "日", "\u3000", "<|", END, END, "<|endoftext"]
    for _ in range(200):
        text = "".join(chance.choices(alphabet, k=60))
        expected = load_gpt2_encoding().encode(text, allowed_special={END})
        assert encode(text, GPT2Tokenizer(), END).tolist() == expected
        assert write_tokens(tmp_path / "x.bin", text, GPT2Tokenizer(), END) == len(expected)
        assert np.fromfile(tmp_path / "x.bin", "<u2").tolist() == expected, repr(text)


@pytest.mark.usefixtures("_gpt2_vocabulary")
def test_documents_end_with_the_token(tmp_path):
    documents = [["one two", "", f"a{END}b"], ["\r\nthree\n"]]
    write_documents(tmp_path / "x.bin", documents, 4, GPT2Tokenizer())
    ordinary = load_gpt2_encoding().encode_ordinary
    expected = [token for batch in documents for one in batch for token in (*ordinary(one), 50256)]
    assert np.fromfile(tmp_path / "x.bin", "<u2").tolist() == expected


@pytest.mark.usefixtures("_gpt2_vocabulary")
@pytest.mark.parametrize("flag", ["--end_of_text", "--end_of_text=True", "--end-of-text", "--end_of_text=False"])
def test_the_flag_is_given_as_other_commands_take_it(tmp_path, flag, capsys):
    path = written(tmp_path, "a.txt", TEXT)
    assert main(["prepare", "mine", "--text", path, path, f"--data_dir={tmp_path}/data", flag]) == 0
    assert "train " in capsys.readouterr().out
    meta = json.loads((tmp_path / "data/mine/meta.json").read_text())
    assert meta.get("end_of_text", False) == (flag != "--end_of_text=False")


def test_what_cannot_be_written_is_one_line(tmp_path, capsys):
    written(tmp_path, "data", "a file")
    code = main(["prepare", "mine", "--text", written(tmp_path, "a.txt", TEXT), "--tokenizer=char",
                 f"--data_dir={tmp_path}/data"])  # fmt: skip
    assert code == 2
    assert f"error: {tmp_path}/data/mine cannot be written: Not a directory" in capsys.readouterr().err
