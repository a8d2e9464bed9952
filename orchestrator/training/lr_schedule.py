"""The learning rate of every iteration, and the schedules that a user hardly means. Knows neither torch nor Ray."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator

from orchestrator.config import TrainConfig

logger = logging.getLogger(__name__)

_HIGHEST_USUAL = 0.1  # nanoGPT's highest is 6e-4, of baby models 1e-3
_HARDLY = 0.9  # of the way down from learning_rate to min_lr is still to go at the end


def learning_rate(config: TrainConfig, it: int) -> float:
    """Return the learning rate of an iteration: linear warm-up, cosine decay, then min_lr.

    Source: nanoGPT's train.py, get_lr.
    """
    if not config.decay_lr:
        return config.learning_rate
    if it < config.warmup_iters:
        return config.learning_rate * (it + 1) / (config.warmup_iters + 1)
    if it >= config.lr_decay_iters:
        return config.min_lr
    decay_ratio = (it - config.warmup_iters) / (config.lr_decay_iters - config.warmup_iters)
    coeff = 0.5 * (1.0 + math.cos(math.pi * decay_ratio))  # from 1 to 0
    return config.min_lr + coeff * (config.learning_rate - config.min_lr)


def tell_doubts(config: TrainConfig) -> None:
    """Warn of a schedule that can be carried out and is hardly meant."""
    for doubt in [] if config.eval_only else doubts(config):
        logger.warning("%s", doubt)


def doubts(config: TrainConfig) -> Iterator[str]:
    """Yield a sentence for each way in which the learning rate will not do what its settings seem to ask for."""
    if config.learning_rate > _HIGHEST_USUAL:
        yield f"learning_rate={config.learning_rate:g} is over {_HIGHEST_USUAL:g}: training will hardly converge"
    if not config.decay_lr or config.max_iters == 0:
        return
    highest, lowest = config.learning_rate, config.min_lr
    last = learning_rate(config, config.max_iters - 1)
    if lowest > highest:
        yield (
            f"min_lr={lowest:g} is over learning_rate={highest:g}: the learning rate will rise from iteration "
            f"{config.warmup_iters} on. Give --min_lr={highest / 10:g}, a tenth, or --decay_lr=False"
        )
    elif config.warmup_iters >= config.max_iters:
        yield (
            f"warmup_iters={config.warmup_iters} is not under max_iters={config.max_iters}: the learning rate will "
            f"only rise, up to {last:g} instead of {highest:g}"
        )
    elif config.lr_decay_iters <= config.warmup_iters:
        yield (
            f"lr_decay_iters={config.lr_decay_iters} is not over warmup_iters={config.warmup_iters}: after the warm-up "
            f"the learning rate will be min_lr={lowest:g} at once"
        )
    elif last > lowest + _HARDLY * (highest - lowest):
        yield (
            f"lr_decay_iters={config.lr_decay_iters} is far beyond max_iters={config.max_iters}: the learning rate "
            f"will hardly decay, to {last:g} instead of min_lr={lowest:g}. Give --lr_decay_iters={config.max_iters}"
        )
