"""The rival: the same model and batches under plain Ray Train, written as its documentation shows it."""

from __future__ import annotations

import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch
from ray.train import Checkpoint, FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchTrainer

from model import GPT, GPTConfig
from orchestrator.config import TrainConfig
from orchestrator.data.dataset import Dataset
from orchestrator.data.token_files import open_token_files
from orchestrator.data.vocabulary import PADDED_GPT2_VOCAB_SIZE
from orchestrator.training.attempt import batch_order


def train_func(job: dict[str, Any]) -> None:
    """Train as one rank; every completed step is a line of `steps` (rank 0): iteration, time."""
    config, fault = TrainConfig(**job["config"]), job["fault"]
    torch.set_num_threads(1)
    rank, size = ray.train.get_context().get_world_rank(), ray.train.get_context().get_world_size()
    data = Dataset(open_token_files(config.data_dir, config.dataset), batch_order(config))
    torch.manual_seed(config.seed)
    shape = {key: getattr(config, key) for key in ("n_layer", "n_head", "n_embd", "block_size", "dropout", "bias")}
    raw = GPT(GPTConfig(**shape, vocab_size=data.files.vocab_size or PADDED_GPT2_VOCAB_SIZE))
    optimizer = torch.optim.AdamW(raw.parameters(), lr=config.learning_rate)
    start = 0
    if checkpoint := ray.train.get_checkpoint():
        with checkpoint.as_directory() as folder:
            saved = torch.load(Path(folder, "state.pt"), weights_only=True)
        raw.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        start = saved["iter_num"]
    model = ray.train.torch.prepare_model(raw)
    for it in range(start, config.max_iters):
        if fault:
            fault.at(rank, it)
        for micro_step in range(rank, config.gradient_accumulation_steps, size):
            _, loss = model(*data.batch("train", it, micro_step))
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if rank == 0:
            with Path(config.out_dir, "steps").open("a") as steps:
                steps.write(f"{it} {time.time()}\n")
        if (it + 1) % config.checkpoint_interval == 0:
            with tempfile.TemporaryDirectory() as folder:
                if rank == 0:
                    state = {"model": raw.state_dict(), "optimizer": optimizer.state_dict(), "iter_num": it + 1}
                    torch.save(state, Path(folder, "state.pt"))
                metrics = {"loss": loss.item()}
                ray.train.report(metrics, Checkpoint.from_directory(folder) if rank == 0 else None)


def fit(config: TrainConfig, fault: Any) -> None:
    """Train with Ray Train's defaults, but for the number of failures that it survives."""
    Path(config.out_dir).mkdir(parents=True, exist_ok=True)
    TorchTrainer(
        train_func,
        train_loop_config={"config": vars(config), "fault": fault},
        scaling_config=ScalingConfig(
            num_workers=(config.min_workers, config.max_workers) if config.is_elastic else config.min_workers,
            resources_per_worker={"CPU": 1},
        ),
        run_config=RunConfig(name="run", storage_path=config.out_dir, failure_config=FailureConfig(max_failures=-1)),
    ).fit()


def fit_until_interrupted(config: TrainConfig) -> None:
    """Train as `fit` does, until SIGINT: what Ray Train makes of that varies, by where it is."""
    with suppress(KeyboardInterrupt, SystemExit, ray.exceptions.RayError, TrainingFailedError):
        fit(config, None)
