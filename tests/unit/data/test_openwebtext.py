"""OpenWebText from files of its layout: nanoGPT's split, order and ends of text; and what is said without it."""

from __future__ import annotations

import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from orchestrator.data import openwebtext
from orchestrator.data.gpt2_vocabulary import load_gpt2_encoding
from orchestrator.data.openwebtext import are_documents
from orchestrator.data.prepare import PrepareConfig, PreparedInfo, prepare
from orchestrator.data.token_files import open_token_files
from orchestrator.errors import DataError

DOCUMENTS = [f"Document {i}.\r\n\n{'word ' * (i % 7)}<|endoftext|>" for i in range(2_500)]


def rows(n: int) -> list[dict[str, str]]:
    return [{"text": document} for document in DOCUMENTS[:n]]


def write_parts(folder: Path, kind: str, n: int = len(DOCUMENTS)) -> str:
    """Write documents into two files, and return a glob for both."""
    folder.mkdir()
    for i, part in enumerate((rows(n)[: n // 3], rows(n)[n // 3 :])):
        path = folder / f"part-{i}.{kind}"
        if kind == "parquet":
            pq.write_table(pa.Table.from_pylist(part), path)
        elif kind == "arrow":
            table = pa.Table.from_pylist(part)
            with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
                writer.write_table(table)
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in part))
    return f"{folder}/*.{kind}"


def prepare_in(folder: Path, *text: str, **settings) -> PreparedInfo:
    return prepare(PrepareConfig("openwebtext", text, data_dir=str(folder / "data"), **settings))


@pytest.fixture(autouse=True)
def _has_what_it_needs() -> None:
    pytest.importorskip("datasets")
    try:
        load_gpt2_encoding()
    except DataError as error:
        pytest.skip(f"GPT-2's vocabulary is not on this machine: {error}")


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "arrow"])
def test_tokens_are_those_of_nanogpts_script(tmp_path, kind):
    import datasets

    split = datasets.Dataset.from_list(rows(2_500)).train_test_split(test_size=0.0005, seed=2357, shuffle=True)
    ordinary = load_gpt2_encoding().encode_ordinary
    info = prepare_in(tmp_path, write_parts(tmp_path / "files", kind))
    files = open_token_files(tmp_path / "data", "openwebtext")
    for mine, theirs in (("train", "train"), ("val", "test")):
        expected = [token for row in split[theirs] for token in (*ordinary(row["text"]), 50256)]
        assert files.splits[mine].tolist() == expected
    assert len(split["test"]) == 2, "one document would show no order"
    assert (info.meta.dtype, info.meta.vocab_size, files.vocab_size) == ("uint16", 50_257, None)
    assert prepare_in(tmp_path, f"{tmp_path}/files/*.{kind}").was_up_to_date
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["openwebtext"]  # what was in between is gone


def test_an_end_of_text_within_a_document_is_one_where_asked(tmp_path):
    prepare_in(tmp_path, write_parts(tmp_path / "files", "jsonl", 4), end_of_text=True)
    splits = open_token_files(tmp_path / "data", "openwebtext").splits
    assert sum(tokens.tolist().count(50256) for tokens in splits.values()) == 8


def test_files_of_another_layout_are_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    for content, message in (
        ('{"body": "x"}\n{"body": "y"}\n', "no column `text`, there are: body"),
        ('{"text": "x"}\n', "1 documents are too few"),
        ('{"text": 1}\n{"text": 2}\n', "holds no text"),
        ("no json\n", "cannot be loaded"),
    ):
        path.write_text(content)
        with pytest.raises(DataError, match=message):
            prepare_in(tmp_path, str(path))
        assert not (tmp_path / "data/openwebtext/train.bin").exists()
        assert not list((tmp_path / "data").glob(".documents-*"))
    with pytest.raises(DataError, match=r"--text .*\.parquet matches no file"):
        prepare_in(tmp_path, f"{tmp_path}/*.parquet")
    with pytest.raises(DataError, match="give files of one kind"):
        prepare_in(tmp_path, str(path), "more.txt")
    with pytest.raises(DataError, match="no token to put after each document"):
        prepare_in(tmp_path, str(path), tokenizer="char")


def test_documents_are_told_by_their_endings():
    assert are_documents(["s3://b/owt/*.jsonl.zst", "a.json"])
    assert are_documents(["x/*.parquet"])
    assert not are_documents(["book.txt", "owt.txt.gz"])


def test_a_text_under_that_name_is_a_text(tmp_path):
    (tmp_path / "a.txt").write_text("some words\n" * 20)
    assert prepare_in(tmp_path, str(tmp_path / "a.txt")).meta.source_name.endswith("a.txt")


def test_the_hubs_conversion_is_taken_where_it_has_a_script(tmp_path, monkeypatch, caplog):
    """The hub itself is out of a test's reach: what datasets answers with a script there stands for it."""
    import datasets

    caplog.set_level("INFO")
    asked = []

    def load_dataset(name, **options):
        asked.append((name, options))
        if "revision" not in options:
            raise RuntimeError("Dataset scripts are no longer supported, but found openwebtext.py")
        return datasets.Dataset.from_list(rows(30))

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(200)
            self.end_headers()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with http.server.HTTPServer(("127.0.0.1", 0), Hub) as hub:
        threading.Thread(target=hub.handle_request, daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{hub.server_port}")
        prepare_in(tmp_path)
    assert asked[1] == ("Skylion007/openwebtext", {"revision": "refs/convert/parquet", "split": "train"})
    assert "the hub's openwebtext has 30 documents, nanoGPT's has 8013769" in caplog.text
    splits = open_token_files(tmp_path / "data", "openwebtext").splits
    assert sum(tokens.tolist().count(50256) for tokens in splits.values()) == 30


def test_without_datasets_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(openwebtext.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(DataError, match=r"pip install 'nanogpt-orchestrator\[openwebtext\]'"):
        prepare_in(tmp_path)


def test_without_a_network_both_remedies_are_said_within_seconds(tmp_path):
    command = [sys.executable, "-m", "orchestrator", "prepare", "openwebtext", f"--data_dir={tmp_path}/data"]
    environment = os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": "http://127.0.0.1:9"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2, done.stderr
    assert "error: openwebtext cannot be loaded: " in done.stderr
    assert "prepare openwebtext --text 'openwebtext/*.parquet'" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "data").glob("*/*"))
