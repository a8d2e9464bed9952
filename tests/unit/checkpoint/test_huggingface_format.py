"""Hugging Face folders: transformers computes with them what our model computes."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from model import GPT, GPTConfig
from orchestrator.checkpoint.formats.huggingface import write_huggingface
from orchestrator.checkpoint.snapshot import Snapshot
from orchestrator.data.gpt2_vocabulary import load_gpt2_encoding
from orchestrator.data.tokenizers import CharTokenizer, GPT2Tokenizer
from orchestrator.errors import CheckpointError, DataError

transformers = pytest.importorskip("transformers")
transformers.utils.logging.disable_progress_bar()


def make(bias: bool = True, activation: str = "gelu", vocab_size: int = 65) -> tuple[GPT, Snapshot]:
    torch.manual_seed(1)
    config = GPTConfig(
        block_size=16, vocab_size=vocab_size, n_layer=2, n_head=2, n_embd=32, bias=bias, activation=activation
    )
    model = GPT(config).eval()
    for parameter in model.parameters():  # away from the initial zeros and ones, which would hide a mix-up
        torch.nn.init.normal_(parameter, std=0.3)
    named = {name: parameter.detach() for name, parameter in model.named_parameters() if name != "lm_head.weight"}
    return model, Snapshot(named, {}, (), asdict(config), iter_num=5, best_val_loss=1.0)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_transformers_computes_the_same_logits(tmp_path: Path, bias: bool, activation: str) -> None:
    model, snapshot = make(bias, activation)
    write_huggingface(snapshot, tmp_path)
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path)
    assert theirs.lm_head.weight is theirs.transformer.wte.weight
    idx = torch.randint(65, (2, 16))
    with torch.no_grad():
        ours, _ = model(idx, idx)
        torch.testing.assert_close(theirs(idx).logits, ours, atol=1e-4, rtol=1e-4)


def test_folder_is_read_back_as_our_model(tmp_path: Path) -> None:
    model, snapshot = make(activation="gelu_tanh")
    write_huggingface(snapshot, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "generation_config.json", "model.safetensors"]
    again = GPT.from_pretrained(str(tmp_path))
    assert again.config == model.config
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_a_url_is_written() -> None:
    _, snapshot = make()
    write_huggingface(snapshot, "memory://huggingface-format/export/", CharTokenizer("ab"))
    names = [path.rsplit("/", 1)[-1] for path in MemoryFileSystem().ls("/huggingface-format/export", detail=False)]
    assert sorted(names) == ["char_tokenizer.json", "config.json", "generation_config.json", "model.safetensors"]
    GPT.from_pretrained("memory://huggingface-format/export")


def test_gpt2s_tokenizer_is_written_as_openai_wrote_it(tmp_path: Path) -> None:
    try:
        load_gpt2_encoding()
    except DataError as error:
        pytest.skip(str(error))
    _, snapshot = make(vocab_size=50304)
    write_huggingface(snapshot, tmp_path, GPT2Tokenizer())
    # Source: tiktoken_ext/openai_public.py, the hash of OpenAI's vocab.bpe
    digest = hashlib.sha256((tmp_path / "merges.txt").read_bytes()).hexdigest()
    assert digest == "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "Hello world, zażółć 123\n\n\tit's <|endoftext|>"
    ids = GPT2Tokenizer().encode(text, allow_special=True).tolist()
    assert theirs.encode(text) == ids
    assert theirs.decode(ids) == text
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == 50256


def test_what_is_no_gpt_is_refused(tmp_path: Path) -> None:
    _, snapshot = make()
    snapshot.model_args["n_head"] = 5
    with pytest.raises(CheckpointError, match="n_embd must be a multiple of n_head"):
        write_huggingface(snapshot, tmp_path)
