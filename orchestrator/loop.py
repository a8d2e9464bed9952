"""The training loop, top to bottom: nanoGPT's, on any number of ranks, resumable at any iteration.

Knows no Ray. `worker/run.py` calls it on a cluster, `worker/plain.py` in a plain process or several:

    python -m orchestrator.loop configs/quickstart.py
    torchrun --nproc_per_node=2 -m orchestrator.loop configs/quickstart.py
"""

from __future__ import annotations

import runpy
import time
from contextlib import suppress
from dataclasses import replace

import torch

from orchestrator.config import TrainConfig
from orchestrator.distributed.device import agree_on_dtype, autocast
from orchestrator.distributed.join import new_attempt
from orchestrator.distributed.numerics import agree_to_compile, compiled, free_memory
from orchestrator.distributed.parallelism import Parallelism, parallelize
from orchestrator.distributed.world import World
from orchestrator.errors import RolledBackError
from orchestrator.storage.run_folder import RunFolder, open_run_folder
from orchestrator.training.attempt import NO_HOOKS, Attempt, Hooks, Outcome, open_attempt
from orchestrator.training.step import mean_over_ranks, seed_dropout, set_learning_rate


def train(config: TrainConfig, world: World, hooks: Hooks = NO_HOOKS, folder: RunFolder | None = None) -> Outcome:
    """Train from the newest state in out_dir, or from init_from, to max_iters; config is resolved for this machine.

    folder: the run's, if this process has opened it.

    Raises:
        UserError: on all ranks alike, if data or checkpoints do not fit.
    """
    config = agree_to_compile(agree_on_dtype(config, world), world)
    folder = folder or open_run_folder(config)
    if config.eval_only:
        return evaluate_only(config, world, folder, hooks)
    while True:
        with suppress(RolledBackError):  # on all ranks alike; behind this, no error holds on to the old state
            return train_on(config, world, folder, hooks)
        free_memory(config, world.device)
        world = replace(world, attempt=world.on_main(new_attempt))


def evaluate_only(config: TrainConfig, world: World, folder: RunFolder, hooks: Hooks) -> Outcome:
    """Evaluate the newest state once, and write nothing."""
    run = open_attempt(config, world, folder, hooks)
    with run.saver.rescuer.rescue_on_failure():
        return run.finish(run.evaluate(compiled(run.state.model, config)))


def train_on(config: TrainConfig, world: World, folder: RunFolder, hooks: Hooks) -> Outcome:
    """Train as `train` does, until a stretch turns out to have gone wrong.

    Raises:
        RolledBackError: on all ranks alike; the next call begins before that stretch, with other data.
    """
    run = open_attempt(config, world, folder, hooks)
    model = parallelize(run.state.model, config, world, run.lanes)
    with run.saver.rescuer.rescue_on_failure():
        return iterate(run, model)


def iterate(run: Attempt, model: Parallelism) -> Outcome:
    """Evaluate, save and step, until max_iters is reached or a rank is asked to stop."""
    config, world, state, saver, guard = run.config, run.world, run.state, run.saver, run.guard
    batches = run.batches(model.micro_steps)
    X, Y = next(batches)  # the very first
    agreement = world.agree([0, *saver.request()])
    run.stopwatch.start()
    while True:
        stop, *answers = agreement.result()  # of all ranks, asked while the last step ran
        saver.apply(answers)

        # evaluate the loss on both splits, if that is due
        stop = run.evaluate_if_due(model.net, stop)
        is_last = state.iter_num >= config.max_iters or bool(stop)

        # weights that differ between ranks were damaged: no state that has them may be kept
        if rollback := guard.compare_replicas():
            run.roll_back(rollback)

        # keep the state in node memory and in storage, as they are due; it is copied while the next step runs
        saver.offer(state, state.val_loss, is_last)
        run.record_checkpoints()
        if is_last:
            return run.finish(stop)

        # forward and backward this rank's micro-steps; in the last one the gradients become the mean over all ranks
        t0 = time.perf_counter()
        agreement = world.agree([run.hooks.stop_request(), *saver.request()])  # answered while the step runs
        lr = set_learning_rate(state.optimizer, config, state.iter_num)
        losses = []
        for micro_step in model.micro_steps:
            seed_dropout(max(config.dropout, config.lora_dropout), config.seed, state.iter_num, micro_step)
            with model.accumulate(micro_step):
                with autocast(config):
                    loss = model(X, Y)[1]  # a name for the logits would keep them in memory
                losses.append(loss.detach())
                state.scaler.scale(loss * model.weight).backward()  # type: ignore[no-untyped-call]
            X, Y = next(batches)  # drawn and sent while the GPU is still at the backward pass

        # clip; the numbers that decide about the step come from the GPU in one message, and we wait for no other: once
        # it is here, the gradients are there, and what comes after it runs behind the next iteration
        norm = model.clip(state.optimizer, state.scaler, config.grad_clip)
        scale = state.scaler.scale(torch.ones_like(norm))  # 1, but for float16
        numbers = torch.stack((norm, scale, *losses)).tolist()
        mean_loss = mean_over_ranks(numbers[2:], model.micro_steps, config, world)
        verdict = guard.judge(numbers[0], mean_loss, numbers[1])

        # step, unless the numbers are bad: then all ranks skip it alike
        with saver.state_changing():  # once the state that was offered is copied
            if verdict.is_good:
                state.scaler.step(state.optimizer)
                state.scaler.update()
            guard.note(verdict)  # part of the state
            state.iter_num += 1
        model.zero_grad(state.optimizer)

        # timing and logging; too many bad steps in a row end the attempt
        run.record_step(verdict, lr, mean_loss, numbers[0], len(model.micro_steps), t0)


if __name__ == "__main__":
    runpy.run_module("orchestrator.worker.plain", run_name="__main__")  # which calls this module, by its own name
