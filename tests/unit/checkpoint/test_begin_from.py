"""New runs from runs, ckpt.pt files and folders: what they take along, what cannot be meant, when a run is finished."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from orchestrator.__main__ import main
from orchestrator.checkpoint.formats.huggingface import write_huggingface
from orchestrator.checkpoint.formats.nanogpt import read_nanogpt, write_nanogpt
from orchestrator.checkpoint.snapshot import Snapshot, tensors_equal
from orchestrator.checkpoint.store import parse_state, state_text
from orchestrator.config import TrainConfig, check
from orchestrator.data.tokenizers import CharTokenizer
from orchestrator.distributed.device import resolve
from orchestrator.distributed.world import World
from orchestrator.driver.preflight import plan
from orchestrator.errors import CheckpointError, ConfigError, DataError, FinishedRunError, UserError
from orchestrator.loop import train
from orchestrator.telemetry.records import to_json
from orchestrator.training.attempt import Callbacks
from orchestrator.worker import plain
from tests.conftest import final_state
from tests.support import ranks
from tests.support.runs import checkpoints_in
from tests.support.weights import random_weights
from tests.unit.commands.test_sample import save_run


@pytest.fixture
def small(tiny: TrainConfig) -> TrainConfig:
    """Settings of a run of four iterations in one process, with checkpoints at two and four."""
    return replace(
        tiny, max_iters=4, checkpoint_interval=2, eval_interval=2, num_workers=1, gradient_accumulation_steps=1
    )


@pytest.fixture
def first(small: TrainConfig) -> TrainConfig:
    """That run, ended."""
    for max_iters in (2, 4):  # the last state is always saved, others only if the one before has been
        train(resolve(replace(small, max_iters=max_iters)), World())
    return small


def begun(config: TrainConfig) -> tuple[int, Snapshot]:
    """Plan and train; return the iteration where that began, and the end."""
    plan(config)
    began: list[int] = []
    train(resolve(check(config)), World(), Callbacks(lambda record: began.append(to_json(record)["iter"])))
    return began[0], final_state(config.out_dir)


def beside(config: TrainConfig, name: str, **changes: Any) -> TrainConfig:
    return replace(config, out_dir=str(Path(config.out_dir).with_name(name)), **changes)


def names(config: TrainConfig) -> dict[int, str]:
    return {checkpoint.iter_num: checkpoint.name for checkpoint in checkpoints_in(config.out_dir).newest_first()}


def flags(config: TrainConfig) -> list[str]:
    return [f"--{key}={value}" for key, value in asdict(config).items()]


# a run as the beginning of another


def test_a_run_is_gone_on_with_elsewhere_to_the_same_bits(first: TrainConfig) -> None:
    again = beside(first, "again", init_from=first.out_dir, max_iters=8)
    began, end = begun(again)
    assert began == 4
    train(resolve(replace(first, max_iters=8)), World())
    straight = final_state(first.out_dir)
    assert tensors_equal(end, straight)
    assert (end.iter_num, end.best_val_loss) == (8, straight.best_val_loss)
    assert plan(replace(again, max_iters=9)).start.iter_num == 8, "the same command goes on with its own out_dir"


@pytest.mark.parametrize("by", ["path", "key", "url", "best"])
def test_one_of_its_checkpoints_is_chosen(first: TrainConfig, by: str) -> None:
    path = Path(first.out_dir, names(first)[2], "state.json")
    if by == "best":  # make the older one the better
        make_best(path)
    source = {"path": str(path.parent), "url": path.parent.as_uri()}.get(by, first.out_dir)
    which = {"key": names(first)[2], "best": "best"}.get(by, "auto")
    began, _ = begun(beside(first, "again", init_from=source, init_checkpoint=which))
    assert began == 2


def make_best(path: Path) -> None:
    state = parse_state(path.read_bytes(), "")
    path.write_text(state_text({**state, "val_loss": 0.5}))


def source_of_kind(kind: str, first: TrainConfig, folder: Path) -> str:
    """Return where the first run's last state lies: the run itself, or a ckpt.pt or Hugging Face folder made of it."""
    saved = final_state(first.out_dir)
    source = {"run": first.out_dir, "ckpt.pt": str(folder / "x.pt"), "folder": str(folder / "hf")}[kind]
    if kind == "ckpt.pt":
        write_nanogpt(saved, source)
    elif kind == "folder":
        write_huggingface(saved, source, CharTokenizer(saved.config["tokenizer"]["chars"]))
    return source


@pytest.mark.parametrize("kind", ["run", "ckpt.pt", "folder"])
def test_weights_alone_begin_at_0_with_new_moments(first: TrainConfig, tmp_path: Path, kind: str) -> None:
    saved = final_state(first.out_dir)
    source = source_of_kind(kind, first, tmp_path)
    still = {"learning_rate": 1e-30, "min_lr": 0.0, "weight_decay": 0.0}
    config = beside(first, "tuned", init_from=source, init_weights_only=True, max_iters=1, **still)
    began, end = begun(config)
    assert (began, end.iter_num, end.optimizer["step"].item()) == (0, 1, 1.0)
    assert end.best_val_loss < 1e9, "the first evaluation is the best one"
    assert all(torch.equal(end.model[name], tensor) for name, tensor in saved.model.items()), (
        "such a rate moves nothing"
    )


def test_weights_alone_are_taken_of_a_file_with_another_optimizer(first: TrainConfig, tmp_path: Path) -> None:
    write_nanogpt(final_state(first.out_dir), path := tmp_path / "x.pt")
    content = torch.load(path, weights_only=True)
    content["optimizer"] = {"state": {0: {"momentum_buffer": None}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    torch.save(content, path)
    config = beside(first, "tuned", init_from=str(path), max_iters=5)
    with pytest.raises(CheckpointError, match=r"groups have no betas, but lr.*--init_weights_only=True"):
        plan(config)
    assert begun(replace(config, init_weights_only=True))[0] == 0


def test_a_damaged_checkpoint_of_the_source_falls_back_or_is_named(
    first: TrainConfig, caplog: pytest.LogCaptureFixture
) -> None:
    path = Path(first.out_dir, names(first)[4], "model-00000-of-00001.safetensors")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    config = beside(first, "again", init_from=first.out_dir, max_iters=6)
    named = replace(config, init_checkpoint=names(first)[4])
    with pytest.raises(CheckpointError, match=r"model-00000-of-00001\.safetensors is damaged: its checksum differs"):
        train(resolve(named), World())
    assert begun(config)[0] == 2
    assert f"checkpoint {names(first)[4]} is not whole, falling back to the one before" in caplog.text


def test_a_run_at_a_url(first: TrainConfig) -> None:
    memory = fsspec.filesystem("memory")
    for path in Path(first.out_dir).rglob("*"):
        if path.is_file():
            memory.pipe_file(f"/begin-from/{path.relative_to(first.out_dir)}", path.read_bytes())
    began, end = begun(beside(first, "again", init_from="memory://begin-from", max_iters=6))
    assert (began, end.iter_num) == (4, 6)


@pytest.mark.slow
def test_a_run_is_gone_on_with_on_two_ranks(first: TrainConfig, tmp_path: Path) -> None:
    two = beside(first, "two", init_from=first.out_dir, max_iters=6, gradient_accumulation_steps=2)
    ended = ranks.train(two, 2, tmp_path / "log", memory_dirs=[first.memory_dir] * 2)
    assert ended.is_done, ended.said
    assert final_state(two.out_dir).iter_num == 6


def test_what_chooses_must_have_something_to_choose_from(first: TrainConfig, tmp_path: Path) -> None:
    write_nanogpt(final_state(first.out_dir), tmp_path / "x.pt")
    config = beside(first, "again", max_iters=9)
    for changes, told in (
        ({"init_weights_only": True}, "init_from=scratch has none: give --init_from"),
        ({"init_checkpoint": "best"}, "chooses a checkpoint of another run: give --init_from=RUN"),
        ({"init_from": str(tmp_path / "x.pt"), "init_checkpoint": "best"}, "but .*x.pt is nanoGPT's ckpt.pt"),
        ({"init_from": f"{first.out_dir}/{names(first)[2]}", "init_checkpoint": "best"}, "is one checkpoint, but"),
    ):
        with pytest.raises(ConfigError, match=told):
            plan(replace(config, **changes))
    with pytest.raises(CheckpointError, match=f"init_from={first.out_dir} holds no whole checkpoint checkpoint_9;"):
        plan(replace(config, init_from=first.out_dir, init_checkpoint="checkpoint_9"))


def test_another_beginning_of_the_same_out_dir_is_refused(first: TrainConfig) -> None:
    again = beside(first, "again", init_from=first.out_dir, init_checkpoint=names(first)[2])
    begun(again)
    more = replace(again, max_iters=9)
    with pytest.raises(ConfigError, match="begun with init_checkpoint=checkpoint_00000002_local, asked for init_check"):
        plan(replace(more, init_checkpoint="latest"))
    for changes in ({}, {"init_from": "resume", "init_checkpoint": "auto"}):
        with pytest.raises(
            ConfigError, match="holds a run, which goes on with all of its state; init_weights_only=True"
        ):
            plan(replace(more, init_weights_only=True, **changes))
        assert plan(replace(more, **changes)).start.iter_num == 4


# a new run that could take no step; a run that is finished


@pytest.mark.parametrize("kind", ["run", "ckpt.pt"])
def test_a_new_run_past_max_iters_is_refused(first: TrainConfig, tmp_path: Path, kind: str) -> None:
    write_nanogpt(final_state(first.out_dir), tmp_path / "x.pt")
    source = first.out_dir if kind == "run" else str(tmp_path / "x.pt")
    config = beside(first, "again", init_from=source, max_iters=3)
    told = (
        r"is at iteration 4 and max_iters=3: a new run could take no step\. Raise --max_iters, or give --init_weights"
    )
    for start in (plan, lambda config: train(resolve(config), World())):
        with pytest.raises(ConfigError, match=told):
            start(config)
    assert not Path(config.out_dir, names(first)[4]).exists()
    assert plan(replace(config, eval_only=True)).start.iter_num == 4
    assert plan(replace(config, init_weights_only=True)).start.iter_num == 0
    with pytest.raises(ConfigError, match="max_iters=0: a new run could take no step"):
        plan(beside(first, "other", max_iters=0))


@pytest.fixture
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "local")
    monkeypatch.setattr("ray.init", lambda *_args, **_options: pytest.fail("a cluster was started"))


def everything_in(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


@pytest.mark.usefixtures("no_cluster")
@pytest.mark.parametrize("max_iters", [4, 3])
def test_a_finished_run_says_so_and_exits_0(
    first: TrainConfig, capsys: pytest.CaptureFixture[str], max_iters: int
) -> None:
    before = everything_in(Path(first.out_dir).parent)
    assert main(["train", *flags(replace(first, max_iters=max_iters))]) == 0
    output = capsys.readouterr()
    assert (
        f"out_dir={first.out_dir} is finished: iteration 4 of max_iters={max_iters} ({names(first)[4]})" in output.out
    )
    assert "To go on, raise --max_iters; to begin anew, give another --out_dir\nnext:\n" in output.out
    assert f"sample --out_dir={first.out_dir}" in output.out
    assert everything_in(Path(first.out_dir).parent) == before
    assert output.err == ""


@pytest.mark.usefixtures("no_cluster")
def test_a_finished_run_needs_neither_data_nor_a_writable_folder(
    first: TrainConfig, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.driver.preflight.check_writable", lambda *_: pytest.fail("something was written"))
    assert main(["train", *flags(replace(first, data_dir="/nowhere"))]) == 0
    assert "is finished: iteration 4" in capsys.readouterr().out


@pytest.mark.usefixtures("no_cluster")
def test_nanogpts_finished_run_says_so_too(
    first: TrainConfig, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "nanogpt").mkdir()
    write_nanogpt(final_state(first.out_dir), tmp_path / "nanogpt" / "ckpt.pt")
    config = replace(first, out_dir=str(tmp_path / "nanogpt"), init_from="resume")
    before = everything_in(tmp_path / "nanogpt")
    assert main(["train", *flags(config)]) == 0
    assert "is finished: iteration 4 of max_iters=4 (ckpt.pt)" in capsys.readouterr().out
    assert everything_in(tmp_path / "nanogpt") == before
    assert plan(replace(config, max_iters=5)).start.iter_num == 4


@pytest.mark.parametrize("kind", ["run", "nanogpt"])
def test_the_plain_loop_says_so(
    first: TrainConfig, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = first
    if kind == "nanogpt":
        (tmp_path / "nanogpt").mkdir()
        write_nanogpt(final_state(first.out_dir), tmp_path / "nanogpt" / "ckpt.pt")
        config = replace(first, out_dir=str(tmp_path / "nanogpt"), init_from="resume")
    before = everything_in(Path(config.out_dir))
    assert plain.main(flags(config)) == 0
    assert capsys.readouterr().out.count("is finished: iteration 4 of max_iters=4") == 1
    assert everything_in(Path(config.out_dir)) == before


@pytest.mark.slow
def test_the_plain_loop_says_so_once_under_torchrun(first: TrainConfig) -> None:
    before = everything_in(Path(first.out_dir))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [sys.executable, *launcher, "-m", "orchestrator.loop", *flags(first)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("is finished: iteration 4 of max_iters=4") == 1
    assert everything_in(Path(first.out_dir)) == before


def test_settings_of_another_model_come_before(first: TrainConfig) -> None:
    with pytest.raises(ConfigError, match="holds another model"):
        plan(replace(first, n_layer=3))
    with pytest.raises(FinishedRunError, match="is finished"):
        plan(first)


# vocabularies


@pytest.fixture
def other_data(data_dir: str, tmp_path: Path) -> str:
    """The same dataset with two characters exchanged: as many, and all tokens fit."""
    folder = tmp_path / "other"
    shutil.copytree(Path(data_dir, "tiny"), folder / "tiny")
    meta = json.loads((folder / "tiny" / "meta.json").read_text())
    chars = list(meta["tokenizer"]["chars"])
    chars[3], chars[5] = chars[5], chars[3]
    meta["tokenizer"]["chars"] = "".join(chars)
    (folder / "tiny" / "meta.json").write_text(json.dumps(meta))
    return str(folder)


def refused_twice(config: TrainConfig, told: str, kind: type[UserError] = DataError) -> None:
    """Check that the driver refuses it, and a worker that alone sees the data, too."""
    with pytest.raises(kind, match=told):
        plan(config)
    with pytest.raises(kind, match=told):
        train(resolve(config), World())


Source = Callable[[Snapshot, Path], str]


@pytest.mark.parametrize("kind", ["run", "ckpt.pt", "folder"])
def test_other_characters_are_refused(first: TrainConfig, tmp_path: Path, other_data: str, kind: str) -> None:
    saved = final_state(first.out_dir)
    source = source_of_kind(kind, first, tmp_path)
    config = beside(first, "again", init_from=source, max_iters=9, data_dir=other_data)
    chars = saved.config["tokenizer"]["chars"]
    told = f"have different vocabularies: .*token 3 is {chars[3]!r} to the model, {chars[5]!r} in the dataset"
    refused_twice(config, told)
    assert plan(replace(config, data_dir=first.data_dir)).start.iter_num in (0, 4)


def test_the_data_of_a_run_may_not_change_their_meaning(first: TrainConfig, other_data: str) -> None:
    refused_twice(
        replace(first, max_iters=9, data_dir=other_data), "has other tokens than the run in out_dir=.* token 3 is"
    )


def test_nanogpts_own_file_is_known_by_its_dataset(first: TrainConfig, tmp_path: Path, other_data: str) -> None:
    saved = final_state(first.out_dir)
    bare = replace(saved, config={"dataset": "before"})
    write_nanogpt(bare, tmp_path / "x.pt")
    config = beside(first, "again", init_from=str(tmp_path / "x.pt"), max_iters=9, data_dir=other_data)
    assert plan(config).start.iter_num == 4, "nothing tells what its tokens mean"
    shutil.copytree(Path(first.data_dir, "tiny"), Path(other_data, "before"))
    refused_twice(config, "token 3 is")


def test_gpt2s_weights_and_characters_are_refused(small: TrainConfig, tmp_path: Path) -> None:
    write_huggingface(random_weights(vocab_size=50257, n_embd=8), tmp_path / "hf")
    config = replace(small, init_from=str(tmp_path / "hf"))
    refused_twice(config, r"the model's tokens are GPT-2's, the dataset's \d+ characters")
    with pytest.raises(DataError, match="gpt2 and dataset=tiny have different vocabularies"):
        plan(replace(small, init_from="gpt2"))
    write_nanogpt(random_weights(vocab_size=50304, n_embd=8), tmp_path / "openwebtext.pt")
    refused_twice(replace(small, init_from=str(tmp_path / "openwebtext.pt")), "the model's tokens are GPT-2's")


def test_a_vocabulary_of_another_size_is_warned_about(
    small: TrainConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_huggingface(random_weights(vocab_size=5000), tmp_path / "hf")
    plan(replace(small, init_from=str(tmp_path / "hf")))
    assert "has vocab_size=5000, dataset=tiny" in caplog.text


# weights that are no numbers


@pytest.mark.parametrize("kind", ["folder", "ckpt.pt", "run"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(
    first: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, value: float
) -> None:
    saved = final_state(first.out_dir)
    saved.model["transformer.h.1.ln_1.weight"][3:5] = value
    saved.model["transformer.ln_f.weight"][0] = value
    source = {"run": str(tmp_path / "bad"), "ckpt.pt": str(tmp_path / "x.pt"), "folder": str(tmp_path / "hf")}[kind]
    if kind == "ckpt.pt":
        write_nanogpt(saved, source)
    elif kind == "folder":
        write_huggingface(saved, source, CharTokenizer(saved.config["tokenizer"]["chars"]))
    else:
        save_run(Path(source), saved)
    told = "transformer.h.1.ln_1.weight has 2 of 32 values that are not finite (NaN or infinity)"
    for words in (
        ["sample", "--device=cpu"],
        ["export", f"--to={tmp_path}/out.pt"],
        ["export", "--format=hf", f"--to={tmp_path}/o"],
    ):
        assert main([*words, f"--init_from={source}"]) == 2
        said = capsys.readouterr().err
        assert told in said
        assert "Traceback" not in said
    assert not (tmp_path / "out.pt").exists()
    assert not (tmp_path / "o" / "model.safetensors").exists()
    config = beside(first, "again", init_from=source, max_iters=9)
    with pytest.raises(CheckpointError, match=r"transformer\.h\.1\.ln_1\.weight has 2 of 32 values"):
        train(resolve(config), World())
    if kind != "run":
        with pytest.raises(CheckpointError, match=r"transformer\.h\.1\.ln_1\.weight has 2 of 32 values"):
            plan(config)
    assert main(["inspect", f"--init_from={source}", "--verify"]) == 0
    told = "NOT FINITE: transformer.h.1.ln_1.weight has 2 values" if kind == "run" else told
    assert told in capsys.readouterr().out


def test_all_ranks_are_told_alike(first: TrainConfig, tmp_path: Path) -> None:
    saved = final_state(first.out_dir)
    saved.model["transformer.ln_f.weight"][0] = float("nan")
    write_nanogpt(saved, tmp_path / "x.pt")
    config = beside(first, "again", init_from=str(tmp_path / "x.pt"), max_iters=9, gradient_accumulation_steps=2)
    ended = ranks.train(config, 2, tmp_path / "log", memory_dirs=[first.memory_dir] * 2)
    assert not ended.is_done
    assert ended.said.count("CheckpointError: ") == 2
    assert ended.said.count("transformer.ln_f.weight has 1 of 32 values that are not finite") == 2


def test_logits_that_overflow_are_one_line(
    first: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = final_state(first.out_dir)
    saved.model["transformer.ln_f.weight"].fill_(3e38)  # finite, as after a flipped bit of the exponent
    write_nanogpt(saved, tmp_path / "x.pt")
    for temperature in (0.0, 1.0):
        assert main(["sample", f"--init_from={tmp_path}/x.pt", "--device=cpu", f"--temperature={temperature}"]) == 2
        said = capsys.readouterr().err
        assert "error: nothing can be drawn: the logits after 1 tokens are not finite" in said


def test_a_run_as_old_as_the_golden_one_lacks_the_new_keys(first: TrainConfig) -> None:
    for path in Path(first.out_dir).glob("checkpoint_*/state.json"):
        state = parse_state(path.read_bytes(), "")
        for key in ("init_checkpoint", "init_weights_only"):
            del state["config"][key]
        path.write_text(state_text(state))
    assert begun(replace(first, max_iters=5))[0] == 4


def test_read_nanogpt_is_not_asked_for_the_optimizer_of_an_evaluation(
    first: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_nanogpt(final_state(first.out_dir), tmp_path / "x.pt")
    asked: list[bool] = []

    def noted(path: Any, *, model_only: bool = False, **options: Any) -> Snapshot:
        asked.append(model_only)
        return read_nanogpt(path, model_only=model_only, **options)

    monkeypatch.setattr("orchestrator.checkpoint.formats.weights.read_nanogpt", noted)
    config = beside(first, "evaluated", init_from=str(tmp_path / "x.pt"), eval_only=True)
    plan(config)
    train(resolve(config), World())
    assert asked
    assert all(asked)
