"""The training loop, top to bottom: nanoGPT's, on any number of ranks, resumable at any iteration.

Knows no Ray. `worker/run.py` calls it on a cluster, `worker/plain.py` in a plain process or several:

    python -m orchestrator.loop configs/quickstart.py
    torchrun --nproc_per_node=2 -m orchestrator.loop configs/quickstart.py
"""

from __future__ import annotations

import logging
import math
import platform
import runpy
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from orchestrator.checkpoint.formats.run_tokenizer import keep_tokenizer
from orchestrator.checkpoint.restore.init_from import scratch_args
from orchestrator.checkpoint.restore.restore import restore_or_initialize
from orchestrator.checkpoint.rollbacks import (
    Rollback,
    data_iter,
    delete_undone,
    read_rollbacks,
    write_rollbacks,
)
from orchestrator.checkpoint.save.node_topology import NodeTopology, open_node_memory
from orchestrator.checkpoint.save.policy import SaveIntervals
from orchestrator.checkpoint.save.saver import Saver
from orchestrator.checkpoint.state import TrainState
from orchestrator.checkpoint.store import CheckpointStore
from orchestrator.config import TrainConfig
from orchestrator.data.dataset import Dataset, open_dataset
from orchestrator.data.order import going_on
from orchestrator.data.tokenizers import Tokenizer
from orchestrator.distributed.device import agree_on_dtype
from orchestrator.distributed.gradients import wrap
from orchestrator.distributed.join import new_attempt
from orchestrator.distributed.numerics import (
    agree_to_compile,
    change_of_data,
    environment,
    free_memory,
    make_deterministic,
)
from orchestrator.distributed.world import World
from orchestrator.errors import DataError, RolledBackError
from orchestrator.storage.options import redacted, storage_options_of
from orchestrator.storage.orphans import delete_orphans
from orchestrator.storage.run_folder import RunFolder
from orchestrator.telemetry.flops import Flops
from orchestrator.telemetry.stopwatch import Stopwatch
from orchestrator.training.attempt import Outcome, StopRequest, batch_order
from orchestrator.training.guard import Guard
from orchestrator.training.lr_schedule import learning_rate

Record = dict[str, Any]
logger = logging.getLogger(__name__)


# of settings that differ on resume: where things are, what the optimizer keeps, and what `environment` compares
_NOT_TOLD = {
    "out_dir",
    "init_from",
    "storage_options",
    "data_dir",
    "memory_dir",
    "resubmit",
    "tokenizer",
    "epoch_began",
}
_NOT_TOLD |= {"beta1", "beta2", "weight_decay", "num_workers", "device", "backend", "compile", "dtype"}


def train(
    config: TrainConfig,
    world: World,
    tell: Callable[[Record], None] = lambda _record: None,
    committed: Callable[[Record], None] = lambda _record: None,
    should_stop: Callable[[], int] = lambda: StopRequest.NONE,
    began: Callable[[Saver], None] = lambda _saver: None,
    folder: RunFolder | None = None,
) -> Outcome:
    """Train from the newest state in out_dir, or from init_from, to max_iters; config is resolved for this machine.

    tell: receives a record of every evaluation, checkpoint and logged iteration, on rank 0.
    committed: receives, on all ranks, the record of a checkpoint that is announced in storage.
    should_stop: if it answers StopRequest.STOP or PREEMPTED on any rank, all save and leave after the iteration; in an
        evaluation, which is broken off, after the batch.
    began: receives what can rescue the state, before the first iteration.
    folder: the run's, if this process has opened it.

    Raises:
        UserError: on all ranks alike, if data or checkpoints do not fit.
    """
    config = agree_to_compile(agree_on_dtype(config, world), world)
    run_folder = folder or RunFolder(config.out_dir, storage_options_of(config))
    while True:
        with suppress(RolledBackError):  # on all ranks alike; behind this, no error holds on to the old state
            return train_on(config, world, run_folder, tell, committed, should_stop, began)
        free_memory(config, world.device)
        world = replace(world, attempt=world.on_main(new_attempt))


def train_on(
    config: TrainConfig,
    world: World,
    folder: RunFolder,
    tell: Callable[[Record], None],
    committed: Callable[[Record], None],
    should_stop: Callable[[], int],
    began: Callable[[Saver], None],
) -> Outcome:
    """Train as `train` does, until a stretch turns out to have gone wrong.

    Raises:
        RolledBackError: on all ranks alike; the next call begins before that stretch, with other data.
    """
    make_deterministic(config)

    # the data: a batch is a pure function of (seed, split, iter_num, micro_step), so there is no loader state
    data = world.collectively(lambda: open_dataset(config.data_dir, config.dataset, batch_order(config)))
    store = CheckpointStore(folder)

    # the state: the newest that is whole in a node's memory or in storage, or what init_from names
    rollbacks = read_rollbacks(folder, world)
    nodes = join_run(config, world, store, rollbacks)
    tokenizer = data.tokenizer.to_json() if data.tokenizer else None
    state = restore_or_initialize(
        config, world, store, nodes, scratch_args(config, data.vocab_size), rollbacks, tokenizer
    )
    world.collectively(lambda: data.check_fits(state.model.config.vocab_size))
    data = go_on(data, state.config, data_iter(state.iter_num, rollbacks), world)
    state.config = redacted(config) | carried(data)
    began_at = state.iter_num
    counts = {f"{split}_tokens": len(tokens) for split, tokens in data.files.splits.items()}
    surroundings = environment(config, world, {"data": data.fingerprint(), **counts})
    world.collectively(lambda: warn_if_numerics_changed(surroundings, world, state))
    world.on_main(lambda: keep(data.tokenizer, config, folder))

    def say(kind: str, **values: Any) -> None:
        if world.is_main:
            tell({"kind": kind, "iter": state.iter_num, **values})

    say("begin", **beginning(config, world, state))
    if world.is_main and state.resumed_from:
        tell_changes(state.config, state.resumed_from.checkpoint.state["config"])

    # what keeps the state safe while training goes on
    intervals = SaveIntervals(config.iters_per_checkpoint, config.snapshot_interval, config.keep_checkpoints)
    saver = Saver(state, world, store, nodes, surroundings, intervals)
    began(saver)
    guard = Guard(config, world, state, rollbacks)

    def go_back(rollback: Rollback) -> None:
        say("rollback", **asdict(rollback))
        undone = [*rollbacks, rollback]
        world.on_main(lambda: write_rollbacks(folder, undone))
        saver.close(is_finished=False)
        raise RolledBackError(rollback.why)

    # the model as it is called: compiled, and wrapped where gradients are averaged over ranks
    net: nn.Module = torch.compile(state.model) if config.compile else state.model  # type: ignore[assignment]
    ddp = wrap(net, world) if world.size > 1 and not config.eval_only else None
    if ddp:
        warm_up(ddp, data, config, world)
    micro_steps = range(world.rank, config.gradient_accumulation_steps, world.size)
    weight = world.size / config.gradient_accumulation_steps  # DDP divides by world.size: the mean over micro-steps

    def batch(iter_num: int, micro_step: int) -> tuple[Tensor, Tensor]:
        return to_device(data.batch("train", data_iter(iter_num, rollbacks), micro_step), world.device)

    if not config.eval_only:
        X, Y = batch(state.iter_num, micro_steps[0])  # the very first
    agreement = world.agree([0, *saver.request()])
    flops = Flops(world.device)
    watch = Stopwatch()
    with saver.rescue_on_failure():
        while True:
            stopping, *answers = agreement.result()
            saver.apply(answers)
            done = state.iter_num >= config.max_iters

            # evaluate the loss on both splits; a state that was resumed may have been through this
            if not state.is_evaluated or config.eval_only:
                losses: dict[str, float] = {}
                if is_due := done or config.eval_only or state.iter_num % config.eval_interval == 0:
                    losses, stopping = evaluate(net, data, config, world, should_stop, stopping)
                if losses:
                    lr = learning_rate(config, state.iter_num)
                    more = perplexity(losses["val"], data) if config.eval_only and world.is_main else {}
                    say("eval", train_loss=losses["train"], val_loss=losses["val"], lr=lr, **flops.told(), **more)
                    state.best_val_loss = min(state.best_val_loss, losses["val"])
                    watch.evaluated()
                state.evaluated_at = state.iter_num if losses or not is_due else -1  # it was broken off: still to do
                state.val_loss = losses.get("val")

            # weights that differ between ranks were damaged: no state that has them may be kept
            if back := guard.compare_replicas():
                go_back(back)

            # keep the state in node memory and in storage as they are due; it is copied while the next step runs
            if not config.eval_only:
                saver.offer(state, state.val_loss, is_last=bool(done or stopping))
            for record in saver.take_events():
                say(**record)
                if record["kind"] == "checkpoint":
                    committed(record)
            if done or stopping or config.eval_only:
                is_complete = (done or config.eval_only) and state.is_evaluated
                is_preempted = stopping == StopRequest.PREEMPTED and not is_complete
                if not config.eval_only:
                    say("steps", **watch.window(saver.paused_s))
                saver.close(is_finished=not is_preempted)
                return Outcome(state.iter_num, state.best_val_loss, bool(stopping and not is_complete), is_preempted)

            t0 = time.perf_counter()
            agreement = world.agree([should_stop(), *saver.request()])  # answered while the step runs
            lr = learning_rate(config, state.iter_num)
            for group in state.optimizer.param_groups:
                group["lr"] = lr

            # forward and backward this rank's micro-steps; gradients are averaged over ranks in the last one
            loss_sum = torch.zeros((), device=world.device)
            for micro_step in micro_steps:
                is_last = micro_step == micro_steps[-1]
                following = (
                    (state.iter_num + 1, micro_steps[0]) if is_last else (state.iter_num, micro_step + world.size)
                )
                seed_dropout(state.model.config.dropout, config.seed, state.iter_num, micro_step)
                if ddp:
                    ddp.require_backward_grad_sync = is_last
                with autocast(config):
                    _, loss = (ddp or net)(X, Y)
                loss_sum += loss.detach()
                state.scaler.scale(loss * weight).backward()
                X, Y = batch(*following)  # drawn and sent while the GPU is still at the backward pass

            # clip; the numbers that decide about the step come from the GPU in one message, the only one that is waited
            # for: once it is here, the gradients are there, and what comes after it runs behind the next iteration
            norm = clip(state, config.grad_clip)
            loss_scale = state.scaler.scale(torch.ones_like(loss_sum))  # 1, but for float16
            numbers = torch.stack((norm, loss_sum, loss_scale)).tolist()
            verdict = guard.judge(*numbers)

            # step, and flush the gradients; those in DDP's buckets stay there, or they would exist twice
            with saver.state_changing():  # once what was offered is copied
                if verdict.is_good:
                    state.scaler.step(state.optimizer)
                    state.scaler.update()
                guard.note(verdict)
                state.iter_num += 1
            state.optimizer.zero_grad(set_to_none=ddp is None)
            if not verdict.is_good:
                say("step_skipped", iter=state.iter_num - 1, why=verdict.why, **guard.counts())
                if back := guard.after(verdict):
                    go_back(back)
            if window := watch.stepped(saver.paused_s):
                say("steps", **window)

            # timing and logging; the loss is the mean over this rank's micro-steps
            it = state.iter_num - 1
            if it % config.log_interval == 0:
                loss_value = numbers[1] / len(micro_steps)
                dt = time.perf_counter() - t0
                if it >= began_at + 5:  # let the loop settle a bit
                    flops.add(state.model.estimate_mfu(config.batch_size * len(micro_steps), dt, peak_flops=1.0))
                tokens_per_s = tokens_per_iter(config) / dt
                say("step", iter=it, loss=loss_value, lr=lr, dt_s=dt, **flops.told(), tokens_per_s=tokens_per_s)


def join_run(
    config: TrainConfig, world: World, store: CheckpointStore, rollbacks: Sequence[Rollback] = ()
) -> NodeTopology:
    """Make this attempt the one that writes to out_dir, and open what the nodes keep in memory of the run."""
    if config.eval_only:  # it writes nothing
        return open_node_memory(world, "", "")

    def join() -> str:
        store.folder.fence(world.attempt)
        delete_orphans(store.folder)
        delete_undone(store, rollbacks)
        return store.folder.run_id()

    run_id = world.on_main(lambda: store.folder.with_retries(join))
    return open_node_memory(world, config.memory_dir, run_id)


def go_on(data: Dataset, before: dict[str, Any], iter_num: int, world: World) -> Dataset:
    """Return the data from where a run with the settings `before` has left it, though this one's may be others."""
    sampling, warning = going_on(data.sampling, before, iter_num)
    if world.is_main and sampling.began != data.sampling.began and sampling.began[0] == iter_num:
        logger.info("sampling=epoch goes on at block %d of its order, with another global batch", sampling.began[1])
    if world.is_main and warning:
        logger.warning("%s", warning)
    return replace(data, sampling=sampling)


def carried(data: Dataset) -> Record:
    """Return what a state's config tells of the data besides the settings."""
    began = {} if data.sampling.began == (0, 0) else {"epoch_began": list(data.sampling.began)}
    return began | ({"tokenizer": data.tokenizer.to_json()} if data.tokenizer else {})


def keep(tokenizer: Tokenizer | None, config: TrainConfig, folder: RunFolder) -> None:
    """Put a tokenizer's file into out_dir, so that the run can be sampled wherever it is."""
    if not config.eval_only:
        folder.with_retries(lambda: keep_tokenizer(folder, tokenizer))


def warn_if_numerics_changed(now: Record, world: World, state: TrainState) -> None:
    """Compare what decides the bits with the other ranks and with the checkpoint that was resumed.

    Raises:
        DataError: this rank has other data than rank 0.
    """
    data_of_main = world.on_main(lambda: now["data"])
    if data_of_main != now["data"]:
        raise DataError(f"{platform.node()} has another dataset than rank 0: prepare the same one on every node")
    before = state.resumed_from.checkpoint.state["environment"] if state.resumed_from else now
    if world.is_main and (change := change_of_data(before, now)):
        logger.warning(
            "THE DATASET IS NOT THE ONE that this run was trained on so far: %s; it goes on with this one", change
        )
    others = {key: value for key, value in now.items() if key not in ("data", "train_tokens", "val_tokens")}
    # what an older version of this program did not note is no change
    changed = [f"{key} {before[key]} -> {x}" for key, x in others.items() if before.get(key, x) != x]
    if changed and world.is_main:
        logger.warning("the last bits may differ from an undisturbed run's: %s", ", ".join(changed))


def tell_changes(now: Record, saved: Record) -> None:
    """Say in one line which settings are others than those of the run that goes on."""
    changed = [f"{key} {saved[key]} -> {now[key]}" for key in now if key in saved and now[key] != saved[key]]
    told = [change for change in changed if change.split()[0] not in _NOT_TOLD]
    if told:
        logger.info("settings that differ from the saved run's: %s", ", ".join(told))


def tokens_per_iter(config: TrainConfig) -> int:
    """Return the tokens of the global batch."""
    return config.gradient_accumulation_steps * config.batch_size * config.block_size


def warm_up(ddp: DistributedDataParallel, data: Dataset, config: TrainConfig, world: World) -> None:
    """Run one throw-away forward and backward, so that every attempt sums gradients in the same order.

    After its first backward DDP rebuilds its buckets in the order in which gradients became ready, and with that the
    order of summation over three or more ranks. Without this, a resumed run's first step would be summed in the
    first order where the undisturbed run's was summed in the second, and the bits would differ. The gradients stay,
    as zeros, for DDP to move into the new buckets.
    """
    X, Y = to_device(data.batch("train", 0, 0), world.device)
    rows = config.batch_size if config.compile else 1  # one shows the order; another shape would be compiled anew
    with autocast(config):
        _, loss = ddp(X[:rows], Y[:rows])
    loss.backward()
    ddp.zero_grad(set_to_none=False)


def clip(state: TrainState, grad_clip: float) -> Tensor:
    """Scale the gradients down to the norm grad_clip, unless that is 0; return the norm that they had."""
    if grad_clip == 0.0:
        return torch.nn.utils.get_total_norm([p.grad for p in state.model.parameters() if p.grad is not None])
    state.scaler.unscale_(state.optimizer)
    return torch.nn.utils.clip_grad_norm_(state.model.parameters(), grad_clip)


@torch.no_grad()
def evaluate(
    net: nn.Module,
    data: Dataset,
    config: TrainConfig,
    world: World,
    should_stop: Callable[[], int] = lambda: StopRequest.NONE,
    stopping: int = StopRequest.NONE,
) -> tuple[dict[str, float], int]:
    """Return the mean loss per split over eval_iters batches, shared out to all ranks, and whether to go on.

    The batches are the same at every evaluation, so two losses compare states, not batches; and each loss has its
    own place in the sum, so that the mean has the same bits on any number of ranks. As soon as a rank is asked to stop,
    all of them break off, and there are no losses. stopping: what they have agreed on before.
    """
    net.eval()
    means = {}
    agreement = world.agree([stopping])
    for split in ("train", "val"):
        mine: list[Tensor] = []  # they stay on the device until all are there: no batch waits for the one before
        for first in range(0, config.eval_iters, world.size):
            if (stopping := agreement.result()[0]) != StopRequest.NONE:
                net.train()
                return {}, stopping
            agreement = world.agree([should_stop()])  # answered while the batches are computed
            if (k := first + world.rank) < config.eval_iters:
                X, Y = to_device(data.batch(split, 0, k, evaluation=True), world.device)
                with autocast(config):
                    _, loss = net(X, Y)
                mine.append(loss)
        losses = torch.zeros(config.eval_iters, dtype=torch.float64)
        if mine:
            losses[world.rank :: world.size] = torch.stack(mine).cpu().double()
        means[split] = world.sum(losses).mean().item()
    net.train()
    return means, agreement.result()[0]


def perplexity(val_loss: float, data: Dataset) -> dict[str, float]:
    """Return the perplexity of a validation loss (nats per token) and, where tokens are known, its bits per byte.

    Bits per byte compare models with different tokenizers: tokens are as long as they are in the whole split.
    """
    length_bytes = data.bytes_per_token("val")
    bits = {"bits_per_byte": val_loss / math.log(2) / length_bytes} if length_bytes else {}
    return {"perplexity": math.exp(val_loss), **bits}


def seed_dropout(dropout: float, seed: int, iter_num: int, micro_step: int) -> None:
    """Begin a micro-step's dropout, where the model has any: nothing else is random in it, and seeding takes time."""
    if dropout > 0:
        torch.manual_seed(dropout_seed(seed, iter_num, micro_step))


def dropout_seed(seed: int, iter_num: int, micro_step: int) -> int:
    """Return the seed of a micro-step's dropout: no random state has to be saved, whoever computes it."""
    return int(np.random.SeedSequence((seed, iter_num, micro_step)).generate_state(1, np.uint64)[0])


def autocast(config: TrainConfig) -> AbstractContextManager[Any]:
    """Return the context in which the model computes in dtype; its weights stay float32."""
    if config.dtype == "float32":
        return nullcontext()
    return torch.autocast(config.device.split(":")[0], dtype=getattr(torch, config.dtype))


def to_device(batch: tuple[Tensor, Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """Move a batch; to a GPU from pinned memory, so that the copy runs behind the computation."""
    if device.type == "cpu":
        return batch
    X, Y = batch
    return X.pin_memory().to(device, non_blocking=True), Y.pin_memory().to(device, non_blocking=True)


def beginning(config: TrainConfig, world: World, state: TrainState) -> Record:
    """Return what is told of an attempt at its start."""
    return {
        "max_iters": config.max_iters,
        **origin_of(state),
        "num_params": state.model.get_num_params(),
        "tokens_per_iter": tokens_per_iter(config),
        "world_size": world.size,
        "device": str(world.device),
        "dtype": config.dtype,
    }


def origin_of(state: TrainState) -> Record:
    """Return what is told of where the state came from."""
    if not (resumed := state.resumed_from):
        return {"from": None}
    return {
        "from": resumed.checkpoint.name,
        "restore_s": resumed.seconds,
        "size_bytes": resumed.size_bytes,
        "from_storage_bytes": resumed.from_storage_bytes,
    }


if __name__ == "__main__":
    runpy.run_module("orchestrator.worker.plain", run_name="__main__")  # which calls this module, by its own name
