"""An attempt: all that loop.py needs around its steps, opened before the first and closed after the last.

An attempt trains on one process group, from the state that it finds to max_iters, a stop request or an error. It must
not know how a step is computed, nor who started it: its caller is a `Hooks`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from enum import IntEnum
from itertools import count
from typing import NoReturn, Protocol

from torch import Tensor, nn

from orchestrator.checkpoint.formats.run_tokenizer import keep_tokenizer
from orchestrator.checkpoint.restore.init_from import scratch_args
from orchestrator.checkpoint.restore.restore import restore_or_initialize
from orchestrator.checkpoint.rollbacks import Rollback, data_iter, delete_undone, read_rollbacks, write_rollbacks
from orchestrator.checkpoint.save.node_topology import NodeTopology, open_node_memory
from orchestrator.checkpoint.save.policy import SaveIntervals
from orchestrator.checkpoint.save.saver import Saver
from orchestrator.checkpoint.state import TrainState
from orchestrator.checkpoint.store import CheckpointStore
from orchestrator.config import TrainConfig
from orchestrator.data.dataset import Dataset
from orchestrator.data.order import BatchOrder
from orchestrator.data.token_files import open_token_files
from orchestrator.distributed.device import to_device
from orchestrator.distributed.numerics import NumericsFingerprint, make_deterministic
from orchestrator.distributed.world import World
from orchestrator.errors import RolledBackError
from orchestrator.storage.options import redacted
from orchestrator.storage.orphans import delete_orphans
from orchestrator.storage.run_folder import RunFolder
from orchestrator.telemetry.flops import Flops
from orchestrator.telemetry.records import (
    Begin,
    CheckpointSaved,
    Evaluation,
    LanesChanged,
    Record,
    RollingBack,
    Step,
    StepSkipped,
    StepWindow,
)
from orchestrator.telemetry.stopwatch import Stopwatch
from orchestrator.training.changes import continue_order, log_changed_settings, warn_if_numerics_changed
from orchestrator.training.choose_lanes import choose_lanes, saved_lanes
from orchestrator.training.evaluation import evaluate, perplexity
from orchestrator.training.guard import Guard, Verdict
from orchestrator.training.lr_schedule import learning_rate


class StopRequest(IntEnum):
    """Whether the loop goes on. The highest of all ranks' requests counts."""

    NONE = 0
    STOP = 1
    PREEMPTED = 2  # the machine of a rank is taken away


@dataclass(frozen=True)
class Outcome:
    """How a call of `train` ended: at max_iters, or stopped before. preempted: because a machine is taken away."""

    iter_num: int
    best_val_loss: float
    stopped: bool = False
    preempted: bool = False


class Hooks(Protocol):
    """The loop's caller, as the loop sees it."""

    def record(self, record: Record) -> None:
        """Take a record of the run; on rank 0 only."""

    def committed(self, checkpoint: CheckpointSaved) -> None:
        """Hear of a checkpoint that is committed in storage; on all ranks."""

    def stop_request(self) -> int:
        """Return a StopRequest: called before every step and every batch of an evaluation.

        If any rank answers STOP or PREEMPTED, all of them save and leave after the iteration; an evaluation breaks off.
        """

    def ready(self, saver: Saver) -> None:
        """Take what can rescue the state of this attempt, before its first iteration; on all ranks."""


@dataclass(frozen=True)
class Callbacks:
    """Hooks made of functions. By default nobody listens, and nobody stops the run."""

    record: Callable[[Record], None] = lambda _record: None
    committed: Callable[[CheckpointSaved], None] = lambda _checkpoint: None
    stop_request: Callable[[], int] = lambda: StopRequest.NONE
    ready: Callable[[Saver], None] = lambda _saver: None


NO_HOOKS = Callbacks()


@dataclass(eq=False)
class Attempt:
    """One rank's part: the data, the state, what keeps it safe, and the records."""

    config: TrainConfig
    world: World
    hooks: Hooks
    data: Dataset
    store: CheckpointStore
    rollbacks: Sequence[Rollback]
    state: TrainState
    saver: Saver
    guard: Guard
    lanes: int  # 0: DDP's order of summation

    def __post_init__(self) -> None:
        self._began_at = self.state.iter_num
        self._flops = Flops(self.world.device)
        self.stopwatch = Stopwatch()
        self._snapshots = self.saver.snapshot_cost.published

    def emit(self, record: Record) -> None:
        """Pass a record to the hooks, on rank 0."""
        if self.world.is_main:
            self.hooks.record(record)

    def batches(self, micro_steps: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of this rank's micro-steps from this iteration on, each (B, T) twice, on the device.

        A batch is a pure function of (seed, split, iter_num, micro_step), so there is no loader state.
        """
        for iter_num in count(self.state.iter_num):
            for micro_step in micro_steps:
                drawn = self.data.batch("train", data_iter(iter_num, self.rollbacks), micro_step)
                yield to_device(drawn, self.world.device)

    def evaluate_if_due(self, net: nn.Module, stop: int) -> int:
        """Evaluate the state, if that is due and not done; return the request to stop, which breaks it off."""
        state = self.state
        if state.is_evaluated:  # as a resumed one may be
            return stop
        if state.iter_num < self.config.max_iters and state.iter_num % self.config.eval_interval:
            state.evaluated_at, state.val_loss = state.iter_num, None
            return stop
        return self.evaluate(net, stop)

    def evaluate(self, net: nn.Module, stop: int = StopRequest.NONE) -> int:
        """Evaluate the state; return the request to stop. If it breaks the evaluation off, that is still to do."""
        state, config = self.state, self.config
        losses, stop = evaluate(net, self.data, config, self.world, self.hooks.stop_request, stop)
        if losses:
            more = perplexity(losses["val"], self.data) if config.eval_only and self.world.is_main else {}
            self.emit(
                Evaluation(
                    iter=state.iter_num,
                    train_loss=losses["train"],
                    val_loss=losses["val"],
                    lr=learning_rate(config, state.iter_num),
                    mfu=self._flops.mfu,
                    tflops=self._flops.tflops,
                    **more,
                )
            )
            state.best_val_loss = min(state.best_val_loss, losses["val"])
            self.stopwatch.evaluated()
        state.evaluated_at = state.iter_num if losses else -1
        state.val_loss = losses.get("val")
        return stop

    def record_checkpoints(self) -> None:
        """Record what has become of checkpoints since the last call."""
        for record in self.saver.take_events():
            self.emit(record)
            if isinstance(record, CheckpointSaved):
                self.hooks.committed(record)

    def record_step(
        self, verdict: Verdict, lr: float, loss: float, grad_norm: float, n_micro_steps: int, t0: float
    ) -> None:
        """Record the iteration that has just ended; loss, grad_norm: the global batch's; t0: when it began.

        Raises:
            RolledBackError: on all ranks alike, after too many bad steps.
        """
        iter_num, config = self.state.iter_num - 1, self.config
        if not verdict.is_good:
            self.emit(StepSkipped(iter=iter_num, why=verdict.why, **self.guard.counts()))
            if rollback := self.guard.after(verdict):
                self.roll_back(rollback)
        if window := self.stopwatch.stepped(self.state.iter_num, self.saver.paused_s):
            self._emit_window(window)
        if iter_num % config.log_interval:
            return
        dt_s = time.perf_counter() - t0
        if iter_num >= self._began_at + 5:  # let the loop settle a bit
            flops = self.state.model.estimate_mfu(config.batch_size * n_micro_steps, dt_s, peak_flops=1.0)
            self._flops.add(flops)
        self.emit(
            Step(
                iter=iter_num,
                loss=loss,
                lr=lr,
                dt_s=dt_s,
                mfu=self._flops.mfu,
                tflops=self._flops.tflops,
                tokens_per_s=tokens_per_iter(config) / dt_s,
                grad_norm=grad_norm,
            )
        )

    def _emit_window(self, window: StepWindow) -> None:
        """Record a window with the snapshots that were published in it."""
        snapshots = self.saver.snapshot_cost.published  # the copier may add to them at any moment
        new, self._snapshots = snapshots.since(self._snapshots), snapshots
        self.emit(replace(window, snapshots=new.copies, snapshot_s=new.seconds, snapshot_bytes=new.size_bytes))

    def roll_back(self, rollback: Rollback) -> NoReturn:
        """Undo a stretch, from now on and for all attempts.

        Raises:
            RolledBackError: always, on all ranks alike.
        """
        self.emit(RollingBack(iter=self.state.iter_num, **asdict(rollback)))
        self.world.on_main(write_rollbacks, self.store.folder, [*self.rollbacks, rollback])
        self.saver.close(is_finished=False)
        raise RolledBackError(rollback.why)

    def finish(self, stop: int) -> Outcome:
        """Let go of the state, which is safe in storage, and return how the attempt ended."""
        state, config = self.state, self.config
        is_complete = (state.iter_num >= config.max_iters or config.eval_only) and state.is_evaluated
        is_preempted = stop == StopRequest.PREEMPTED and not is_complete
        if not config.eval_only:
            self._emit_window(self.stopwatch.window(state.iter_num, self.saver.paused_s))
        self.saver.close(is_finished=not is_preempted)
        return Outcome(state.iter_num, state.best_val_loss, bool(stop and not is_complete), is_preempted)


def open_attempt(config: TrainConfig, world: World, folder: RunFolder, hooks: Hooks) -> Attempt:
    """Open data and storage, restore the newest state or begin as init_from says, and record the beginning.

    Raises:
        UserError: on all ranks alike, if data or checkpoints do not fit.
    """
    make_deterministic(config)
    files = world.collectively(open_token_files, config.data_dir, config.dataset)
    store = CheckpointStore(folder)

    # the state: the newest that is whole in a node's memory or in storage, or what init_from names
    rollbacks = read_rollbacks(folder, world)
    nodes = join_run(config, world, store, rollbacks)
    tokenizer = files.tokenizer.to_json() if files.tokenizer else None
    scratch = scratch_args(config, files.vocab_size)
    state = restore_or_initialize(config, world, store, nodes, scratch, rollbacks, tokenizer)
    world.collectively(files.check_fits, config.block_size, state.model.config.vocab_size)
    order = continue_order(batch_order(config), state.config, data_iter(state.iter_num, rollbacks), world)
    state.config = redacted(config)
    if order.began != (0, 0):
        state.config["epoch_began"] = list(order.began)
    if tokenizer:
        state.config["tokenizer"] = tokenizer

    state.config["lanes"] = lanes = choose_lanes(config, world, state)

    lengths = {f"{split}_tokens": len(tokens) for split, tokens in files.splits.items()}
    fingerprint = NumericsFingerprint.of_this_rank(config, world, files.fingerprint(), lanes=lanes, **lengths)
    world.collectively(warn_if_numerics_changed, fingerprint, world, state)
    if not config.eval_only:  # so that the run can be sampled wherever it is
        world.on_main(folder.with_retries, keep_tokenizer, folder, files.tokenizer)
    if world.is_main:
        hooks.record(_begin(config, world, state, lanes))
        if (before := saved_lanes(state)) not in (None, lanes):
            hooks.record(LanesChanged(iter=state.iter_num, lanes=lanes, before=before))
        if state.resumed_from:
            log_changed_settings(state.config, state.resumed_from.checkpoint.state["config"])

    # what keeps the state safe while training goes on
    intervals = SaveIntervals(config.iters_per_checkpoint, config.snapshot_interval, config.keep_checkpoints)
    saver = Saver(state, world, store, nodes, fingerprint.to_json(), intervals)
    hooks.ready(saver)
    guard = Guard(config, world, state, rollbacks)
    return Attempt(config, world, hooks, Dataset(files, order), store, rollbacks, state, saver, guard, lanes)


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

    run_id = world.on_main(store.folder.with_retries, join)
    return open_node_memory(world, config.memory_dir, run_id)


def batch_order(config: TrainConfig) -> BatchOrder:
    """Return how batches are drawn under this config."""
    return BatchOrder(
        config.seed, config.batch_size, config.block_size, config.gradient_accumulation_steps, config.sampling
    )


def tokens_per_iter(config: TrainConfig) -> int:
    """Return the tokens of the global batch."""
    return config.gradient_accumulation_steps * config.batch_size * config.block_size


def _begin(config: TrainConfig, world: World, state: TrainState, lanes: int) -> Begin:
    resumed = state.resumed_from
    return Begin(
        iter=state.iter_num,
        max_iters=config.max_iters,
        from_=resumed.checkpoint.name if resumed else None,
        restore_s=resumed.seconds if resumed else None,
        size_bytes=resumed.size_bytes if resumed else None,
        from_storage_bytes=resumed.from_storage_bytes if resumed else None,
        num_params=state.model.get_num_params(),
        num_trained=sum(each.numel() for each in state.trained.values()) if state.adapters else None,
        tokens_per_iter=tokens_per_iter(config),
        world_size=world.size,
        device=str(world.device),
        dtype=config.dtype,
        lanes=lanes,
    )
