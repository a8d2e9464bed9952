"""Runs that are killed and go on, for the acceptance: each attempt is a process of its own, in which the loop trains.

What they claim is what a user bets on: a run that was disturbed ends with the bits of one that was not.
"""

from __future__ import annotations

import os
import pickle
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from benchmarks.gpu.child import LONG_S, Child, Found, Report, Setting, cache_in
from benchmarks.gpu.watch import in_steps
from model.lora import is_adapter
from orchestrator.checkpoint.store import CheckpointStore
from orchestrator.config import TrainConfig, check
from orchestrator.distributed.device import resolve
from orchestrator.distributed.join import plain_world
from orchestrator.distributed.numerics import agree_to_compile
from orchestrator.loop import train
from orchestrator.storage.run_folder import RunFolder
from orchestrator.telemetry.records import Begin, Record, Step
from orchestrator.training.attempt import Callbacks

TRAIN = "benchmarks.gpu.runs:train_here"
KILL_AT, MAX_ITERS, LANES = 6, 12, 4
IN_LANES = {"lanes": LANES, "gradient_accumulation_steps": LANES}
TINY_VOCAB_SIZE = 64
_TINY = {"n_layer": 1, "n_head": 2, "n_embd": 32, "block_size": 32, "batch_size": 2}
_CONTEXT_BYTES = 100_000_000  # a context on a GPU takes hundreds of MB


def write_tokens(data_dir: Path, is_tiny: bool) -> None:
    """Make the dataset `tokens`, unevenly distributed: GPT-2's vocabulary or, tiny, nanoGPT's characters."""
    folder = data_dir / "tokens"
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    vocab_size, count = (TINY_VOCAB_SIZE, 20_000) if is_tiny else (50257, 2_000_000)
    for split in ("train", "val"):
        (rng.zipf(1.2, count) % vocab_size).astype(np.uint16).tofile(folder / f"{split}.bin")
    if is_tiny:
        letters = {chr(32 + i): i for i in range(vocab_size)}
        meta = {"vocab_size": vocab_size, "stoi": letters, "itos": {i: letter for letter, i in letters.items()}}
        (folder / "meta.pkl").write_bytes(pickle.dumps(meta))


def settings(setting: Setting, out_dir: Path, changes: dict[str, Any]) -> TrainConfig:
    """Return the resolved settings of a run in out_dir, which gets a dataset beside it."""
    if not (out_dir.parent / "data").exists():
        write_tokens(out_dir.parent / "data", setting.is_tiny)
    values = {
        **{"out_dir": str(out_dir), "data_dir": str(out_dir.parent / "data"), "dataset": "tokens"},
        **{"device": setting.device, "backend": "gloo", "compile": False, "memory_dir": setting.memory_dir},
        **{"n_layer": 4, "n_head": 12, "n_embd": 768, "block_size": 1024, "batch_size": 8, "dropout": 0.1},
        **{"gradient_accumulation_steps": 2, "max_iters": MAX_ITERS, "lr_decay_iters": MAX_ITERS, "warmup_iters": 2},
        **{"eval_interval": 10_000, "eval_iters": 1, "log_interval": 1, "snapshot_interval": 1},
    }
    return resolve(check(TrainConfig(**{**values, **changes, **(_TINY if setting.is_tiny else {})})))


def train_here(
    setting: Setting, report: Report, out_dir: str, changes: dict[str, Any], kill_at: int = -1, warn_only: bool = False
) -> None:
    """Train in this process; SIGKILL the last rank before iteration kill_at, counted from the start of this attempt.

    warn_only: as a program does that only warns of kernels whose sums are made in changing order.
    """
    if warn_only:
        torch.use_deterministic_algorithms = partial(_only_warning, torch.use_deterministic_algorithms)
    config = settings(setting, Path(out_dir), changes)
    world = plain_world(config)
    asked = iter(range(sys.maxsize))

    def stop_request() -> int:
        if next(asked) == kill_at and world.rank == world.size - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return 0

    began_s = time.monotonic()

    def take(record: Record) -> None:
        if isinstance(record, Begin):
            report.figure("at", record.iter)
        if isinstance(record, Step) and not steps:
            steps.append(round(time.monotonic() - began_s, 2))
            report.figure("first_step_s", steps[0])

    steps: list[float] = []
    report.figure("is_compiled", agree_to_compile(config, world).compile)
    train(config, world, Callbacks(take, stop_request=in_steps(stop_request)))
    if setting.is_on_gpu:
        report.figure("peak_gb", torch.cuda.max_memory_allocated() / 1e9)


def _only_warning(set_mode: Callable[..., None], mode: bool, **_: Any) -> None:
    set_mode(mode, warn_only=True)


def checksums(out_dir: Path) -> dict[str, str]:
    """Return a checksum of every tensor of a run's last checkpoint, whichever of its files it lies in.

    Raises:
        RuntimeError: there is none.
    """
    store = CheckpointStore(RunFolder(str(out_dir)))
    if not (last := next(store.newest_first(), None)):
        raise RuntimeError(f"{out_dir} has no checkpoint")
    state = store.read(last)
    tensors = {**state.model, **state.optimizer}
    return {name: xxhash.xxh3_128(tensor.numpy().tobytes()).hexdigest() for name, tensor in tensors.items()}


def resume_eager(setting: Setting, report: Report) -> None:
    """Kill and resume, as the program is and, for comparison, with kernels of which PyTorch only warns."""
    is_equal, _ = _kill_and_resume(setting, report, "", {})
    report.claim("a run that was killed ends with the bits of an undisturbed one", is_equal)
    if setting.is_on_gpu:
        report.figure("same_bits_if_pytorch_only_warned", _kill_and_resume(setting, report, "warned_", {}, True)[0])


def resume_compiled(setting: Setting, report: Report) -> None:
    """Kill and resume a compiled run, whose three processes have compiled alone."""
    is_equal, parts = _kill_and_resume(setting, report, "", {"compile": True, "n_layer": 2})
    report.claim("all of its processes were compiled", all(part.figures.get("is_compiled") for part in parts))
    report.claim("a compiled run that was killed ends with the bits of an undisturbed one", is_equal)
    cache = cache_in(setting.folder / "cache-resumed")
    more = {"compile": True, "n_layer": 2, "max_iters": MAX_ITERS + 1}
    out_dir = str(setting.folder / "killed" / "out")
    warm = setting.start(TRAIN, "warm", cache, out_dir=out_dir, changes=more).finish(LONG_S)
    report.figure("first_step_s_with_a_full_cache", warm.figures.get("first_step_s"))


def resume_adapters(setting: Setting, report: Report) -> None:
    """Kill and resume a run that trains adapters beside a base model in bfloat16, made by a run before."""
    base = setting.folder / "base" / "out"
    settings(setting, base, {})
    _need(setting.call(TRAIN, "base", LONG_S, out_dir=str(base), changes={"max_iters": 1}))
    lora = {"lora_rank": 8, "lora_targets": "all-linear", "lora_dropout": 0.1, "lora_base_dtype": "bfloat16"}
    is_equal, _ = _kill_and_resume(setting, report, "", {"init_from": str(base), **lora})
    report.claim("a run of adapters that was killed ends with the bits of an undisturbed one", is_equal)
    kept = {name for name in checksums(setting.folder / "killed" / "out") if name != "step"}
    report.claim("its checkpoint holds adapters alone", all(map(is_adapter, kept)), f"{len(kept)} tensors")


def _kill_and_resume(
    setting: Setting, report: Report, side: str, changes: dict[str, Any], warn_only: bool = False
) -> tuple[bool, list[Found]]:
    """Return whether both runs end alike, and what has become of the three processes."""

    def start(name: str, root: str, kill_at: int = -1) -> Child:
        cache = cache_in(setting.folder / f"{side}cache-{name}")  # nothing learnt is handed on
        out_dir = str(setting.folder / f"{side}{root}" / "out")
        more = {"out_dir": out_dir, "changes": changes, "kill_at": kill_at, "warn_only": warn_only}
        return setting.start(TRAIN, f"{side}{name}", cache, **more)

    whole = start("whole", "undisturbed")
    killed = start("killed", "killed", KILL_AT).finish(LONG_S)
    resumed = start("resumed", "killed").finish(LONG_S)
    parts = [whole.finish(LONG_S), killed, resumed]
    _need(parts[0], resumed)
    at = resumed.figures["at"]
    for name, part in zip(("whole", "killed", "resumed"), parts, strict=True):
        report.figure(f"{side}{name}", part.figures | {"seconds": part.seconds})
    if not side:
        is_so = killed.exit_code == -signal.SIGKILL and 0 < at <= KILL_AT
        saw = f"killed before iteration {KILL_AT}, goes on at {at}"
        report.claim("a run that was killed goes on from node memory", is_so, saw)
    sums = [checksums(setting.folder / f"{side}{root}" / "out") for root in ("undisturbed", "killed")]
    return sums[0] == sums[1], parts


def _need(*parts: Found) -> None:
    for part in parts:
        if part.failed:
            raise RuntimeError(f"an attempt has failed: {part.failed}\n{part.tail}")


def two_ranks(setting: Setting, report: Report) -> None:
    """Two ranks share the GPU over gloo: one is killed, the other rescues the state, both go on; the same bits.

    One process that computes all lanes by itself ends with them, too.
    """
    whole = _both(setting, "undisturbed", "whole")
    _need(*whole)
    survivor, lost = _both(setting, "killed", "killed", KILL_AT)
    again = _both(setting, "killed", "resumed")
    _need(*again)
    at = again[0].figures["at"]
    report.claim("the second rank was killed", lost.exit_code == -signal.SIGKILL, str(lost.exit_code))
    report.claim("both go on at the iteration that the first had rescued", at == KILL_AT, f"{at} of {KILL_AT}")
    sums = [checksums(setting.folder / root / "out") for root in ("undisturbed", "killed")]
    report.claim("two ranks end with the bits of an undisturbed run", sums[0] == sums[1])
    alone = setting.folder / "alone" / "out"
    settings(setting, alone, IN_LANES)
    _need(setting.call(TRAIN, "alone", LONG_S, out_dir=str(alone), changes=IN_LANES))
    report.claim(f"one process ends with the bits of two ranks, in {LANES} lanes", checksums(alone) == sums[0])
    report.figure("survivor_s", survivor.seconds)
    report.figure("peak_gb", whole[0].figures.get("peak_gb"))


def _both(setting: Setting, root: str, name: str, kill_at: int = -1) -> list[Found]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    out_dir = setting.folder / root / "out"
    settings(setting, out_dir, IN_LANES)  # its dataset: both would write it
    more = {"out_dir": str(out_dir), "changes": IN_LANES, "kill_at": kill_at}
    loopback = {"GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo")}
    children = [
        setting.start(
            TRAIN, f"{name}-{rank}", {**world, **loopback, "RANK": str(rank), "LOCAL_RANK": str(rank)}, **more
        )
        for rank in (0, 1)
    ]
    return [child.finish(LONG_S) for child in children]


def contexts(setting: Setting, report: Report) -> None:
    """A rank on the second GPU takes nothing of the first: no thread of it has a context there."""
    if torch.cuda.device_count() < 2:
        report.skip("needs two GPUs")
        return
    torch.ones(1, device="cuda:0")  # this process's own context
    before_bytes = least_bytes = torch.cuda.mem_get_info(0)[0]
    with tempfile.TemporaryDirectory(dir=setting.folder) as folder:
        changes = {"device": "cuda:1"}
        child = setting.start(TRAIN, "second", out_dir=str(Path(folder) / "out"), changes=changes)
        while not child.is_over:
            least_bytes = min(least_bytes, torch.cuda.mem_get_info(0)[0])
            time.sleep(0.05)
        _need(child.end())
    taken_bytes = before_bytes - least_bytes
    text = "a process on the second GPU takes no memory of the first"
    report.claim(text, taken_bytes < _CONTEXT_BYTES, f"{taken_bytes / 1e6:.0f} MB")
