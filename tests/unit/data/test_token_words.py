"""Token files that are something else: another width, order or type, another kind of file; and tokens that are not."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest

from orchestrator.data import token_words
from orchestrator.data.token_files import open_token_files
from orchestrator.errors import DataError

CHARS = np.random.default_rng(0).integers(0, 65, 5_000)  # as of a text by characters: 0 is among them
GPT2 = np.random.default_rng(1).integers(0, 50_257, 5_000)


def write(data_dir: Path, content: bytes, meta: object = None) -> Path:
    folder = data_dir / "mine"
    folder.mkdir(exist_ok=True)
    CHARS.astype("<u2").tofile(folder / "val.bin")
    (folder / "train.bin").write_bytes(content)
    if meta is not None:
        (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
    return folder


@pytest.mark.parametrize("tokens", [CHARS, GPT2], ids=["chars", "gpt2"])
@pytest.mark.parametrize(
    ("dtype", "looks"),
    [
        ("<i8", "int64"),
        ("<u8", "int64"),
        ("<i4", "int32"),
        ("<u4", "int32"),
        (">i8", "int64 of big-endian byte order"),
        (">i4", "int32 of big-endian byte order"),
        ("<f4", "float32"),
        ("<f8", "float64"),
    ],
)
@pytest.mark.parametrize("meta", [None, {"vocab_size": 50_304}])
def test_tokens_of_another_type_are_refused_by_name(tmp_path, tokens, dtype, looks, meta):
    write(tmp_path, tokens.astype(dtype).tobytes(), meta)
    with pytest.raises(DataError, match=rf"train\.bin looks like {looks} tokens.*np\.uint16\)\.tofile.*meta\.json"):
        open_token_files(tmp_path, "mine")


@pytest.mark.parametrize(("dtype", "looks"), [("<f2", "float16"), (">u2", "uint16 of big-endian byte order")])
def test_two_bytes_of_another_kind_are_refused_by_name(tmp_path, dtype, looks):
    folder = write(tmp_path, CHARS.astype(dtype).tobytes())
    with pytest.raises(DataError, match=f"looks like {looks} tokens") as error:
        open_token_files(tmp_path, "mine")
    advice = json.loads(str(error.value).split("such as ")[1])
    (folder / "meta.json").write_text(json.dumps(advice))
    tokens = open_token_files(tmp_path, "mine").splits["train"]
    assert tokens.tolist() == CHARS.tolist() or (looks, advice) == ("float16", {"dtype": "uint16"})


@pytest.mark.parametrize(
    "tokens",
    [
        CHARS,
        GPT2,
        np.zeros(1000),
        np.full(1000, 40_000),
        np.arange(1000) % 3,
        np.arange(1000) * 64 % 50_000,
        np.where(np.arange(4000) % 2, 0, CHARS[:4000])[:3999] + (np.arange(3999) == 1001),  # a letter a line, but one
        np.repeat(CHARS, 2),
        np.array([0x0480, 0x0095, *GPT2[:500]]),  # begins as a pickle does
        np.array([0x8B1F, 0x0008, *GPT2[:500]]),  # as gzip does
        np.array([5, 0, 0, 0, 7, 0]),  # too few to show anything
    ],
    ids=range(11),
)
def test_tokens_as_nanogpt_writes_them_are_taken(tmp_path, tokens):
    write(tmp_path, tokens.astype("<u2").tobytes())
    assert open_token_files(tmp_path, "mine").splits["train"].tolist() == tokens.tolist()


def test_wide_ids_are_seen_in_int64_as_well(tmp_path):
    write(tmp_path, (CHARS * 1_999).astype("<i8").tobytes())  # up to 127,936, as Llama's
    with pytest.raises(DataError, match="looks like int64 tokens"):
        open_token_files(tmp_path, "mine")


def test_a_file_that_was_not_written_to_its_end_is_said(tmp_path, caplog):
    write(tmp_path, CHARS.astype("<u2").tobytes())
    open_token_files(tmp_path, "mine")
    assert "zeros" not in caplog.text
    write(tmp_path, CHARS.astype("<u2").tobytes() + bytes(40_000))  # as an array that is filled up to there
    open_token_files(tmp_path, "mine")
    assert "train.bin ends in 16384 zeros or more: was it written to its end?" in caplog.text


def test_a_meta_that_states_the_type_ends_all_doubt(tmp_path):
    folder = write(tmp_path, CHARS.astype("<i8").tobytes())
    CHARS.astype("<i8").tofile(folder / "val.bin")
    (folder / "meta.json").write_text('{"dtype": "int64"}')
    assert open_token_files(tmp_path, "mine").splits["train"].tolist() == CHARS.tolist()
    (folder / "meta.json").write_text('{"dtype": "uint16"}')  # every second token is a zero, the user says
    assert len(open_token_files(tmp_path, "mine").splits["train"]) == 4 * len(CHARS)


def test_a_long_file_is_looked_at_from_begin_to_end(tmp_path, monkeypatch):
    monkeypatch.setattr(token_words, "_STRETCHES", 3)
    monkeypatch.setattr(token_words, "_STRETCH_WORDS", 400)
    tokens = CHARS.astype("<i8").tobytes()
    write(tmp_path, tokens + tokens)
    with pytest.raises(DataError, match="looks like int64"):
        open_token_files(tmp_path, "mine")
    write(tmp_path, tokens + GPT2.astype("<u2").tobytes())
    open_token_files(tmp_path, "mine")  # its end is no int64


def npy() -> bytes:
    file = io.BytesIO()
    np.save(file, CHARS)
    return file.getvalue()


def archive() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as opened:
        opened.writestr("a.txt", "some text")
    return file.getvalue()


TEXT = b"Now is the winter of our discontent\nMade glorious summer by this sun of York;\n" * 20


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (npy(), r"a \.npy file: np\.load"),
        (archive(), "a zip file: unpack or load it"),
        (gzip.compress(CHARS.astype("<u2").tobytes()), "a gzip file"),
        (b"\x28\xb5\x2f\xfd" + bytes(100), "a zstd file"),
        (pickle.dumps(CHARS.tolist()), "a pickle"),
        (pickle.dumps(CHARS.astype("<u2"), 2), "a pickle"),
        (TEXT, "a text: `prepare NAME --text FILE`"),
        ("Größe, wörtlich ".encode() * 400, "a text"),
        (b'{"ids": [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19]}\n', "a text"),
        (b"%PDF-1.7 " + bytes(100), "a PDF"),
        (b"PAR1" + bytes(100), "a parquet file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n\n", "a pointer of Git LFS"),
        (bz2.compress(TEXT * 100), "a bzip2 file"),
    ],
    ids=["npy", "zip", "gzip", "zstd", "pickle4", "pickle2", "text", "umlauts", "json", "pdf", "parquet", "lfs", "bz2"],
)
def test_files_of_other_kinds_are_refused_by_name(tmp_path, content, kind):
    write(tmp_path, content + b"\n" * (len(content) % 2))
    with pytest.raises(DataError, match=rf"train\.bin is {kind}.*; a token file holds nothing but tokens"):
        open_token_files(tmp_path, "mine")


def test_what_is_no_file_is_said(tmp_path):
    folder = write(tmp_path, CHARS.astype("<u2").tobytes())
    (folder / "val.bin").unlink()
    (folder / "val.bin").symlink_to("/nowhere/val.bin")
    with pytest.raises(DataError, match=r"val\.bin is a link to /nowhere/val\.bin, which is not there"):
        open_token_files(tmp_path, "mine")
    (folder / "val.bin").unlink()
    (folder / "val.bin").symlink_to("val.bin")
    with pytest.raises(DataError, match=r"val\.bin is a link to val\.bin|val\.bin cannot be read"):
        open_token_files(tmp_path, "mine")
    (folder / "val.bin").unlink()
    (folder / "val.bin").mkdir()
    with pytest.raises(DataError, match=r"val\.bin is a folder"):
        open_token_files(tmp_path, "mine")
    with pytest.raises(DataError, match=r"train\.bin is a file: a dataset is a folder"):
        open_token_files(folder, "train.bin")


def test_what_may_not_be_read_is_said(tmp_path, monkeypatch):
    write(tmp_path, CHARS.astype("<u2").tobytes())

    def denied(path, *_args, **_options):  # root may read everything, so chmod shows nothing
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(np, "memmap", denied)
    with pytest.raises(DataError, match=r"train\.bin cannot be read: Permission denied"):
        open_token_files(tmp_path, "mine")
