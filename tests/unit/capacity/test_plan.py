"""Cards, lanes, traffic, nodes and advice: arithmetic, by itself and as `orchestrator plan` prints it."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from model import GPT, GPTConfig
from model.lora import ALL_LINEAR, LAYERS
from model.lora import targets_of as layers_that_words_mean
from model.pretrained import GPT2_SIZES
from orchestrator.__main__ import main
from orchestrator.capacity import shape as shapes
from orchestrator.capacity.advice import advise
from orchestrator.capacity.cards import OFFERED, card_named, card_of
from orchestrator.capacity.gpu import MARGIN, PIECE_BYTES, gpu_memory, held_sums
from orchestrator.capacity.node import node_needs
from orchestrator.capacity.shape import ModelShape, shape_of, targets_of, with_adapters
from orchestrator.capacity.traffic import bytes_per_iteration, compute_s, network_share
from orchestrator.capacity.warning import memory_warning
from orchestrator.checkpoint.restore.beginning import beginning_of
from orchestrator.config import LORA_TARGETS, TrainConfig, check, parse
from orchestrator.distributed import flat_gradient
from orchestrator.distributed.lanes import Lanes, wait_on_device
from orchestrator.driver.cluster_cards import cards_of
from orchestrator.errors import ConfigError

ROOT = Path(__file__).parents[3]
XL = {"n_layer": 48, "n_head": 25, "n_embd": 1600, "vocab_size": 50257, "bias": True}


def xl(**keys: Any) -> tuple[TrainConfig, ModelShape]:
    config = TrainConfig(**{"init_from": "gpt2-xl", "batch_size": 1, "gradient_accumulation_steps": 32, **keys})
    return config, shape_of(config, XL)


def test_what_is_written_twice_is_the_same() -> None:
    keys = ("n_layer", "n_head", "n_embd")
    assert {name: dict(zip(keys, sizes, strict=True)) for name, sizes in shapes.GPT2_SIZES.items()} == GPT2_SIZES
    assert (tuple(shapes.LAYERS), shapes.ALL_LINEAR) == (LAYERS, ALL_LINEAR)
    assert all(targets_of(words) == layers_that_words_mean(words) for words in (*LORA_TARGETS, "c_fc,c_attn"))
    assert PIECE_BYTES == flat_gradient.PIECE_BYTES


@pytest.mark.parametrize(
    ("name", "card"),
    [
        ("A10G", "A10G"),
        ("NVIDIA A10G", "A10G"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40S", "L40S"),
        ("A100-40G", "A100-40"),
        ("NVIDIA A100-SXM4-40GB", "A100-40"),
        ("A100", "A100-80"),
        ("H100", "H100"),
    ],
)
def test_cards_are_known_by_ray_s_and_cuda_s_names(name: str, card: str) -> None:
    found = card_named(name)
    assert found
    assert found.name == card


def test_gpu_is_a_card_or_a_size() -> None:
    assert [card_of(name).name for name in OFFERED] == list(OFFERED)
    for word in ("a10g", "NVIDIA A10G", "24GB", "24 gb", "24G", "24"):
        assert card_of(word).memory_bytes == 24e9
    assert card_of("24 gb").name == "24GB"
    assert [card_of(word).name for word in ("a100-40g", "A100-80GB")] == ["A100-40", "A100-80"]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("L40X", "did you mean L40S"),
        ("rtx4090", "give its memory"),
        ("A100", "--gpu=A100-40 or --gpu=A100-80"),
        ("0GB", "give its memory"),
        ("-3GB", "give its memory"),
        ("nan", "give its memory"),
        ("A100-SXM4-40GB MIG 1g.5gb", "give its memory"),
    ],
)
def test_a_gpu_that_is_unknown_or_several_is_a_mistake(word: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        card_of(word)


def test_xl_needs_lora_on_24_gb_and_nothing_on_80() -> None:
    config, shape = xl(num_workers="2-8", dropout=0.1)
    assert advise(config, shape, card_of("A100-80")) == {}
    assert advise(config, shape, card_of("24GB")) == {"lora_rank": 8}
    assert advise(config, shape, card_of("12GB")) == {"lora_rank": 8, "lora_base_dtype": "bfloat16"}
    assert advise(config, shape, card_of("1GB")) is None


def test_advice_keeps_the_global_batch_and_takes_one_change_before_two() -> None:
    config = TrainConfig(n_layer=12, n_embd=768, batch_size=12, gradient_accumulation_steps=40)
    shape = shape_of(config, {"n_layer": 12, "n_head": 12, "n_embd": 768, "vocab_size": 50304, "bias": False})
    changes = [advise(config, shape, card_of(f"{size}GB")) for size in (40, 15, 9, 7, 5)]
    assert changes[0] == {}
    assert changes[1] == {"activation_checkpointing": True}  # a new model has nothing to freeze
    assert all(changes[1:])
    for change, size in zip(changes, (40, 15, 9, 7, 5), strict=True):
        assert change is not None
        changed = replace(config, **change)
        assert changed.batch_size * changed.gradient_accumulation_steps == 12 * 40
        assert gpu_memory(changed, with_adapters(shape, changed)).fits(size * 10**9)
        for key in change:  # none of them is there for nothing
            if key not in ("batch_size", "gradient_accumulation_steps"):
                left = replace(changed, **{key: getattr(config, key)})
                assert not gpu_memory(left, shape).fits(size * 10**9)


def test_a_margin_is_left() -> None:
    config, shape = xl()
    total = gpu_memory(config, shape).total
    assert gpu_memory(config, shape).fits(int(total / (1 - MARGIN)) + 1)
    assert not gpu_memory(config, shape).fits(int(total / (1 - MARGIN)) - 1)


def test_sums_that_wait_go_where_there_is_room() -> None:
    config, shape = xl(num_workers="2-8")
    most = max(Lanes(32, 32).most_held_sums(size) for size in range(2, 9))
    assert most == held_sums(config, 3) > held_sums(config, 2) > 0
    on_small, on_large = (gpu_memory(config, shape, card_of(size)) for size in ("40GB", "400GB"))
    assert on_small.items["lane buffers"] == on_large.host_bytes == 0
    assert on_large.items["lane buffers"] == most * 4 * shape.trained_params
    assert (on_small.host_bytes, on_small.workers) == (most * 2**33, 3)  # PyTorch pins powers of two: 8.6 GB for 6.2
    assert held_sums(replace(config, num_workers=8), 8) == 0


@pytest.mark.parametrize("lanes", [8, 16, 32])
@pytest.mark.parametrize("size_gb", [40, 48, 60, 80, 94, 141])
def test_the_plan_counts_the_number_of_workers_with_most(lanes: int, size_gb: int) -> None:
    config, shape = xl(num_workers="2-8", lanes=lanes)
    card = card_of(f"{size_gb}GB")
    found = gpu_memory(config, shape, card)
    alone = [gpu_memory(replace(config, num_workers=size), shape, card) for size in range(2, 9)]
    assert found.total == pytest.approx(max(each.total for each in alone), rel=0.01)
    assert found.host_bytes == max(each.host_bytes for each in alone) == alone[found.workers - 2].host_bytes


def test_sums_wait_beside_moments_that_are_still_to_come() -> None:
    """6.2 GB are under a quarter of the 27 GB that are free on 40 GB at first, and over a quarter of those later."""
    gradient_bytes, total_bytes = 6_230_000_000, 40 * 10**9
    free_bytes = total_bytes - 2 * gradient_bytes - 10**9
    assert not wait_on_device(gradient_bytes, gradient_bytes, free_bytes, total_bytes)
    assert wait_on_device(gradient_bytes, gradient_bytes, free_bytes + 40 * 10**9, 2 * total_bytes)


def test_a_wide_range_of_workers_is_planned_at_once() -> None:
    """No combination of settings may ask anew which worker waits for most: for 8 to 64 workers that took minutes."""
    config, shape = xl(num_workers="8-64", batch_size=8, gradient_accumulation_steps=512)
    calls = 0
    counted = Lanes.joins

    def joins(self: Lanes, spans: Any) -> Any:
        nonlocal calls
        calls += 1
        return counted(self, spans)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Lanes, "joins", joins)
        assert advise(config, shape, card_of("1GB")) is None
    ways = 4  # of summing: with a range, in as many lanes as workers, and what is received beside what waits
    assert calls <= ways * sum(range(8, 65))


@pytest.mark.parametrize("workers", [2, 4, 8])
def test_with_a_lane_for_each_worker_traffic_is_a_rings(workers: int) -> None:
    config, shape = xl(num_workers=workers)
    ring = 2 * (workers - 1) / workers * 4 * shape.trained_params
    assert bytes_per_iteration(config, shape, workers) == pytest.approx(ring, rel=1e-6)
    ddp = replace(config, deterministic=False)
    assert bytes_per_iteration(ddp, shape, workers) == pytest.approx(ring, rel=1e-6)


def test_a_worker_whose_lanes_are_several_trees_sends_more() -> None:
    config, shape = xl(num_workers="2-8")
    assert bytes_per_iteration(config, shape, 3) > 1.5 * bytes_per_iteration(replace(config, lanes=8), shape, 2)
    alone, _ = xl(num_workers=1)
    assert bytes_per_iteration(alone, shape, 1) == 0


def test_lora_saves_states_and_traffic() -> None:
    config, shape = xl(num_workers=8)
    lora, adapters = xl(num_workers=8, lora_rank=8)
    assert node_needs(lora, adapters, 0).state < 0.002 * node_needs(config, shape, 0).state
    assert bytes_per_iteration(lora, adapters, 8) < 0.002 * bytes_per_iteration(config, shape, 8)
    assert compute_s(lora, adapters, 8, 1e12) < 0.75 * compute_s(config, shape, 8, 1e12)


def test_float32_computes_at_half_the_rate() -> None:
    config, shape = xl()
    in_float32 = compute_s(replace(config, dtype="float32"), shape, 1, 1e12)
    assert (
        in_float32
        == 2 * compute_s(config, shape, 1, 1e12)
        == 2 * compute_s(replace(config, dtype="float16"), shape, 1, 1e12)
    )


def test_a_node_keeps_two_states_and_storage_those_that_are_asked_for() -> None:
    config, shape = xl(keep_checkpoints=3)
    needs = node_needs(config, shape, 10**9)
    assert needs.state == 12 * shape.base_params
    assert (needs.memory_dir, needs.storage) == (2 * needs.state, 5 * needs.state)
    assert needs.host > needs.memory_dir + 10**9
    assert node_needs(replace(config, memory_dir=""), shape, 0).memory_dir == 0


def node(accelerator: str, alive: bool = True) -> dict[str, Any]:
    return {"Alive": alive, "Resources": {"CPU": 8.0, "GPU": 1.0, f"accelerator_type:{accelerator}": 1.0}}


def test_train_warns_of_what_will_not_fit_and_names_the_remedy() -> None:
    config, _ = xl(num_workers="2-8")
    warning = memory_warning(config, XL, cards_of([node("A100"), node("A10G")]))
    assert "A10G has 24 GB" in warning
    assert "--lora_rank=8" in warning
    assert "--lora_rank" not in memory_warning(replace(config, init_from="resume"), XL, [card_of("A10G")])
    lora = replace(config, lora_rank=8)
    assert memory_warning(lora, XL, cards_of([node("A10G")])) == ""
    for nodes in (
        [node("A100")],
        [node("A10G", alive=False)],
        [node("unheard-of")],
        [{"Alive": True, "Resources": {}}],
    ):
        assert memory_warning(config, XL, cards_of(nodes)) == ""


def config_of(file: str) -> TrainConfig:
    return check(parse(TrainConfig, [str(ROOT / "configs" / file)], "test"))


@pytest.mark.parametrize(
    ("file", "card", "gbit", "below"),
    [
        *(("finetune_gpt2_xl.py", card, 25, 1 / 3) for card in ("A100-40", "L40S")),
        *(("finetune_gpt2_xl_lora.py", card, 10, 0.1) for card in ("A10G", "L4")),
    ],
)
def test_xl_fits_its_cards_and_the_network_takes_a_small_part_of_an_iteration(
    file: str, card: str, gbit: int, below: float
) -> None:
    config = config_of(file)
    shape, found = shape_of(*beginning_of(config)), card_of(card)
    assert found.memory_bytes
    assert found.flops
    assert gpu_memory(config, shape, found).fits(found.memory_bytes)
    for workers in range(config.min_workers, config.max_workers + 1):
        assert network_share(config, shape, workers, gbit, found.flops) < below


def test_the_command_tells_people_and_programs(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "--init_from=gpt2-xl", "--batch_size=1", "--num_workers=2-8"]
    assert main([*words, "--gpu", "A10G"]) == 0
    text = capsys.readouterr().out
    assert "does not fit" in text
    assert "orchestrator train --init_from=gpt2-xl --batch_size=1 --num_workers=2-8 --lora_rank=8" in text
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [each["name"] for each in found["cards"]] == list(OFFERED)
    for each in found["cards"]:
        assert each["total_bytes"] == sum(each["items"].values())
        assert each["fits"] == (each["total_bytes"] <= (1 - found["margin"]) * each["memory_bytes"])
    assert main([*words, "--gpu=A1G"]) == 2
    assert "did you mean A10G" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "size_gb"), [("eval_gpt2", 8), ("eval_gpt2_medium", 8), ("eval_gpt2_large", 12), ("eval_gpt2_xl", 16)]
)
def test_an_evaluation_fits_the_cards_that_its_settings_name(
    file: str, size_gb: int, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["plan", str(ROOT / f"configs/{file}.py"), f"--gpu={size_gb}GB"]
    assert main(words) == 0
    text = capsys.readouterr().out
    assert f"it fits {size_gb}GB" in text
    assert "evaluation alone" in text
    assert "sends" not in text
    assert main([*words, "--batch_size=64", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["cards"][0]["change"] == {"loss_chunk": 256}
    assert found["network"] == []


@pytest.mark.parametrize(
    "words", [["--num_workers=1-9"], ["--num_workers=3", "--deterministic=False"], ["--batch_size=64"]]
)
def test_the_plan_is_80_columns_wide_but_for_the_line_to_copy(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "--init_from=gpt2-xl", *words]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 80 for line in lines if "orchestrator train" not in line)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--block_size=2048"], "gpt2 has 1024 positions. Give --block_size=1024"),
        (["--lora_rank=800"], "over the model's width, n_embd=768"),
    ],
)
def test_the_plan_refuses_what_train_refuses(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "--init_from=gpt2", *words]) == 2
    assert message in capsys.readouterr().err


def test_the_plan_says_whose_vocabulary_it_counts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    words = ["plan", f"--data_dir={tmp_path}", "--dataset=of_the_nodes", "--json"]
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out)["vocabulary"] == 50304
    assert "no dataset=of_the_nodes" in caplog.text


def test_a_checkpoint_file_is_planned_without_its_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = {"n_layer": 1, "n_head": 2, "n_embd": 32, "block_size": 16, "bias": False, "vocab_size": 65, "dropout": 0.0}
    weights = {**GPT(GPTConfig(**args)).state_dict()}
    weights["lm_head.weight"].fill_(float("nan"))  # which `train` finds when it reads them
    torch.save({"model": weights, "model_args": args, "config": {}}, tmp_path / "ckpt.pt")
    assert main(["plan", f"--init_from={tmp_path / 'ckpt.pt'}", "--block_size=8", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["vocabulary"] == 65


def test_the_plan_needs_no_torch_and_writes_nothing(tmp_path: Path) -> None:
    code = (
        "import sys; from orchestrator.__main__ import main; code = main(['plan', '--init_from=gpt2', '--gpu=24GB']); "
        "print(code, 'torch' in sys.modules, 'ray' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 False False"
    assert not list(tmp_path.iterdir())
