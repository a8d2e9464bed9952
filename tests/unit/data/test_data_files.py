"""Token files and batches: ours, nanoGPT's, and every way in which they can be wrong."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from orchestrator.data import token_files
from orchestrator.data.dataset import Dataset
from orchestrator.data.nanogpt_meta import read_nanogpt_meta
from orchestrator.data.order import BatchOrder, offsets
from orchestrator.data.prepare import PrepareConfig, prepare
from orchestrator.data.token_files import open_token_files
from orchestrator.errors import DataError

SHARED = Path(__file__).resolve().parents[4] / "shared"
TEXT = "the quick brown fox jumps over the lazy dog\n" * 50


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """A data_dir with one character-level dataset named tiny."""
    (tmp_path / "text.txt").write_text(TEXT)
    prepare(PrepareConfig("tiny", (str(tmp_path / "text.txt"),), "char", str(tmp_path / "data")))
    return tmp_path / "data"


def nanogpt_folder(folder: Path, meta: object = None, n_tokens: int = 200) -> Path:
    folder.mkdir()
    for split in ("train", "val"):
        (np.arange(n_tokens) % 3).astype(np.uint16).tofile(folder / f"{split}.bin")
    if meta is not None:
        (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
    return folder


@pytest.mark.parametrize("mode", ["random", "epoch"])
@pytest.mark.parametrize("evaluation", [False, True])
def test_batch_holds_the_blocks_and_their_shifted_targets(data_dir, mode, evaluation):
    sampling = BatchOrder(seed=3, batch_size=5, block_size=16, gradient_accumulation_steps=4, mode=mode)
    dataset = Dataset(open_token_files(data_dir, "tiny"), sampling)
    x, y = dataset.batch("train", 9, 2, evaluation=evaluation)
    assert (x.shape, y.shape, x.dtype, y.dtype) == ((5, 16), (5, 16), torch.int64, torch.int64)
    assert x.is_contiguous()
    assert y.is_contiguous()
    tokens = torch.from_numpy(np.fromfile(data_dir / "tiny/train.bin", np.uint16).astype(np.int64))
    starts = offsets(sampling, len(tokens), "train", 9, 2, "eval" if evaluation else "train")
    for row, start in enumerate(starts):
        assert torch.equal(x[row], tokens[start : start + 16])
        assert torch.equal(y[row], tokens[start + 1 : start + 17])


def test_batch_is_the_same_from_another_instance_and_leaves_global_random_state_alone(data_dir):
    sampling = BatchOrder(batch_size=3, block_size=8)
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].tolist()
    first = Dataset(open_token_files(data_dir, "tiny"), sampling).batch("val", 4, 1)
    second = Dataset(open_token_files(data_dir, "tiny"), sampling).batch("val", 4, 1)
    assert torch.equal(first[0], second[0])
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.random.get_state()[1].tolist() == numpy_state


def test_own_dataset_tells_vocabulary_and_tokenizer(data_dir):
    files = open_token_files(data_dir, "tiny")
    files.check_fits(block_size=8, vocab_size=len(set(TEXT)))
    assert files.vocab_size == len(set(TEXT))
    assert files.tokenizer is not None
    assert files.tokenizer.decode(files.splits["train"]) == TEXT[: int(len(TEXT) * 0.9)]


def test_splits_cannot_be_written(data_dir):
    tokens = open_token_files(data_dir, "tiny").splits["train"]
    with pytest.raises(ValueError, match="read-only"):
        tokens[0] = 1


def test_uint32_files_are_read(data_dir):
    path = data_dir / "tiny/meta.json"
    meta = json.loads(path.read_text()) | {"dtype": "uint32", "vocab_size": 70_000}
    path.write_text(json.dumps(meta))
    for split in ("train", "val"):
        np.full(meta[f"{split}_tokens"], 69_999, "<u4").tofile(data_dir / f"tiny/{split}.bin")
    files = open_token_files(data_dir, "tiny")
    assert int(files.splits["val"][0]) == 69_999
    files.check_fits(block_size=8, vocab_size=70_000)
    with pytest.raises(DataError, match="token 69999 at position 0 is outside"):
        files.check_fits(block_size=8, vocab_size=69_999)


def test_nanogpt_folder_without_meta_is_gpt2(tmp_path):
    nanogpt_folder(tmp_path / "openwebtext")
    files = open_token_files(tmp_path, "openwebtext")
    assert files.meta is None
    assert files.vocab_size is None
    assert files.tokenizer is not None
    assert files.tokenizer.to_json() == {"kind": "gpt2"}


def test_nanogpt_folder_with_meta_pkl_is_read_as_it_is(tmp_path):
    chars = "\nab"
    meta = {"vocab_size": 3, "itos": dict(enumerate(chars)), "stoi": {char: i for i, char in enumerate(chars)}}
    nanogpt_folder(tmp_path / "mine", meta)
    files = open_token_files(tmp_path, "mine")
    assert files.vocab_size == 3
    assert files.tokenizer is not None
    assert files.tokenizer.decode([1, 2, 0]) == "ab\n"


def test_nanogpt_meta_may_lack_the_characters(tmp_path):
    nanogpt_folder(tmp_path / "mine", {"vocab_size": 100})
    files = open_token_files(tmp_path, "mine")
    assert (files.vocab_size, files.tokenizer) == (100, None)


def test_real_nanogpt_meta():
    path = SHARED / "golden/nanogpt_meta.pkl"
    if not path.exists():
        pytest.skip(f"nanoGPT's own meta.pkl is not at {path}")
    meta = read_nanogpt_meta(path)
    assert meta["vocab_size"] == 65
    assert meta["stoi"]["a"] == 39
    assert meta["itos"][39] == "a"


class Malicious:
    def __reduce__(self):
        return (Path.touch, (Path("pwned"),))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_malicious_pickle_is_refused_and_not_run(tmp_path, monkeypatch, protocol):
    monkeypatch.chdir(tmp_path)
    Path("meta.pkl").write_bytes(pickle.dumps({"vocab_size": 3, "itos": Malicious()}, protocol))
    with pytest.raises(DataError, match=r"it asks for .*nothing in it was run"):
        read_nanogpt_meta(Path("meta.pkl"))
    assert not Path("pwned").exists()


@pytest.mark.parametrize(
    "content",
    [b"", b"garbage", pickle.dumps({"vocab_size": 3})[:-4], b"cos\nsystem\n.", b"Ppersistent\n.", b"\x80\x04h\x05."],
)
def test_damaged_pickle_is_a_data_error(tmp_path, content):
    (tmp_path / "meta.pkl").write_bytes(content)
    with pytest.raises(DataError, match=r"meta\.pkl"):
        read_nanogpt_meta(tmp_path / "meta.pkl")


@pytest.mark.parametrize(
    ("meta", "said"),
    [
        ([1], "not a list"),
        ({"vocab_size": "3"}, "vocab_size='3'"),
        ({"vocab_size": True}, "vocab_size=True"),
        ({"vocab_size": 0}, "vocab_size=0"),
        ({"vocab_size": 2.5}, r"vocab_size=2\.5"),
        ({"stoi": {}}, "no vocab_size"),
        ({"itos": {0: "a", 2: "b"}}, "no vocab_size"),
    ],
)
def test_pickle_without_a_vocabulary_is_refused(tmp_path, meta, said):
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta))
    with pytest.raises(DataError, match=rf"meta\.pkl .*{said}"):
        read_nanogpt_meta(tmp_path / "meta.pkl")


def test_missing_folder_names_the_others_and_the_command(data_dir):
    with pytest.raises(DataError) as error:
        open_token_files(data_dir, "shakespeare_char")
    message = str(error.value)
    assert str(data_dir / "shakespeare_char") in message
    assert "there are: tiny" in message
    assert f"python -m orchestrator prepare shakespeare_char --data_dir={data_dir}" in message


def test_missing_data_dir_is_said(tmp_path):
    with pytest.raises(DataError, match="there is no dataset in that data_dir"):
        open_token_files(tmp_path / "nowhere", "quickstart")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), r"val\.bin is missing"),
        (lambda path: path.write_bytes(b""), r"val\.bin is empty"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), r"val\.bin is truncated: \d+ bytes"),
        (lambda path: path.write_bytes(path.read_bytes()[:-2]), r"has 219 tokens, but meta\.json says 220"),
    ],
)
def test_damaged_token_file_is_refused(data_dir, damage, message):
    damage(data_dir / "tiny/val.bin")
    with pytest.raises(DataError, match=message) as error:
        open_token_files(data_dir, "tiny")
    assert "python -m orchestrator prepare tiny" in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "format version 2, this program knows 1"),
        ({"dtype": "float16"}, "dtype 'float16'"),
        ({"train_tokens": "many"}, "a token count is not valid"),
        ({"surprise": 1}, "is damaged"),
        ({"tokenizer": {"kind": "char", "chars": "aa"}}, "not a tokenizer"),
        ({"tokenizer": None}, "not a tokenizer"),
    ],
)
def test_wrong_meta_is_refused(data_dir, change, message):
    path = data_dir / "tiny/meta.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DataError, match=message):
        open_token_files(data_dir, "tiny")


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "is damaged"), ("{", "is damaged"), ("[]", "not a list"), ("{}", "says no vocab_size.*is it damaged")],
)
def test_damaged_meta_is_refused(data_dir, content, message):
    (data_dir / "tiny/meta.json").write_text(content)
    with pytest.raises(DataError, match=rf"meta\.json {message}|meta\.json must hold .*{message}"):
        open_token_files(data_dir, "tiny")


def test_split_shorter_than_a_sequence_is_refused(data_dir):
    files = open_token_files(data_dir, "tiny")
    files.check_fits(block_size=219, vocab_size=65)  # val has 220 tokens
    with pytest.raises(DataError, match=r"val\.bin has 220 tokens, but block_size=220 needs at least 221"):
        files.check_fits(block_size=220, vocab_size=65)


def test_token_outside_the_vocabulary_is_found_at_its_position(data_dir):
    tokens = np.memmap(data_dir / "tiny/train.bin", dtype="<u2", mode="r+")
    tokens[1234] = 65
    tokens.flush()
    files = open_token_files(data_dir, "tiny")
    files.check_fits(block_size=8, vocab_size=66)
    with pytest.raises(DataError, match=r"token 65 at position 1,234 is outside .*vocab_size=65"):
        files.check_fits(block_size=8, vocab_size=65)


def test_scan_of_a_long_file_is_bounded_and_reaches_both_ends(monkeypatch, data_dir, caplog):
    monkeypatch.setattr(token_files, "_SCAN_CHUNK_TOKENS", 10)
    monkeypatch.setattr(token_files, "_SCAN_CHUNKS", 5)
    tokens = np.memmap(data_dir / "tiny/train.bin", dtype="<u2", mode="r+")
    files = open_token_files(data_dir, "tiny")
    tokens[12] = 999  # between two stretches
    with caplog.at_level("INFO"):
        files.check_fits(block_size=8, vocab_size=65)
    assert "checking 5 stretches" in caplog.text
    tokens[-1] = 999
    with pytest.raises(DataError, match="token 999 at position 1,979"):
        files.check_fits(block_size=8, vocab_size=65)


def test_fingerprint_tells_datasets_apart(data_dir, tmp_path):
    fingerprint = open_token_files(data_dir, "tiny").fingerprint()
    assert open_token_files(data_dir, "tiny").fingerprint() == fingerprint
    nanogpt_folder(tmp_path / "other")
    assert open_token_files(tmp_path, "other").fingerprint() != fingerprint
    tokens = np.memmap(data_dir / "tiny/val.bin", dtype="<u2", mode="r+")
    tokens[7] += 1
    tokens.flush()
    assert open_token_files(data_dir, "tiny").fingerprint() != fingerprint
