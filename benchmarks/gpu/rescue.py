"""What the acceptance asks of rescues behind a stuck stream, and of what a run that goes back leaves in memory."""

from __future__ import annotations

import json
import threading
import time
import traceback
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

import orchestrator.loop as loop
from benchmarks.gpu.child import Report, Setting, leave
from benchmarks.gpu.kernels import hold
from benchmarks.gpu.runs import settings
from benchmarks.gpu.watch import building, in_steps, watching
from orchestrator.checkpoint.save.saver import Saver
from orchestrator.checkpoint.state import TrainState
from orchestrator.distributed.join import plain_world
from orchestrator.training.attempt import Callbacks

_STUCK_AT, _STUCK_S, _RESCUE_S = 5, 20.0, 5.0
_MODEL = {"n_layer": 4, "n_head": 16, "n_embd": 1024, "gradient_accumulation_steps": 1, "batch_size": 4}
_LEFT_BYTES = 100_000_000  # a state of that size has 1.2 GB with its moments


def rescue_after_step(setting: Setting, report: Report) -> None:
    """A state is rescued while the loop waits for a stream that is stuck behind a lost peer."""
    _rescue(setting, report, {}, 0)


def rescue_before_first_step(setting: Setting, report: Report) -> None:
    """The same in the first iteration of an attempt, which has changed nothing of the state yet."""
    _rescue(setting, report, {}, _STUCK_AT)


def rescue_float16(setting: Setting, report: Report) -> None:
    """The same with float16, whose loss scale is a part of the state and lies on the device."""
    _rescue(setting, report, {"dtype": "float16"}, 0)


def _rescue(setting: Setting, report: Report, changes: dict[str, Any], begin_at: int) -> None:
    """Train, from iteration begin_at of an earlier attempt on, get stuck at iteration _STUCK_AT, rescue its state."""
    out_dir = setting.folder / "run" / "out"
    changes = {**_MODEL, **changes, "snapshot_interval": 1000, "lr_decay_iters": 1000, "dropout": 0.0}
    if begin_at:
        config = settings(setting, out_dir, {**changes, "max_iters": begin_at})
        loop.train(config, plain_world(config))
    config = settings(setting, out_dir, {**changes, "max_iters": 100})
    asked = iter(range(begin_at, 1000))
    with watching() as watched:

        def stop_request() -> int:
            if next(asked) == _STUCK_AT:
                expected, scaler = watched.tensors(), watched.states[-1].scaler.state_dict()
                _get_stuck(setting, lambda: _told_rescue(setting, report, watched.savers[-1], expected, scaler))
            return 0

        hooks = Callbacks(stop_request=in_steps(stop_request), ready=watched.savers.append)
        loop.train(config, plain_world(config), hooks)
    raise RuntimeError("the loop came to its end, and was to be ended by the rescue")


def _get_stuck(setting: Setting, rescue: Callable[[], None]) -> None:
    """Let the loop get stuck, which is on a GPU as soon as it asks for a number, and call rescue meanwhile."""

    def soon() -> None:
        time.sleep(0.5)
        try:
            rescue()
        except Exception:
            traceback.print_exc()
            leave(1)
        leave(0)

    if setting.is_on_gpu:
        hold(_STUCK_S)
    threading.Thread(target=soon).start()
    if not setting.is_on_gpu:
        time.sleep(_STUCK_S)


def _told_rescue(
    setting: Setting, report: Report, saver: Saver, expected: dict[str, Tensor], scaler: dict[str, Any]
) -> None:
    began_s = time.monotonic()
    iter_num = saver.rescue()
    seconds = time.monotonic() - began_s
    report.figure("size_gb", sum(tensor.nbytes for tensor in expected.values()) / 1e9)
    saw = f"iteration {iter_num} of {_STUCK_AT} in {seconds:.2f} s"
    text = f"the state is rescued in less than {_RESCUE_S:.0f} s while the loop is stuck"
    report.claim(text, iter_num == _STUCK_AT and seconds < _RESCUE_S, saw)
    found: dict[str, Tensor] = {}
    for file in _rescued(setting, "*.safetensors"):
        found |= load_file(file)
    same = found.keys() == expected.keys() and all(torch.equal(found[name], x) for name, x in expected.items())
    report.claim("what was rescued has the state's bits", same, f"{len(found)} of {len(expected)} tensors")
    if scaler:
        scalers = [json.loads(file.read_text())["scaler"] for file in _rescued(setting, "state.json")]
        report.claim("and float16's loss scale", scalers == [scaler], f"{scalers}, of {scaler}")


def _rescued(setting: Setting, pattern: str) -> list[Path]:
    return list(Path(setting.memory_dir).rglob(f"checkpoint_{_STUCK_AT:08d}_*/{pattern}"))


def rollback(setting: Setting, report: Report) -> None:
    """A run that goes back before bad numbers has freed the state that it gives up before it builds the next one."""
    more = {"max_iters": 8, "checkpoint_interval": 4, "max_bad_steps": 2, "dropout": 0.0}
    more["compile"] = setting.is_on_gpu and not setting.is_tiny  # the compiler keeps more of a model
    config = settings(setting, setting.folder / "run" / "out", {**_MODEL, **more})
    held_bytes: list[int] = []  # on the GPU, each time that a state is to be built
    models: list[weakref.ref[Any]] = []
    is_alive: list[bool] = []

    def note(build: Callable[[], TrainState]) -> TrainState:
        held_bytes.append(torch.cuda.memory_allocated() if setting.is_on_gpu else 0)
        is_alive.extend(model() is not None for model in models)
        state = build()
        if not models:  # iterations 5 and 6 of the first attempt are bad
            numbers, weight = weakref.ref(state), state.model.lm_head.weight
            hook: Any = weight.register_hook
            hook(lambda grad: grad * float("nan") if _is_bad(numbers()) else grad)
        models.append(weakref.ref(state.model))
        return state

    with building(note):
        loop.train(config, plain_world(config))
    report.figure("held_before_gb", [size / 1e9 for size in held_bytes])
    report.claim("the run has gone back once and has come to its end", len(models) == 2, f"{len(models)} states")
    report.claim("the model that was given up is gone before the next one is built", not any(is_alive))
    if setting.is_on_gpu:
        left = held_bytes[-1] - held_bytes[0]
        report.claim("and so is its memory on the GPU", left < _LEFT_BYTES, f"{left / 1e6:.0f} MB are left")


def _is_bad(state: TrainState | None) -> bool:
    return state is not None and state.iter_num in (5, 6)
