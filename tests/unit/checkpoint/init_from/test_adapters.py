"""Runs that train adapters of a model: what their state holds, where the rest comes from, and what cannot be meant."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch

from model.lora import is_adapter
from orchestrator.checkpoint.formats.peft import write_peft
from orchestrator.checkpoint.restore.adapters import told
from orchestrator.checkpoint.restore.beginning import beginning_of
from orchestrator.checkpoint.snapshot import tensors_equal
from orchestrator.checkpoint.store import ADAPTER_FORMAT_VERSION, FORMAT_VERSION, Checkpoint
from orchestrator.config import TrainConfig, check
from orchestrator.distributed.device import resolve
from orchestrator.distributed.world import World
from orchestrator.driver.preflight import plan
from orchestrator.errors import CheckpointError, ConfigError, UserError
from orchestrator.loop import train
from orchestrator.telemetry.records import Begin, Evaluation, Step
from orchestrator.training.attempt import Callbacks
from tests.conftest import final_state
from tests.support.runs import checkpoints_in
from tests.support.sources import begun, beside, names, source_of_kind

T = TypeVar("T")


@pytest.fixture
def lora(first: TrainConfig) -> TrainConfig:
    """Settings of a run that trains adapters of the first run's model."""
    return beside(first, "lora", init_from=first.out_dir, lora_rank=4, lora_dropout=0.2)


def newest(config: TrainConfig) -> Checkpoint:
    return checkpoints_in(config.out_dir).select("latest")


def records_of(config: TrainConfig, kind: type[T]) -> list[T]:
    """Train, and return the records of a kind."""
    found: list[Any] = []
    train(resolve(check(config)), World(), Callbacks(found.append))
    return [record for record in found if isinstance(record, kind)]


@pytest.mark.parametrize("kind", ["run", "ckpt.pt", "folder"])
@pytest.mark.parametrize("base_dtype", ["float32", "bfloat16"])
def test_adapters_begin_at_0_beside_weights_from_anywhere(
    first: TrainConfig, lora: TrainConfig, tmp_path: Path, kind: str, base_dtype: str
) -> None:
    source = source_of_kind(kind, first, tmp_path)
    began, end = begun(replace(lora, init_from=source, lora_base_dtype=base_dtype))
    assert (began, end.iter_num, end.optimizer["step"].item()) == (0, 4, 4.0)
    assert end.adapters
    assert end.adapters.lora.base_dtype == base_dtype
    assert end.adapters.base.source == source
    assert end.adapters.base.revision == (names(first)[4] if kind == "run" else "")
    assert len(end.adapters.base.checksum) == 32


def test_the_state_is_adapters_alone(first: TrainConfig, lora: TrainConfig) -> None:
    begun(lora)
    saved, whole = newest(lora), newest(first)
    assert saved.state["tensors"].keys() == {
        f"{moment}transformer.h.{layer}.attn.c_attn.lora_{side}"
        for moment in ("", "exp_avg.", "exp_avg_sq.")
        for layer in (0, 1)
        for side in "AB"
    } | {"step"}
    assert (saved.state["format_version"], whole.state["format_version"]) == (ADAPTER_FORMAT_VERSION, FORMAT_VERSION)
    assert ADAPTER_FORMAT_VERSION > FORMAT_VERSION, "a program that knows no adapters must refuse them"
    values = sum(x.numel() for x in final_state(lora.out_dir).model.values())
    assert values == 2 * 4 * (32 + 3 * 32)
    (begin,) = records_of(replace(lora, max_iters=5), Begin)
    (of_all,) = records_of(replace(first, max_iters=5), Begin)
    assert (begin.num_params, begin.num_trained) == (of_all.num_params + values, values)
    assert of_all.num_trained is None


@pytest.mark.parametrize("base_dtype", ["float32", "bfloat16"])
def test_a_resumed_run_ends_with_the_undisturbed_runs_bits(lora: TrainConfig, base_dtype: str) -> None:
    lora = replace(lora, lora_base_dtype=base_dtype, lora_targets="all-linear", max_iters=8)
    losses = [record.loss for record in records_of(lora, Step)]
    again = beside(lora, "again")
    attempts = [records_of(replace(again, max_iters=max_iters), Step) for max_iters in (3, 5, 8)]
    straight, resumed = final_state(lora.out_dir), final_state(again.out_dir)
    assert tensors_equal(straight, resumed)
    assert (straight.adapters, straight.best_val_loss) == (resumed.adapters, resumed.best_val_loss)
    assert all(x.abs().max() > 0 for x in straight.model.values()), "lora_B begins at zero"
    assert [record.loss for records in attempts for record in records] == losses
    assert len(set(losses)) == 8


def test_the_loss_begins_as_the_models(first: TrainConfig, lora: TrainConfig) -> None:
    evaluations = records_of(lora, Evaluation)
    (models,) = records_of(replace(first, eval_only=True), Evaluation)
    assert evaluations[0].val_loss == pytest.approx(models.val_loss, abs=1e-6)
    assert evaluations[-1].val_loss != evaluations[0].val_loss
    (again,) = records_of(replace(lora, eval_only=True), Evaluation)
    assert again.val_loss == evaluations[-1].val_loss


def test_adapters_go_on_in_a_run_of_their_own(lora: TrainConfig) -> None:
    begun(lora)
    began, end = begun(beside(lora, "more", init_from=lora.out_dir, max_iters=8))
    assert (began, end.iter_num) == (4, 8)
    train(resolve(replace(lora, max_iters=8)), World())
    straight = final_state(lora.out_dir)
    assert tensors_equal(end, straight)
    assert end.adapters == straight.adapters, "the base model is the first run's, not the run of adapters"


def test_a_folder_of_pefts_goes_on_with_the_dropout_that_is_given(lora: TrainConfig, tmp_path: Path) -> None:
    _, end = begun(lora)
    write_peft(end, tmp_path / "peft")
    more = beside(lora, "more", init_from=str(tmp_path / "peft"))
    with pytest.raises(ConfigError, match=r"To go on with them, give --lora_rank=4 .* --lora_dropout=0\.2;"):
        plan(replace(more, lora_rank=0))
    assert plan(more).start.summary.endswith("--lora_targets=attn.c_attn --lora_dropout=0.2")
    assert plan(replace(more, lora_dropout=0.0)).start.summary.endswith("attn.c_attn (lora_dropout was 0.2)")


def test_adapters_alone_begin_at_0_with_new_moments(lora: TrainConfig) -> None:
    _, saved = begun(lora)
    still = {"learning_rate": 1e-30, "min_lr": 0.0, "weight_decay": 0.0}
    began, end = begun(beside(lora, "tuned", init_from=lora.out_dir, init_weights_only=True, max_iters=1, **still))
    assert (began, end.optimizer["step"].item()) == (0, 1.0)
    assert all(torch.equal(end.model[name], x) for name, x in saved.model.items())


def test_all_weights_of_the_model_that_adapters_make_are_trained(lora: TrainConfig) -> None:
    begun(lora)
    whole = beside(lora, "whole", init_from=lora.out_dir, lora_rank=0, max_iters=8)
    with pytest.raises(
        ConfigError, match=r"holds adapters\. To go on with them, give --lora_rank=4 .*init_weights_only"
    ):
        plan(whole)
    began, end = begun(replace(whole, init_weights_only=True))
    assert (began, end.adapters) == (0, None)
    assert not any(map(is_adapter, end.model))
    (adapted,) = records_of(replace(lora, eval_only=True), Evaluation)
    merged = beside(whole, "merged", init_from=lora.out_dir, eval_only=True)
    assert records_of(merged, Evaluation)[0].val_loss == pytest.approx(adapted.val_loss, abs=1e-5)


def test_a_shorter_context_cuts_the_base_models(lora: TrainConfig) -> None:
    short = replace(lora, block_size=8)
    train(resolve(replace(short, max_iters=2)), World())
    _, end = begun(short)
    assert end.model_args["block_size"] == 8


# ---- the base model


def test_a_base_model_that_was_moved_is_found_where_lora_base_says(first: TrainConfig, lora: TrainConfig) -> None:
    begun(lora)
    moved = str(Path(first.out_dir).with_name("moved"))
    shutil.move(first.out_dir, moved)
    Path(first.out_dir).mkdir()  # init_from has to be there
    more = replace(lora, max_iters=6)
    for start in (plan, lambda config: train(resolve(config), World())):
        with pytest.raises(CheckpointError, match=r"base model of these adapters is missing: .*--lora_base=PATH"):
            start(more)
    began, _ = begun(replace(more, lora_base=moved))
    assert began == 4


def test_a_base_model_whose_run_deleted_it_is_missed(first: TrainConfig, lora: TrainConfig) -> None:
    begun(lora)
    shutil.rmtree(Path(first.out_dir, name := names(first)[4]))
    with pytest.raises(CheckpointError, match=rf"is missing: the run {first.out_dir} has deleted {name}.*lora_base"):
        plan(replace(lora, max_iters=6))


@pytest.mark.parametrize("kind", ["ckpt.pt", "folder"])
def test_another_base_model_is_refused(first: TrainConfig, lora: TrainConfig, tmp_path: Path, kind: str) -> None:
    lora = replace(lora, init_from=source_of_kind(kind, first, tmp_path))
    begun(lora)
    before = names(lora)
    train(resolve(replace(first, max_iters=5)), World())
    shutil.rmtree(lora.init_from, ignore_errors=True)
    source_of_kind(kind, first, tmp_path)  # other weights of the same shapes
    for start in (plan, lambda config: train(resolve(config), World())):
        with pytest.raises(CheckpointError, match=r"is not the base model that .*: its checksum"):
            start(replace(lora, max_iters=6))
    assert names(lora) == before


def test_a_base_model_of_other_shapes_is_refused_on_the_ranks(first: TrainConfig, lora: TrainConfig) -> None:
    """Where the driver does not see the weights, as on a cluster, the ranks are the first to read them."""
    begun(lora)
    short = beside(first, "short", block_size=8, init_from="scratch", max_iters=1)
    train(resolve(short), World())
    with pytest.raises(CheckpointError, match=r"is not the base .*wpe\.weight is \(8, 32\) instead of \(16, 32\)"):
        train(resolve(replace(lora, max_iters=6, lora_base=short.out_dir)), World())


def test_a_base_model_that_no_node_has_is_asked_for(lora: TrainConfig) -> None:
    begun(lora)
    with pytest.raises(CheckpointError, match=r"no worker's node has it; .* give --lora_base=PATH"):
        train(resolve(replace(lora, max_iters=6, lora_base=f"{lora.out_dir}/gone")), World())


def test_adapters_are_no_base_model(lora: TrainConfig) -> None:
    begun(lora)
    for start in (plan, lambda config: train(resolve(config), World())):
        with pytest.raises(UserError, match="adapters"):
            start(replace(lora, max_iters=6, lora_base=lora.out_dir))


# ---- settings that cannot be meant


@pytest.mark.parametrize(
    ("changes", "asked"),
    [
        ({"lora_rank": 8}, "--lora_rank=8"),
        ({"lora_alpha": 32.0}, "--lora_alpha=32"),
        ({"lora_targets": "all-linear"}, "--lora_targets=attn.c_attn,attn.c_proj,mlp.c_fc,mlp.c_proj"),
        ({"lora_base_dtype": "bfloat16"}, "--lora_base_dtype=bfloat16"),
        ({"lora_rank": 0}, "--lora_rank=0"),
    ],
)
def test_other_adapters_than_the_runs(lora: TrainConfig, changes: dict[str, Any], asked: str) -> None:
    _, end = begun(lora)
    assert end.adapters
    has = told(end.adapters.lora)
    with pytest.raises(ConfigError) as refusal:
        plan(replace(lora, max_iters=8, **changes))
    assert f"holds a run that trains adapters, {has}, asked for " in str(refusal.value)
    assert asked in str(refusal.value).partition("asked for ")[2]
    if changes.get("lora_rank") != 0:
        with pytest.raises(ConfigError, match=r"holds adapters, .* or merge them .*--format=hf"):
            plan(beside(lora, "more", init_from=lora.out_dir, max_iters=8, **changes))


def test_settings_may_be_left_out_with_resume(lora: TrainConfig, caplog: pytest.LogCaptureFixture) -> None:
    lora = replace(lora, lora_alpha=4.0)
    begun(lora)
    resumed = replace(lora, init_from="resume", n_layer=12, n_embd=768, lora_rank=0, lora_alpha=16.0, max_iters=8)
    with caplog.at_level("INFO"):
        assert begun(resumed)[0] == 4
    assert "settings that differ from the saved run's: max_iters 4 -> 8\n" in caplog.text, "the others are the state's"
    with pytest.raises(ConfigError, match="asked for --lora_rank=2"):
        plan(replace(resumed, lora_rank=2, max_iters=9))


def test_before_a_start_a_resumed_run_counts_with_its_own_adapters(lora: TrainConfig) -> None:
    begun(lora)
    left_out = replace(lora, init_from="resume", lora_rank=0, max_iters=8)
    counted, model_args = beginning_of(left_out)
    assert plan(left_out).start.config == counted
    assert (counted.lora_rank, counted.lora_targets) == (4, "attn.c_attn")
    assert model_args["n_embd"] == 32
    with pytest.raises(ConfigError, match=r"holds adapters\. To go on with them"):
        beginning_of(replace(lora, init_from=lora.out_dir, out_dir=f"{lora.out_dir}-more", lora_rank=0))


def test_a_run_of_all_weights_stays_one(first: TrainConfig) -> None:
    for init_from in ("resume", "scratch"):
        with pytest.raises(ConfigError, match=r"lora_rank=4|trains all weights, asked for --lora_rank=4"):
            plan(replace(first, init_from=init_from, lora_rank=4, max_iters=8))


def test_nanogpts_ckpt_is_begun_with_elsewhere(first: TrainConfig, lora: TrainConfig, tmp_path: Path) -> None:
    ckpt = source_of_kind("ckpt.pt", first, tmp_path)
    beside_it = Path(lora.out_dir)
    beside_it.mkdir()
    shutil.copy(ckpt, beside_it / "ckpt.pt")
    with pytest.raises(ConfigError, match=r"give --init_from=.*ckpt\.pt and another --out_dir"):
        plan(replace(lora, init_from="resume"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init_from": "scratch"}, r"init_from=scratch has none: give --init_from=gpt2-xl, a ckpt\.pt"),
        ({"lora_rank": 33}, r"lora_rank=33 is over the model's width, n_embd=32: give --lora_rank=32 or less"),
        ({"lora_targets": "c_atn"}, r"lora_targets='c_atn' is out of range: some of c_attn, c_proj, c_fc"),
        ({"lora_targets": ""}, "lora_targets='' is out of range"),
        ({"lora_alpha": 0.0}, r"lora_alpha=0\.0 is out of range: more than 0"),
        ({"lora_dropout": 1.0}, r"lora_dropout=1\.0 is out of range"),
        ({"lora_base": "elsewhere"}, r"init_from=\S+ is a whole model: .* Leave lora_base out"),
        ({"lora_base": "elsewhere", "lora_rank": 0}, r"init_from=\S+ is a whole model: .* Leave lora_base out"),
    ],
)
def test_settings_that_mean_nothing(lora: TrainConfig, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan(replace(lora, **changes))
    assert not Path(lora.out_dir).exists()
    with pytest.raises(UserError, match=message):
        train(resolve(check(replace(lora, **changes))), World())
