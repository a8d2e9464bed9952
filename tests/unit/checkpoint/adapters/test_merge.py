"""Adapters and their base model, merged into the plain model that computes the same: in every command, by every way."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from model import GPT, LoRAConfig
from model.lora import LAYERS
from orchestrator.checkpoint.formats import base as merging
from orchestrator.checkpoint.formats.huggingface import write_huggingface
from orchestrator.checkpoint.formats.nanogpt import read_nanogpt, write_nanogpt
from orchestrator.checkpoint.formats.sources import Kind, base_of, find_base, find_source
from orchestrator.checkpoint.formats.weights import look_at, read_merged, read_source, using
from orchestrator.checkpoint.snapshot import Adapters, Base, Snapshot
from orchestrator.commands.sample import SampleConfig, build, sample
from orchestrator.data.tokenizers import CharTokenizer
from orchestrator.errors import CheckpointError
from tests.support.adapters import save_adapters, trained_adapters
from tests.support.bases import CHARS
from tests.support.commands import Say
from tests.support.damage import flip_a_bit
from tests.support.states import SMALL, random_state, save_run

IDX = torch.arange(8).view(2, 4) % 11
LORA = LoRAConfig(2, 3.0, ("attn.c_attn", "mlp.c_proj"))


@pytest.fixture
def base() -> Snapshot:
    return replace(random_state(SMALL, iter_num=0), config={"tokenizer": CharTokenizer(CHARS).to_json()})


def logits(model: GPT) -> Tensor:
    with torch.no_grad():
        return model.eval()(IDX, IDX)[0]  # type: ignore[no-any-return]


def plain(snapshot: Snapshot) -> GPT:
    return build(snapshot, snapshot.model.items())


def assert_same(snapshot: Snapshot, model: GPT) -> None:
    assert (logits(plain(snapshot)) - logits(model)).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("targets", [("attn.c_attn",), LAYERS])
def test_the_merged_model_computes_the_same(
    base: Snapshot, base_dir: Path, tmp_path: Path, dtype: str, targets: tuple[str, ...]
) -> None:
    lora = LoRAConfig(2, 3.0, targets, dtype)
    model = save_adapters(tmp_path / "run", base, lora, Base(str(base_dir)))
    merged = read_merged(find_source(SampleConfig(out_dir=str(tmp_path / "run"))))
    assert_same(merged, model)
    assert (logits(plain(base)) - logits(model)).abs().max() > 0.1, "else this would show nothing"
    assert (merged.adapters, merged.optimizer, merged.iter_num) == (None, {}, 7)
    assert merged.config["tokenizer"]["chars"] == CHARS
    assert all(tensor.dtype == torch.float32 for tensor in merged.model.values())


@pytest.mark.parametrize("kind", ["ckpt.pt", "run", "hf"])
def test_every_kind_of_base_is_found_where_it_was(base: Snapshot, base_dir: Path, tmp_path: Path, kind: str) -> None:
    write_nanogpt(base, tmp_path / "ckpt.pt")
    name = save_run(tmp_path / "run", base)
    where = {"ckpt.pt": tmp_path / "ckpt.pt", "run": tmp_path / "run", "hf": base_dir}[kind]
    known = base_of(find_source(SampleConfig(str(where))))
    assert known == Base(str(where), name if kind == "run" else "")
    model = save_adapters(tmp_path / "lora", base, LORA, known)
    assert_same(read_merged(find_source(SampleConfig(out_dir=str(tmp_path / "lora")))), model)


def test_a_shorter_block_size_cuts_the_bases_positions(base: Snapshot, base_dir: Path, tmp_path: Path) -> None:
    short = replace(
        base,
        model={**base.model, "transformer.wpe.weight": base.model["transformer.wpe.weight"][:3]},
        model_args={**base.model_args, "block_size": 3},
    )
    model = save_adapters(tmp_path / "run", short, LORA, Base(str(base_dir)))
    merged = read_merged(find_source(SampleConfig(out_dir=str(tmp_path / "run"))))
    assert merged.model_args["block_size"] == 3
    assert torch.equal(merged.model["transformer.wpe.weight"], model.transformer.wpe.weight)


def test_the_base_is_merged_a_tensor_at_a_time(
    base: Snapshot, base_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_adapters(tmp_path / "run", base, LORA, Base(str(base_dir)))
    asked: list[str] = []
    original = merging.merged
    monkeypatch.setattr(merging, "merged", lambda name, *rest: asked.append(name) or original(name, *rest))
    counts = []

    def use(weights: object) -> None:
        for _ in weights.tensors:  # type: ignore[attr-defined]
            counts.append(len(asked))

    using(find_source(SampleConfig(out_dir=str(tmp_path / "run"))), use)
    assert counts == list(range(1, len(base.model) + 1)), "each is merged when it is asked for, and no other"


def test_adapters_alone_are_read_for_training(base: Snapshot, base_dir: Path, tmp_path: Path) -> None:
    save_adapters(tmp_path / "run", base, LORA, Base(str(base_dir)))
    shutil.rmtree(base_dir)
    source = find_source(SampleConfig(out_dir=str(tmp_path / "run")))
    found, outlined = read_source(source), look_at(source)
    for each in (found, outlined):
        assert isinstance(each.adapters, Adapters)
        assert (each.adapters.lora, each.adapters.base.source) == (LORA, str(base_dir))
        assert each.model_args["n_embd"] == SMALL["n_embd"]
        assert set(each.model) == {
            f"transformer.h.{i}.{layer}.{part}"
            for i in (0, 1)
            for layer in LORA.targets
            for part in ("lora_A", "lora_B")
        }
    assert {name: x.shape for name, x in found.model.items()} == {name: x.shape for name, x in outlined.model.items()}


# what every command says and makes


def test_every_command_takes_a_run_of_adapters(base: Snapshot, base_dir: Path, tmp_path: Path, say: Say) -> None:
    model = save_adapters(tmp_path / "run", base, LORA, Base(str(base_dir)))
    words = f"--out_dir={tmp_path}/run"
    out = io.StringIO()
    sample(SampleConfig(out_dir=f"{tmp_path}/run", start="abc", num_samples=1, max_new_tokens=2, device="cpu"), out)
    assert out.getvalue().startswith("abc")
    assert "(iteration 7)" in say("export", words, f"--to={tmp_path}/x.pt")
    assert_same(read_nanogpt(tmp_path / "x.pt"), model)
    say("export", words, "--format=hf", f"--to={tmp_path}/merged")
    again = read_source(find_source(SampleConfig(f"{tmp_path}/merged")))
    assert_same(again, model)
    assert again.config["tokenizer"]["chars"] == CHARS
    told = say("inspect", words, "--verify")
    assert "adapters: LoRA of rank 2, alpha 3, on attn.c_attn, mlp.c_proj" in told
    assert f"base model: {base_dir}, its matrices held in float32" in told
    assert "base's values: verified, all finite" in told


def test_an_export_does_not_replace_the_base(base: Snapshot, base_dir: Path, tmp_path: Path, say: Say) -> None:
    save_adapters(tmp_path / "run", base, LORA, Base(str(base_dir)))
    words = (f"--out_dir={tmp_path}/run", f"--to={base_dir}", "--overwrite=True")
    assert f"--to={base_dir} lies in what is exported, {base_dir}" in say("export", "--format=hf", *words, code=2)
    say("export", "--format=peft", f"--out_dir={tmp_path}/run", f"--to={tmp_path}/new")


@pytest.mark.parametrize("kind", ["run", "ckpt.pt", "hf", "gpt2"])
def test_a_whole_model_is_no_adapter(base: Snapshot, base_dir: Path, tmp_path: Path, say: Say, kind: str) -> None:
    write_nanogpt(base, tmp_path / "ckpt.pt")
    save_run(tmp_path / "run", base)
    where = {"ckpt.pt": tmp_path / "ckpt.pt", "run": tmp_path / "run", "hf": base_dir, "gpt2": "gpt2"}[kind]
    said = say("export", f"--init_from={where}", "--format=peft", f"--to={tmp_path}/new", code=2)
    assert f"format=peft writes adapters, and {where} holds a whole model: give --format=hf" in said
    assert not (tmp_path / "new").exists()


# the base is another, damaged or away


def test_another_base_is_an_error_that_names_it(base: Snapshot, base_dir: Path, tmp_path: Path, say: Say) -> None:
    save_adapters(tmp_path / "run", base, LORA, Base(str(base_dir)))
    changed = {**base.model, "transformer.ln_f.bias": base.model["transformer.ln_f.bias"] + 1e-6}
    write_huggingface(replace(base, model=changed), base_dir)
    words = f"--out_dir={tmp_path}/run"
    said = say("export", words, "--format=hf", f"--to={tmp_path}/merged", code=2)
    assert f"{base_dir} is not the base model that these adapters were trained beside: its checksum differs" in said
    assert not (tmp_path / "merged" / "model.safetensors").exists(), "nothing is delivered"
    assert f"base's values: {base_dir} is not the base model" in say("inspect", words, "--verify")

    write_huggingface(base, tmp_path / "moved")
    say("export", words, "--format=hf", f"--to={tmp_path}/right", f"--lora_base={tmp_path}/moved")
    other = random_state({**SMALL, "n_embd": 16})
    write_huggingface(other, tmp_path / "wide")
    said = say("export", words, f"--to={tmp_path}/y.pt", f"--lora_base={tmp_path}/wide", code=2)
    assert (
        "wide is not the base model that these adapters were trained beside: transformer.wte.weight is (11, 16)" in said
    )


def test_a_base_that_is_away(base: Snapshot, base_dir: Path, tmp_path: Path, say: Say) -> None:
    save_adapters(tmp_path / "run", base, LORA, Base(str(base_dir)))
    base_dir.rename(tmp_path / "elsewhere")
    said = say("sample", f"--out_dir={tmp_path}/run", code=2)
    assert "the base model of these adapters is missing" in said
    assert "give --lora_base=PATH" in said
    say("export", f"--out_dir={tmp_path}/run", f"--to={tmp_path}/x.pt", f"--lora_base={tmp_path}/elsewhere")


def test_a_run_that_has_deleted_the_checkpoint_says_so(base: Snapshot, tmp_path: Path, say: Say) -> None:
    name = save_run(tmp_path / "whole", base)
    save_adapters(tmp_path / "run", base, LORA, Base(str(tmp_path / "whole"), name))
    save_run(tmp_path / "whole", replace(base, iter_num=20))
    shutil.rmtree(tmp_path / "whole" / name)
    said = say("sample", f"--out_dir={tmp_path}/run", code=2)
    assert f"the run {tmp_path}/whole has deleted {name}, beside which they were trained" in said
    assert "--lora_base=PATH" in said


def test_a_damaged_base_does_not_make_the_adapters_damaged(base: Snapshot, tmp_path: Path, say: Say) -> None:
    name = save_run(tmp_path / "whole", base)
    for iter_num in (6, 7):
        save_adapters(tmp_path / "run", base, LORA, Base(str(tmp_path / "whole"), name), iter_num)
    (file,) = (tmp_path / "whole" / name).glob("model-*")
    flip_a_bit(file.parent, file.name)
    said = say("export", f"--out_dir={tmp_path}/run", f"--to={tmp_path}/x.pt", code=2)
    assert "the base model of checkpoint_00000007_local (iteration 7) is damaged" in said
    assert "falling back" not in said


def test_damaged_adapters_fall_back_to_older_ones(base: Snapshot, base_dir: Path, tmp_path: Path) -> None:
    older = save_adapters(tmp_path / "run", base, LORA, Base(str(base_dir)), iter_num=6)
    save_adapters(tmp_path / "run", base, LORA, Base(str(base_dir)), iter_num=7)
    (file,) = tmp_path.glob("run/checkpoint_00000007_*/model-*")
    flip_a_bit(file.parent, file.name)
    merged = read_merged(find_source(SampleConfig(out_dir=str(tmp_path / "run"))))
    assert merged.iter_num == 6
    assert_same(merged, older)


def test_adapters_are_no_base(base: Snapshot, base_dir: Path, tmp_path: Path, say: Say) -> None:
    save_adapters(tmp_path / "run", base, LORA, Base(str(base_dir)))
    words = f"--out_dir={tmp_path}/run"
    say("export", words, "--format=peft", f"--to={tmp_path}/peft")
    for other in ("run", "peft"):
        said = say("sample", words, f"--lora_base={tmp_path}/{other}", code=2)
        assert f"{tmp_path}/{other} holds adapters, and adapters need a whole model" in said
        with pytest.raises(CheckpointError, match="holds adapters"):
            base_of(find_source(SampleConfig(f"{tmp_path}/{other}")))


def test_adapters_that_are_no_numbers_are_refused(base: Snapshot, base_dir: Path, tmp_path: Path, say: Say) -> None:
    state, _ = trained_adapters(base, LORA, Base(str(base_dir)))
    name = "transformer.h.0.attn.c_attn.lora_B"
    save_run(tmp_path / "run", replace(state, model={**state.model, name: state.model[name] * float("nan")}))
    words = f"--out_dir={tmp_path}/run"
    said = say("export", words, f"--to={tmp_path}/x.pt", code=2)
    assert f"{name} has 48 of 48 values that are not finite" in said
    assert f"{name} has 48 values that are NaN" in say("inspect", words, "--verify")


def test_programs_of_before_know_no_such_format(base: Snapshot, base_dir: Path, tmp_path: Path) -> None:
    save_adapters(tmp_path / "run", base, LORA, Base(str(base_dir)))
    (path,) = tmp_path.glob("run/checkpoint_*/state.json")
    state = json.loads(path.read_text())
    assert state["format_version"] == 2
    assert state["adapters"] == {
        **{"rank": 2, "alpha": 3.0, "targets": ["attn.c_attn", "mlp.c_proj"], "base_dtype": "float32"},
        "base": {"source": str(base_dir), "revision": "", "checksum": state["adapters"]["base"]["checksum"]},
    }
    assert len(state["adapters"]["base"]["checksum"]) == 32


# the Hub


@pytest.fixture
def hub(base: Snapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the Hub with two commits of a small gpt2, the second one as main; offline."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    snapshots = tmp_path / "cache" / "models--openai-community--gpt2" / "snapshots"
    write_huggingface(base, snapshots / "c0ffee")
    write_huggingface(random_state(SMALL, iter_num=99), snapshots / "beef")

    def download(_repo: str, name: str, revision: str | None = None, local_files_only: bool = False) -> str:
        path = snapshots / (revision or "beef") / name
        if not path.exists():
            raise LocalEntryNotFoundError(f"offline: {local_files_only}")
        return str(path)

    sizes = {key: SMALL[key] for key in ("n_layer", "n_head", "n_embd")}
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setitem(__import__("model.pretrained").pretrained.GPT2_SIZES, "gpt2", sizes)
    small = {**sizes, "block_size": 4, "vocab_size": 11, "bias": True, "activation": "gelu"}
    monkeypatch.setattr("model.pretrained.read_pretrained_args", lambda _: small)
    monkeypatch.setattr("orchestrator.checkpoint.formats.weights.read_pretrained_args", lambda _: small)
    return snapshots


def test_a_base_of_the_hub_is_read_at_its_commit(base: Snapshot, hub: Path, tmp_path: Path, say: Say) -> None:
    newest = find_source(SampleConfig("gpt2"))
    assert base_of(newest) == Base("gpt2", "beef")
    assert base_of(replace(newest, which="c0ffee")) == Base("gpt2", "c0ffee")
    model = save_adapters(tmp_path / "run", base, LORA, Base("gpt2", "c0ffee"))
    source = find_source(SampleConfig(out_dir=str(tmp_path / "run")))
    assert_same(read_merged(source), model)
    assert source.settings
    found = find_base(source.settings, Base("gpt2", "c0ffee"))
    assert (found.kind, found.revision) == (Kind.HUB, "c0ffee")
    assert "base model: gpt2 at c0ffee" in say("inspect", f"--out_dir={tmp_path}/run")
    shutil.rmtree(hub / "c0ffee")
    assert base_of(replace(newest, which="c0ffee")) == Base("gpt2", ""), "it is not here"
    assert "cannot reach the Hugging Face Hub" in say("export", f"--out_dir={tmp_path}/run", "--to=x.pt", code=2)
