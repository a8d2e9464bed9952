"""Datasets, runs, samples and exports carry the tokenizer along."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator.checkpoint.formats.huggingface import write_huggingface
from orchestrator.checkpoint.formats.nanogpt import read_nanogpt
from orchestrator.commands.export import ExportConfig, export
from orchestrator.commands.sample import SampleConfig, sample
from orchestrator.config import TrainConfig
from orchestrator.data.prepare import PrepareConfig, prepare
from orchestrator.data.token_files import open_token_files, read_tokenizer
from orchestrator.data.tokenizer_folder import read_tokenizer_folder
from orchestrator.data.tokenizers import CharTokenizer
from orchestrator.distributed.device import resolve
from orchestrator.distributed.world import World
from orchestrator.errors import ConfigError, DataError
from orchestrator.loop import train
from tests.support.golden import CKPT
from tests.support.runs import checkpoints_in
from tests.support.tokenizer_folders import MIXED, TEXT, byte_level, folder_of, prepared, read, whole_words


def test_a_dataset_keeps_the_file(folder: Path, tmp_path: Path) -> None:
    info = prepared(folder, tmp_path)
    assert "huggingface vocabulary of 299" in str(info)
    assert prepared(folder / "tokenizer.json", tmp_path).was_up_to_date
    files, found = open_token_files(tmp_path / "data", "mine"), read(folder)
    shutil.rmtree(folder)
    assert files.vocab_size == 299
    assert files.tokenizer is not None
    assert files.tokenizer.decode(files.splits["train"]) == TEXT[: int(len(TEXT) * 0.9)]
    assert read_tokenizer(tmp_path / "data", "mine") == found
    with pytest.raises(DataError, match=r"already holds huggingface tokens of .*, not huggingface tokens of this text"):
        prepared(folder_of(tmp_path / "other", byte_level(TEXT[:500])), tmp_path)
    (tmp_path / "data/mine/tokenizer.json").write_text((tmp_path / "other/tokenizer.json").read_text())
    with pytest.raises(DataError, match=r"data/mine: its tokenizer: tokenizer\.json is another tokenizer than"):
        open_token_files(tmp_path / "data", "mine")
    (tmp_path / "data/mine/tokenizer.json").unlink()
    with pytest.raises(DataError, match=r"data/mine: its tokenizer: it cannot be read \(No such file"):
        open_token_files(tmp_path / "data", "mine")


def test_another_datasets_folder_is_one(tmp_path: Path) -> None:
    theirs = folder_of(tmp_path / "theirs", byte_level(end="</s>"), eos_token="</s>")
    prepared(theirs, tmp_path)
    assert read_tokenizer_folder(f"{tmp_path}/data/mine") == read(theirs)
    assert read(tmp_path / "data/mine").end_of_text == 0
    (tmp_path / "b.txt").write_text("bbaa" * 9)
    settings = PrepareConfig("b", (str(tmp_path / "b.txt"),), "char", str(tmp_path / "data"))
    prepare(settings)
    (tmp_path / "c.txt").write_text("aaaa" * 9)
    prepare(replace(settings, name="c", text=(str(tmp_path / "c.txt"),), tokenizer=f"{tmp_path}/data/b"))
    assert read_tokenizer(tmp_path / "data", "c") == CharTokenizer("ab")


def test_ends_of_text_are_the_folders(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = folder_of(tmp_path / "theirs", byte_level(end="</s>"), eos_token={"content": "</s>"})
    (tmp_path / "more.txt").write_text("the fox</s>the dog\n" * 9)
    text = (str(tmp_path / "more.txt"),) * 2
    prepare(PrepareConfig("mine", text, str(folder), str(tmp_path / "data"), end_of_text=True))
    splits = open_token_files(tmp_path / "data", "mine").splits.values()
    assert sum(tokens.tolist().count(read(folder).end_of_text) for tokens in splits) == 19
    caplog.clear()
    prepare(PrepareConfig("mine", text, str(folder), str(tmp_path / "data"), overwrite=True))
    assert "</s>: 18 in the text, encoded as text like any other, and none between files (2)" in caplog.text


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("gtp2", r"tokenizer='gtp2' is neither char, gpt2 nor a folder here .*; did you mean gpt2\?"),
        ("chars", "did you mean char"),
        ("EleutherAI/gpt-neo", "nor a folder here"),
        ("memory://nothing", r"holds no tokenizer\.json, and not both of vocab\.json and merges\.txt"),
    ],
)
def test_a_tokenizer_that_is_not_there_is_named(tmp_path: Path, word: str, message: str) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    with pytest.raises(DataError, match=message):
        prepare(PrepareConfig("mine", (str(tmp_path / "text.txt"),), word, str(tmp_path / "data")))
    assert not (tmp_path / "data").exists()


def test_a_run_carries_it_wherever_it_goes(folder: Path, tmp_path: Path, tiny: TrainConfig) -> None:
    transformers = pytest.importorskip("transformers")
    prepared(folder, tmp_path)
    found = read(folder)
    config = replace(tiny, data_dir=str(tmp_path / "data"), dataset="mine", max_iters=2, dropout=0.0)
    train(resolve(config), World(attempt="a"))
    assert "sha256" in checkpoints_in(config.out_dir).select().state["config"]["tokenizer"]
    for path in (folder, tmp_path / "data"):
        shutil.rmtree(path)
    moved = str(shutil.move(config.out_dir, tmp_path / "moved"))
    assert read(moved).sha256 == found.sha256

    def text_of(**settings: Any) -> str:
        out = io.StringIO()
        drawn = SampleConfig(num_samples=1, max_new_tokens=8, device="cpu", temperature=0, data_dir="nowhere")
        sample(replace(drawn, **settings), out)
        return out.getvalue()

    expected = text_of(out_dir=moved, start="the fox")
    assert expected.startswith("the fox")
    export(ExportConfig(out_dir=moved, format="nanogpt", to=f"{tmp_path}/ckpt.pt"))
    export(ExportConfig(out_dir=moved, format="hf", to=f"{tmp_path}/hf"))
    assert text_of(init_from=f"{tmp_path}/ckpt.pt", start="the fox") == expected
    assert text_of(init_from=f"{tmp_path}/hf", start="the fox") == expected
    theirs = transformers.AutoTokenizer.from_pretrained(f"{tmp_path}/hf")
    assert theirs.encode(MIXED) == found.encode(MIXED).tolist()
    assert theirs.eos_token_id == found.end_of_text
    assert json.loads((tmp_path / "hf/config.json").read_text())["eos_token_id"] == found.end_of_text
    Path(moved, "tokenizer.json").unlink()
    with pytest.raises(DataError, match=r"SHA-256 .*tokenizer\.json is missing or damaged; put it there, or give"):
        text_of(out_dir=moved)
    export(ExportConfig(out_dir=moved, format="hf", to=f"{tmp_path}/bare"))
    assert not Path(tmp_path, "bare/tokenizer.json").exists()


def test_a_folder_without_a_tokenizer_is_gpt2s_only_in_its_size(tmp_path: Path) -> None:
    write_huggingface(read_nanogpt(CKPT, model_only=True), tmp_path)
    with pytest.raises(DataError, match="holds no tokenizer, and vocab_size=65 is not GPT-2's"):
        sample(SampleConfig(init_from=str(tmp_path), device="cpu"))
    (tmp_path / "char_tokenizer.json").write_text(json.dumps(CharTokenizer("ab").to_json()))
    sample(
        SampleConfig(init_from=str(tmp_path), device="cpu", start="ab", num_samples=1, max_new_tokens=1), io.StringIO()
    )
    folder_of(tmp_path)
    (tmp_path / "char_tokenizer.json").unlink()
    with pytest.raises(DataError, match=r"vocab_size=65, but the tokenizer 299 tokens: the tokenizer in .* is another"):
        sample(SampleConfig(init_from=str(tmp_path), device="cpu"))


def test_prompts_are_made_of_what_the_vocabulary_has(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    write_huggingface(read_nanogpt(CKPT, model_only=True), tmp_path, CharTokenizer(" ab"))

    def text_of(**settings: Any) -> str:
        out = io.StringIO()
        sample(SampleConfig(init_from=str(tmp_path), num_samples=1, max_new_tokens=1, device="cpu", **settings), out)
        return out.getvalue()

    assert text_of().startswith(" ")
    assert "the vocabulary has no newline: samples begin with ' ' (--start gives another)" in caplog.text
    with pytest.raises(DataError, match=r"start='a\\n'"):
        text_of(start="a\n")
    with pytest.raises(ConfigError, match="start is empty"):
        text_of(start="")
    (tmp_path / "char_tokenizer.json").write_text('{"kind": "words", "words": [null, "", "the ", "fox"]}')
    assert text_of().startswith("the ")
    (tmp_path / "char_tokenizer.json").unlink()
    folder_of(tmp_path, whole_words())
    assert text_of().startswith("the")
    with pytest.raises(DataError, match="has no token for it"):
        text_of(start="  ")
