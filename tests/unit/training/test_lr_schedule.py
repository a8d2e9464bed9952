"""The learning rate is nanoGPT's, and schedules that cannot be meant are told of before they are carried out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator.config import TrainConfig, parse
from orchestrator.training.lr_schedule import doubts, learning_rate, tell_doubts

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
PLAIN = TrainConfig(learning_rate=1e-3, min_lr=1e-4, warmup_iters=10, lr_decay_iters=100, max_iters=100)


def test_learning_rate_is_nanogpts() -> None:
    config = TrainConfig(learning_rate=1.0, min_lr=0.1, warmup_iters=3, lr_decay_iters=7)
    rates = [learning_rate(config, it) for it in range(10)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1.0, 0.8681980515, 0.55, 0.2318019485, 0.1, 0.1, 0.1])
    assert learning_rate(replace(config, decay_lr=False), 0) == 1.0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"learning_rate": 1e-5, "min_lr": 6e-5},
            "the learning rate will rise from iteration 10 on. Give --min_lr=1e-06",
        ),
        ({"warmup_iters": 100}, "warmup_iters=100 is not under max_iters=100: the learning rate will only rise"),
        ({"warmup_iters": 300}, "up to 0.000332226 instead of 0.001"),
        ({"lr_decay_iters": 10}, "lr_decay_iters=10 is not over warmup_iters=10: after the warm-up"),
        ({"lr_decay_iters": 5}, "the learning rate will be min_lr=0.0001 at once"),
        ({"lr_decay_iters": 600000}, "will hardly decay, to 0.001 instead of min_lr=0.0001. Give --lr_decay_iters=100"),
        ({"learning_rate": 6.0}, "learning_rate=6 is over 0.1"),
    ],
)
def test_a_schedule_that_cannot_be_meant_is_told(change: dict[str, Any], words: str) -> None:
    assert not list(doubts(PLAIN))
    (doubt,) = doubts(replace(PLAIN, **change))
    assert words in doubt


@pytest.mark.parametrize(
    "change",
    [
        {"decay_lr": False, "min_lr": 1.0, "warmup_iters": 10**6},
        {"lr_decay_iters": 50},
        {"lr_decay_iters": 200},
        {"min_lr": 1e-3},
        {"warmup_iters": 0},
    ],
)
def test_what_can_be_meant_is_not_doubted(change: dict[str, Any]) -> None:
    assert not list(doubts(replace(PLAIN, **change)))


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.py")), ids=lambda path: path.stem)
def test_our_own_settings_files_are_not_doubted(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    tell_doubts(parse(TrainConfig, [str(file)], "train"))
    assert not caplog.text
