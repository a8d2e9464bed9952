"""For how long training stands still for checkpoints, and how much slower it is with states in node memory.

Every side is measured around the same real training step: forward, backward, clip, optimizer, as the loop does them.
What a side does before the step, and what the step has to wait for before the optimizer may change the state, is the
pause. What it does behind the step is not, but shows in the time of the steps.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncSaveResponse, async_save

from benchmarks.checkpoint.state import Size, new_state, settings, torch_save
from orchestrator.checkpoint.save.policy import SaveIntervals
from orchestrator.checkpoint.save.saver import Saver
from orchestrator.checkpoint.save.to_storage import CheckpointEvent
from orchestrator.checkpoint.state import TrainState
from orchestrator.checkpoint.store import CheckpointStore
from orchestrator.distributed.world import World
from orchestrator.storage.run_folder import RunFolder
from orchestrator.telemetry.records import CheckpointFailed, CheckpointSaved
from orchestrator.training.attempt import join_run

_NEVER = 10**7  # iterations between checkpoints in storage: one is due when the benchmark sets iter_num to a multiple
_BLOCK = 2  # steps in which a state is copied and checksummed, if one step is long enough to copy it in
_LONGEST_S = 300.0


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Times:
    """Of one step: the pause, and the whole with it."""

    pause_s: float
    step_s: float


class Training:
    """A model that takes steps."""

    def __init__(self, state: TrainState, n_tokens: int) -> None:
        self.state = state
        torch.manual_seed(0)
        self._tokens = torch.randint(state.model.config.vocab_size, (1, n_tokens))

    def step(self, before: Callable[[], object] = _nothing, join: Callable[[], object] = _nothing) -> Times:
        """Train one step; `before` is called at its beginning, `join` when the state is about to change."""
        began_s = time.perf_counter()
        before()
        pause_s = time.perf_counter() - began_s
        _, loss = self.state.model(self._tokens, self._tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.state.model.parameters(), 1.0)
        joining_s = time.perf_counter()
        join()
        pause_s += time.perf_counter() - joining_s
        self.state.optimizer.step()
        self.state.optimizer.zero_grad(set_to_none=True)
        self.state.iter_num += 1
        return Times(pause_s, time.perf_counter() - began_s)


class Saving:
    """Training with a Saver, in the order of `orchestrator/loop.py`."""

    def __init__(self, training: Training, size: Size, out_dir: Path, memory_dir: Path) -> None:
        self._training = training
        self._world = World(attempt="benchmark")
        config = settings(size, str(out_dir), str(memory_dir))
        store = CheckpointStore(RunFolder(config.out_dir))
        nodes = join_run(config, self._world, store)
        self._saver = Saver(training.state, self._world, store, nodes, {}, SaveIntervals(_NEVER, keep=1))
        self._vote = self._world.agree([0, *self._saver.request()])
        self._news: list[CheckpointEvent] = []
        self.interval = 1  # between states in node memory, as the Saver has chosen it
        self._is_copying = False

    def close(self) -> None:
        """Let go of node memory."""
        self._saver.close(is_finished=True)

    def step(self, is_offered: bool = True) -> Times:
        """Train one step, with everything that the loop does for checkpoints in it."""

        def before() -> None:
            _, *answers = self._vote.result()
            self._saver.apply(answers)
            if is_offered:
                self._saver.offer(self._training.state, None)
            self._news += self._saver.take_events()
            request = self._saver.request()
            self._vote = self._world.agree([0, *request])
            self._is_copying, self.interval = bool(request[0]), request[3]

        return self._training.step(before, self._saver.join)

    def warm_up(self) -> None:
        """Step until both generations have been written in node memory, and what they cost is known."""
        deadline_s = time.monotonic() + _LONGEST_S
        for _ in range(4):
            self._training.state.iter_num += self.interval  # or it would take as long as they are rare
            self.step()
            self.step(is_offered=False)
            while self._is_copying and time.monotonic() < deadline_s:
                self.step(is_offered=False)

    def save(self) -> tuple[float, list[float]]:
        """Take the step whose state is due in storage, and others until it is there.

        Returns the pause, and the lengths of the other steps, in seconds.
        """
        state = self._training.state
        state.iter_num += -state.iter_num % _NEVER or _NEVER
        self._news = []
        pauses_s: dict[int, float] = {}
        steps_s = []
        deadline_s = time.monotonic() + _LONGEST_S
        while time.monotonic() < deadline_s:
            iter_num = state.iter_num
            times = self.step()
            pauses_s[iter_num] = times.pause_s
            steps_s.append(times.step_s)
            for record in self._news:
                if isinstance(record, CheckpointFailed):
                    raise RuntimeError(f"the checkpoint failed: {record.why}")
                if isinstance(record, CheckpointSaved):
                    return pauses_s[record.iter], steps_s[1:]
        raise RuntimeError(f"no checkpoint was announced within {_LONGEST_S:g} s")


class DCP:
    """torch.distributed.checkpoint.async_save by its thread, with one way of staging the state in host memory.

    default: as it is when one gives a path. cached: with a stager whose buffers stay. overlapped: such a stager that
    copies behind the step, joined as ours is; documented for CUDA alone, but it works for tensors in host memory.
    """

    kinds = ("default", "cached", "overlapped")

    def __init__(self, kind: str, training: Training, folder: Path) -> None:
        self._training, self._path = training, folder / f"dcp-{kind}"
        self._stager = None if kind == "default" else DefaultStager(_staging(kind == "overlapped"))

    def close(self) -> None:
        """Let go of the buffers."""
        if self._stager:
            self._stager.close()

    def save(self) -> float:
        """Take a step whose state is saved; wait for the files and delete them. Returns the pause in seconds."""
        answers: list[Future[Any] | AsyncSaveResponse] = []
        state = self._training.state

        def before() -> None:
            tensors = {"model": state.model.state_dict(), "optimizer": state.optimizer.state_dict()}
            answers.append(async_save(tensors, checkpoint_id=self._path, async_stager=self._stager))

        def join() -> None:
            if isinstance(answers[0], AsyncSaveResponse):
                answers[0].staging_completion.result()

        times = self._training.step(before, join)
        answer = answers[0]
        (answer.upload_completion if isinstance(answer, AsyncSaveResponse) else answer).result()
        shutil.rmtree(self._path)
        return times.pause_s


def _staging(is_overlapped: bool) -> StagingOptions:
    return StagingOptions(
        use_pinned_memory=False, use_shared_memory=False, use_async_staging=is_overlapped, use_non_blocking_copy=False
    )


@contextmanager
def _rivals(training: Training, folder: Path) -> Iterator[dict[str, DCP]]:
    """Lend DCP in its variants, in a process group of one, which it wants."""
    dist.init_process_group("gloo", init_method=(folder / "meeting").as_uri(), rank=0, world_size=1)
    rivals = {kind: DCP(kind, training, folder) for kind in DCP.kinds}
    try:
        yield rivals
    finally:
        for rival in rivals.values():
            rival.close()
        dist.destroy_process_group()


def measure_pauses(size: Size, n_tokens: int, rounds: int, out_dir: Path, memory_dir: Path) -> dict[str, Any]:
    """Return the seconds of the pauses for a checkpoint in storage: ours, torch.save's and DCP's, which take turns."""
    torch.set_num_threads(1)  # what a worker of the product has; another core is free
    training = Training(new_state(size), n_tokens)
    saving = Saving(training, size, out_dir / "run", memory_dir)
    saving.warm_up()
    pauses: dict[str, list[float]] = {kind: [] for kind in ("ours", "torch_save", *DCP.kinds)}
    steps_s: dict[str, list[float]] = {"uploading": [], "idle": []}
    with _rivals(training, out_dir) as rivals:
        for _ in range(1 + rounds):
            pause_s, while_uploading_s = saving.save()
            pauses["ours"].append(pause_s)
            steps_s["uploading"] += while_uploading_s
            pauses["torch_save"].append(_torch_save_pause(training, out_dir / "ckpt.pt"))
            steps_s["idle"] += [training.step().step_s for _ in range(3)]
            for kind, rival in rivals.items():
                pauses[kind].append(rival.save())
    interval = saving.interval
    saving.close()
    return {
        "pauses_s": {side: taken[1:] for side, taken in pauses.items()},  # the first are of cold buffers
        "step_s": median(steps_s["idle"]),
        "step_while_uploading_s": median(steps_s["uploading"] or steps_s["idle"]),
        "interval": interval,
    }


def _torch_save_pause(training: Training, path: Path) -> float:
    times = training.step(lambda: torch_save(training.state, path))
    path.unlink()  # what was not written yet never will be: nothing waits for it
    return times.pause_s


def measure_slowdown(
    size: Size, n_tokens: int, threads: int, pairs: int, out_dir: Path, memory_dir: Path
) -> dict[str, Any]:
    """Return how much slower training is with states in node memory at the interval that the Saver chooses.

    Blocks of steps take turns, with exactly one state in every other. The difference is what a state costs, and it is
    spread over as many steps as the interval has: noise is spread with it, so that rare states can be measured too.
    """
    torch.set_num_threads(threads)
    training = Training(new_state(size), n_tokens)
    saving = Saving(training, size, out_dir / "run", memory_dir)
    saving.warm_up()
    costs_s, steps_s, pauses_s = [], [], []
    for pair in range(pairs):
        blocks = {}
        for has_state in (pair % 2 == 0, pair % 2 == 1):  # who goes first alternates too
            if has_state:
                training.state.iter_num += saving.interval  # so that one is due in the first of these steps
                times = [saving.step(is_offered=k == 0) for k in range(_BLOCK)]
                pauses_s.append(sum(each.pause_s for each in times))
            else:
                times = [training.step() for _ in range(_BLOCK)]
                steps_s.append(median(each.step_s for each in times))
            blocks[has_state] = sum(each.step_s for each in times)
        costs_s.append(blocks[True] - blocks[False])
    interval = saving.interval
    saving.close()
    step_s, cost_s = median(steps_s), median(costs_s)
    low_s, _, high_s = quantiles(costs_s, n=4)
    return {
        "slowdown": 1 + cost_s / (interval * step_s),
        "slowdown_quartiles": [1 + each_s / (interval * step_s) for each_s in (low_s, high_s)],
        "cost_of_a_state_s": cost_s,
        "pause_s": median(pauses_s),
        "step_s": step_s,
        "interval": interval,
        "threads": threads,
    }
