"""A tokenizer from a folder gives the library's tokens and text, whole or as a stream."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from fsspec.implementations.memory import MemoryFileSystem
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from orchestrator.data import token_writer
from orchestrator.data.tokenizers import tokenizer_from_json
from orchestrator.errors import DataError
from tests.support.tokenizer_folders import END, MIXED, TEXT, byte_level, folder_of, read, whole_words


def test_ids_and_texts_are_the_librarys(folder: Path) -> None:
    library, found = Tokenizer.from_file(str(folder / "tokenizer.json")), read(folder)
    assert (found.vocab_size, found.end_of_text) == (library.get_vocab_size(), library.token_to_id(END))
    assert found.encode(MIXED).tolist() == library.encode(MIXED).ids
    assert found.decode(found.encode(MIXED)) == MIXED
    assert found.decode([*found.encode("a☃")[:-1], 99_999, found.end_of_text]) == "a\N{REPLACEMENT CHARACTER}" * 1 + (
        "\N{REPLACEMENT CHARACTER}" + END
    )
    assert found.encode("a\udc80").tolist() == library.encode("a\N{REPLACEMENT CHARACTER}").ids


def test_special_tokens_are_text_unless_allowed(folder: Path) -> None:
    found = read(folder)
    assert found.encode(f"a{END}b", allow_special=True).tolist().count(found.end_of_text) == 1
    assert found.end_of_text not in found.encode(f"a{END}b").tolist()
    assert found.decode(found.encode(f"a{END}b")) == f"a{END}b"


def test_a_stream_never_shows_half_a_character(folder: Path) -> None:
    stream, ids = read(folder).decoder(), read(folder).encode(MIXED).tolist()
    parts = [stream.push(token) for token in ids]
    assert "".join(parts) + stream.finish() == MIXED
    assert not any("\N{REPLACEMENT CHARACTER}" in part for part in parts)
    assert stream.push(read(folder).encode("日").tolist()[0]) == ""
    assert stream.finish() == "\N{REPLACEMENT CHARACTER}"
    assert stream.finish() == ""


def sentencepiece_like() -> Tokenizer:
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                      decoders.Strip(" ", 1, 0)])  # fmt: skip
    special = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.UnigramTrainer(vocab_size=330, special_tokens=special, unk_token="<unk>", show_progress=False)
    made.train_from_iterator([TEXT], trainer)
    value = json.loads(made.to_str())
    value["model"]["byte_fallback"] = True
    value["added_tokens"] = value["added_tokens"][:2]
    return Tokenizer.from_str(json.dumps(value))


def word_pieces() -> Tokenizer:
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    made.train_from_iterator(
        [TEXT], trainers.WordPieceTrainer(vocab_size=90, special_tokens=["[UNK]"], show_progress=False)
    )
    return made


@pytest.mark.parametrize("train_one", [sentencepiece_like, word_pieces])
def test_other_kinds_show_what_the_library_decodes(tmp_path: Path, train_one: Callable[[], Tokenizer]) -> None:
    made = train_one()
    found = read(folder_of(tmp_path / "theirs", made, eos_token="</s>"))
    for text in ("the quick brown fox", "the dog doesn't mind ☃ the fox", "日"):
        ids = made.encode(text).ids
        assert found.encode(text).tolist() == ids
        assert found.decode(ids) == made.decode(ids, skip_special_tokens=False)
    assert found.end_of_text == made.token_to_id("</s>")
    assert tokenizer_from_json(found.to_json()) == found


def test_a_server_that_lists_nothing_is_asked_for_each_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_args: Any, **_options: Any) -> None:
        raise PermissionError("ListBucket")

    monkeypatch.setattr(MemoryFileSystem, "ls", denied)
    for path in folder.iterdir():
        MemoryFileSystem().pipe(f"/unlisted/{path.name}", path.read_bytes())
    assert read("memory://unlisted") == read(folder)


def test_sizes_are_those_of_the_text(folder: Path, tmp_path: Path) -> None:
    found = read(folder)
    assert found.sizes_bytes()[found.encode(MIXED)].sum() == len(MIXED.encode())
    assert found.sizes_bytes()[found.end_of_text] == 0
    with pytest.raises(DataError, match="lengths of this tokenizer's tokens are not known"):
        read(folder_of(tmp_path / "words", whole_words())).sizes_bytes()


def test_what_would_change_a_text_is_left_out(folder: Path) -> None:
    plain = read(folder)
    value = json.loads((folder / "tokenizer.json").read_text())
    value["truncation"] = {"max_length": 3, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    value["padding"] = {"strategy": {"Fixed": 999}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                        "pad_type_id": 0, "pad_token": END}  # fmt: skip
    value["model"]["dropout"] = 0.9
    value["post_processor"] = (
        tokenizers.processors.TemplateProcessing(single=f"{END} $A", special_tokens=[(END, 0)]).__getstate__().decode()
    )
    value["post_processor"] = json.loads(value["post_processor"])
    (folder / "tokenizer.json").write_text(json.dumps(value))
    assert read(folder).encode(MIXED).tolist() == plain.encode(MIXED).tolist()
    assert read(folder) == plain


def test_equal_vocabularies_have_equal_json_and_others_another(folder: Path, tmp_path: Path) -> None:
    found = read(folder)
    value = json.loads((folder / "tokenizer.json").read_text())
    value["model"]["merges"] = [" ".join(pair) for pair in value["model"]["merges"]]  # as older versions write them
    value["model"] |= {"continuing_subword_prefix": "", "vocab": dict(reversed(value["model"]["vocab"].items()))}
    del value["pre_tokenizer"]["use_regex"], value["model"]["byte_fallback"]
    again = folder_of(tmp_path / "again")
    (again / "tokenizer.json").write_text("\ufeff" + json.dumps(value, indent=3), encoding="utf-8")
    assert read(again).to_json() == found.to_json()
    assert read(again).encode(MIXED).tolist() == found.encode(MIXED).tolist()
    assert tokenizer_from_json(json.loads(json.dumps(found.to_json()))) == found
    for i, other in enumerate((byte_level(TEXT[:500]), byte_level(use_regex=False), byte_level(end="<end>"))):
        assert read(folder_of(tmp_path / str(i), other)).to_json() != found.to_json()


def test_json_without_the_file_tells_what_it_is_and_encodes_nothing(folder: Path) -> None:
    known = tokenizer_from_json(read(folder).to_json())
    assert known == read(folder)
    with pytest.raises(DataError, match=r"tokenizer\.json of the tokenizer with SHA-256 \w{12}\.\.\. is not at hand"):
        known.encode("a")


def test_pieces_have_the_ids_of_one_encoding(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_writer, "CHUNK_CHARACTERS", 5)
    sharp = byte_level()
    sharp.normalizer = normalizers.Lowercase()
    metaspace = Tokenizer(models.WordLevel({"▁a": 0, "▁b": 1, "a": 2, "b": 3, "?": 4}, unk_token="?"))
    metaspace.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    found = [read(folder), read(folder_of(tmp_path / "sharp", sharp)), read(folder_of(tmp_path / "meta", metaspace))]
    assert [one.can_be_cut for one in found] == [True, False, False]
    chance = random.Random(0)
    for tokenizer in found:
        for _ in range(30):
            text = "".join(chance.choices(["\n", " ", "a", "b", "don't", "日", "1"], k=60))
            token_writer.write_tokens(path := tmp_path / "x.bin", text, tokenizer)
            assert path.read_bytes() == tokenizer.encode(text).tobytes()
