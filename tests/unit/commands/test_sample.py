"""Sampling: from every kind of source, as a stream, with nanoGPT's text for nanoGPT's seed."""

import io
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from model import GPT, GPTConfig, transpose_if_linear
from model.pretrained import Pretrained, ShapesOf
from model.weight_files import Stored
from orchestrator.checkpoint.formats.huggingface import write_huggingface
from orchestrator.checkpoint.formats.nanogpt import read_nanogpt, write_nanogpt
from orchestrator.checkpoint.snapshot import Snapshot
from orchestrator.commands import sample as sampling
from orchestrator.commands import sample_text
from orchestrator.commands.sample import SampleConfig, sample
from orchestrator.commands.sample_text import SEPARATOR, print_text
from orchestrator.config import parse
from orchestrator.data.gpt2_vocabulary import load_gpt2_encoding
from orchestrator.data.tokenizer_folder import read_tokenizer_folder
from orchestrator.data.tokenizers import CharTokenizer
from orchestrator.errors import CheckpointError, ConfigError, DataError
from tests.support.golden import CHARS, CKPT
from tests.support.golden import GREEDY as GREEDY_TOKENS
from tests.support.states import save_run

GREEDY_TEXT = "".join(CHARS[i] for i in GREEDY_TOKENS)
GREEDY = SampleConfig(init_from=str(CKPT), num_samples=1, max_new_tokens=80, temperature=0.0, device="cpu")


@pytest.fixture
def data_dir(tmp_path: Path) -> str:
    """A data_dir as nanoGPT leaves it, of which only the meta file was copied here."""
    folder = tmp_path / "data" / "shakespeare_char"
    folder.mkdir(parents=True)
    meta = {"vocab_size": 65, "itos": dict(enumerate(CHARS)), "stoi": {c: i for i, c in enumerate(CHARS)}}
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
    return str(tmp_path / "data")


def text_of(config: SampleConfig) -> str:
    out = io.StringIO()
    sample(config, out)
    return out.getvalue()


def with_tokenizer(snapshot: Snapshot, **changes: Any) -> Snapshot:
    config = {**snapshot.config, "tokenizer": CharTokenizer(CHARS).to_json()}
    return replace(snapshot, config=config, **changes)


def test_nanogpts_checkpoint_gives_the_recorded_text(data_dir: str) -> None:
    assert text_of(replace(GREEDY, data_dir=data_dir)) == f"{GREEDY_TEXT}\n{SEPARATOR}\n"


def test_a_seed_draws_the_text_that_nanogpt_draws(data_dir: str) -> None:
    """What nanoGPT's sample.py does, written out: seed, construct, load, then draw sample after sample."""
    torch.manual_seed(7)
    checkpoint = torch.load(CKPT, weights_only=True, map_location="cpu")
    model = GPT(GPTConfig(**checkpoint["model_args"])).eval()
    model.load_state_dict(checkpoint["model"])
    expected = ""
    for _ in range(2):
        idx = torch.tensor([[CHARS.index(c) for c in "ROMEO:"]])
        for _ in range(40):
            with torch.no_grad():
                logits, _ = model(idx[:, -32:])
            logits = logits[:, -1, :] / 0.8
            best, _ = torch.topk(logits, 10)
            logits[logits < best[:, [-1]]] = -float("inf")
            idx = torch.cat((idx, torch.multinomial(F.softmax(logits, dim=-1), num_samples=1)), dim=1)
        expected += "".join(CHARS[i] for i in idx[0].tolist()) + f"\n{SEPARATOR}\n"
    config = SampleConfig(str(CKPT), start="ROMEO:", num_samples=2, max_new_tokens=40, top_k=10, seed=7, device="cpu")
    assert text_of(replace(config, data_dir=data_dir)) == expected


def test_every_token_is_shown_when_it_is_drawn(data_dir: str) -> None:
    class Screen(io.StringIO):
        shown: list[str] = []  # noqa: RUF012

        def flush(self) -> None:
            self.shown.append(self.getvalue())

    screen = Screen()
    sample(replace(GREEDY, max_new_tokens=5, data_dir=data_dir), screen)
    assert screen.shown[:6] == [GREEDY_TEXT[:n] for n in range(1, 7)]


def test_a_run_is_sampled_by_checkpoint(tmp_path: Path) -> None:
    snapshot = with_tokenizer(read_nanogpt(CKPT))
    trained = save_run(tmp_path, replace(snapshot, iter_num=10, val_loss=2.0))
    zeros = {name: torch.zeros_like(tensor) for name, tensor in snapshot.model.items()}
    newest = save_run(tmp_path, replace(snapshot, iter_num=20, val_loss=4.0, model=zeros))
    config = replace(GREEDY, init_from="resume", out_dir=str(tmp_path))
    texts = {which: text_of(replace(config, checkpoint=which)) for which in ("auto", "latest", newest, "best", trained)}
    assert texts["auto"] == texts["latest"] == texts[newest] == "\n" * 81 + f"\n{SEPARATOR}\n"
    assert texts["best"] == texts[trained] == f"{GREEDY_TEXT}\n{SEPARATOR}\n"


@pytest.mark.parametrize("place", ["disk", "memory"])
def test_an_out_dir_of_nanogpts_is_sampled(tmp_path: Path, place: str) -> None:
    out_dir = str(tmp_path) if place == "disk" else "memory://sample/nanogpt-run"
    write_nanogpt(with_tokenizer(read_nanogpt(CKPT)), f"{out_dir}/ckpt.pt")
    assert text_of(replace(GREEDY, init_from="resume", out_dir=out_dir)).startswith(GREEDY_TEXT)


def test_a_hugging_face_folder_is_sampled(tmp_path: Path) -> None:
    write_huggingface(read_nanogpt(CKPT), tmp_path, CharTokenizer(CHARS))
    assert text_of(replace(GREEDY, init_from=str(tmp_path))).startswith(GREEDY_TEXT)
    assert read_tokenizer_folder(str(tmp_path)) == CharTokenizer(CHARS)
    (tmp_path / "char_tokenizer.json").write_text("{")
    with pytest.raises(DataError, match=r"char_tokenizer\.json is damaged"):
        read_tokenizer_folder(str(tmp_path))


def test_a_name_takes_gpt2s_tokenizer_and_shows_whole_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        encoding = load_gpt2_encoding()
    except DataError as error:
        pytest.skip(str(error))
    snowman = encoding.encode_ordinary("a☃b")  # its three bytes are two tokens
    assert len(snowman) == 4

    def stream(_model: GPT, idx: torch.Tensor, *_: Any, **__: Any) -> Any:
        assert idx.tolist() == [[50256]]
        yield from torch.tensor(snowman)[:, None, None]

    @contextmanager
    def opened(name: str, shapes_of: ShapesOf, _fs: object, revision: str) -> Iterator[Pretrained]:
        assert (name, revision) == ("gpt2", "")
        args = {"block_size": 4, "vocab_size": 50257, "n_layer": 1, "n_head": 1, "n_embd": 2, "bias": True}
        zeros = {name: torch.zeros(shape) for name, shape in shapes_of(args).items()}
        stored = {
            name: Stored(x.t().shape, x.dtype, partial(transpose_if_linear, name, x)) for name, x in zeros.items()
        }
        yield Pretrained(args, shapes_of(args), stored, [], {})

    monkeypatch.setattr(GPT, "generate_stream", stream)
    monkeypatch.setattr("orchestrator.checkpoint.formats.weights.open_pretrained", opened)
    written: list[str] = []
    monkeypatch.setattr(sample_text, "print_text", lambda _, text: written.append(text))
    sample(SampleConfig("gpt2", start="<|endoftext|>", num_samples=1, device="cpu"), io.StringIO())
    assert written == ["<|endoftext|>", "a", "", "☃", "b", f"\n{SEPARATOR}\n"]


def test_ctrl_c_ends_quietly(data_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = GPT.generate_stream

    def interrupted(*args: Any, **options: Any) -> Any:
        for n, token in enumerate(real(*args, **options)):
            if n == 3:
                raise KeyboardInterrupt
            yield token

    monkeypatch.setattr(GPT, "generate_stream", interrupted)
    assert text_of(replace(GREEDY, data_dir=data_dir)) == GREEDY_TEXT[:4] + "\n"


def test_a_closed_pipe_ends_quietly(data_dir: str) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w", encoding="utf-8") as out:
        sample(replace(GREEDY, data_dir=data_dir), out)


def test_a_poor_terminal_shows_question_marks() -> None:
    raw = io.BytesIO()
    out = io.TextIOWrapper(raw, encoding="ascii")
    print_text(out, "a☃b")
    assert raw.getvalue() == b"a?b"


def test_without_a_gpu_the_cpu_is_used(
    data_dir: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert text_of(replace(GREEDY, device="cuda", data_dir=data_dir)).startswith(GREEDY_TEXT)
    assert "device=cuda is not on this machine: device=cpu" in caplog.text


def test_a_prompt_comes_from_a_file(tmp_path: Path, data_dir: str) -> None:
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("Speak, ")
    config = replace(GREEDY, start=f"FILE:{prompt}", max_new_tokens=1, data_dir=data_dir)
    assert text_of(config).startswith("Speak, ")
    prompt.write_bytes(b"\xef\xbb\xbfSpeak, ")
    assert text_of(config).startswith("Speak, ")
    prompt.write_text("")
    with pytest.raises(ConfigError, match=r"prompt\.txt is empty"):
        sample(config)
    prompt.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not a readable text file"):
        sample(config)


def test_unusable_prompts_and_tokenizers_are_named(tmp_path: Path, data_dir: str) -> None:
    with pytest.raises(DataError, match=r"start='né'.*'é' \(U\+00E9\) at position 1"):
        sample(replace(GREEDY, start="né", data_dir=data_dir))
    with pytest.raises(ConfigError, match="start is empty"):
        sample(replace(GREEDY, start="", data_dir=data_dir))
    with pytest.raises(DataError, match=r"vocab_size=65, but the tokenizer 50257 tokens.*--data_dir"):
        sample(replace(GREEDY, data_dir=str(tmp_path / "elsewhere")))
    (Path(data_dir) / "shakespeare_char" / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 65}))
    with pytest.raises(DataError, match=r"meta\.pkl has no itos"):
        sample(replace(GREEDY, data_dir=data_dir))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"temperature": -0.1}, r"temperature=-0\.1 is out of range: 0 or more"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_k": 0}, "top_k=0 is out of range: 1 or more"),
        ({"num_samples": 0}, "num_samples=0"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"device": "gpu"}, "device='gpu' is no device"),
        ({"init_from": "gpt2-x"}, "did you mean gpt2-xl"),
        ({"init_from": "nowhere/ckpt.pt"}, r"nowhere/ckpt\.pt"),
    ],
)
def test_wrong_settings_are_refused(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sample(replace(GREEDY, **setting))


def test_missing_and_broken_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        sample(SampleConfig(out_dir=str(tmp_path / "nothing")))
    with pytest.raises(CheckpointError, match="init_from="):
        sample(replace(GREEDY, init_from=str(tmp_path)))
    snapshot = read_nanogpt(CKPT)
    for broken in ({**snapshot.model_args, "n_head": 7}, {**snapshot.model_args, "depth": 7}):
        with pytest.raises(CheckpointError, match="holds no GPT"):
            sampling.build(replace(snapshot, model_args=broken), snapshot.model.items())


def test_nanogpts_defaults_and_command_line() -> None:
    nanogpt = SampleConfig("resume", "out", "\n", 10, 500, 0.8, 200, 1337, "cuda", "auto", False)
    assert parse(SampleConfig, [], "sample") == nanogpt
    assert parse(SampleConfig, ["--temperature=1", "--init_from=gpt2"], "sample").temperature == 1.0
