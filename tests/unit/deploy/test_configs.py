"""Every settings file in configs/ can be trained with as it stands."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.config import TrainConfig, check, parse

CONFIGS = Path(__file__).parents[3] / "configs"
FILES = sorted(CONFIGS.glob("*.py"))
NANOGPT = ["train_shakespeare_char", "finetune_shakespeare", "train_gpt2", "eval_gpt2", "eval_gpt2_medium"]
NANOGPT += ["eval_gpt2_large", "eval_gpt2_xl"]


def read(path: Path, *flags: str) -> TrainConfig:
    return check(parse(TrainConfig, [str(path), *flags], "train"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_settings_file_is_accepted(path: Path) -> None:
    read(path)


def test_files_of_nanogpt_are_there() -> None:
    assert {"quickstart", "finetune_gpt2_xl", *NANOGPT} <= {path.stem for path in FILES}


def test_runs_do_not_share_an_out_dir() -> None:
    folders = [read(path).out_dir for path in FILES]
    assert len(set(folders)) == len(folders), "a run would continue another's state"


def test_global_batch_of_train_gpt2_is_nanogpts() -> None:
    config = read(CONFIGS / "train_gpt2.py")
    assert config.batch_size * config.block_size * config.gradient_accumulation_steps == 491_520


def test_train_shakespeare_char_on_a_cpu_as_in_nanogpts_readme() -> None:
    flags = (
        "--device=cpu --compile=False --eval_iters=20 --log_interval=1 --block_size=64 --batch_size=12 --n_layer=4 "
        "--n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0"
    )
    config = read(CONFIGS / "train_shakespeare_char.py", *flags.split())
    assert (config.device, config.compile, config.n_embd, config.max_iters) == ("cpu", False, 128, 2000)
    assert (config.learning_rate, config.dataset) == (1e-3, "shakespeare_char"), "the file's own stay"
