"""TrainConfig -> TorchTrainer -> Outcome: the driver. Knows Ray, and no torch maths.

What can be wrong is looked for here first, before anything is started or overwritten. Then Ray's `fit` runs in a thread
and this process shows what the workers post, and passes Ctrl-C and SIGTERM on to them: they save and leave.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

# Ray reads these when it is imported or started; what the user has set stays.
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.25")  # a lost worker is noticed within this
os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")  # relative paths keep their meaning in workers
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
# Without a dashboard, as in a cluster that is started here, two of Ray's actors complain about it every second.
os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "State API may be temporarily unavailable|'PreemptionWatcher'")

import ray
from fsspec.implementations.local import LocalFileSystem as LocalStorage
from ray.train import CheckpointConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchConfig, TorchTrainer

from orchestrator.board import open_board, take_from
from orchestrator.checkpoint.start import Start, check_start
from orchestrator.checkpoint.store import CheckpointStore
from orchestrator.config import TrainConfig, check
from orchestrator.data.dataset import open_dataset
from orchestrator.errors import ConfigError, DataError, UserError
from orchestrator.loop import Outcome, sampling_of
from orchestrator.telemetry.display import Display
from orchestrator.worker import run_worker

logger = logging.getLogger(__name__)

REGISTRY_FILE = "checkpoint_manager_snapshot.json"  # Ray's list of checkpoints; ours is what lies in storage whole
_LOCAL_OBJECT_STORE_BYTES = 100 * 2**20  # nothing of ours passes through Ray's object store


class RunFailedError(Exception):
    """The run gave up: every restart that it was allowed is used, or Ray itself failed."""


class InterruptedRunError(Exception):
    """The run was asked to stop; the message says what was saved and how to go on."""


def launch(config: TrainConfig, worker: Callable[[dict[str, Any]], dict[str, Any]] = run_worker) -> Outcome:
    """Train on the cluster that this process is in, or on one started for it here; worker is what each rank runs.

    Raises:
        UserError: before anything is started, or as soon as a worker finds what only it can see.
        InterruptedRunError: after Ctrl-C or SIGTERM.
        RunFailedError: the run failed more often than max_failures allows.
    """
    config = check(config)
    store = CheckpointStore(config.out_dir)
    if isinstance(store.fs, LocalStorage):
        config = replace(config, out_dir=store.root)
    with _signals() as stop, _cluster() as is_local:
        start = _check_data_and_start(config, store, is_local)
        gpus_per_worker = _check_capacity(config)
        run_id = _prepare_out_dir(config, store)
        logger.info("%s", start.summary)
        job = {"config": asdict(config), "run_id": run_id, "cwd": str(Path.cwd()), "board": open_board()}
        trainer = _trainer(config, store, gpus_per_worker, worker, job)
        return _outcome(_fit(trainer, job["board"], config, stop), config)


@contextmanager
def _signals() -> Iterator[threading.Event]:
    """Lend an event that the first Ctrl-C or SIGTERM sets; a second Ctrl-C interrupts at once."""
    stop = threading.Event()

    def on_signal(number: int, _frame: Any) -> None:
        if stop.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.set()

    if threading.current_thread() is not threading.main_thread():  # only there can signals be caught
        yield stop
        return
    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _cluster() -> Iterator[bool]:
    """Join the cluster that this process is in, or start one here and end it afterwards; lend whether it is our own."""
    if ray.is_initialized():
        yield False
        return
    caught = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    is_local = _join_or_start()
    for number, handler in caught.items():  # Ray puts a SIGTERM handler of its own
        signal.signal(number, handler)
    try:
        yield is_local
    finally:
        ray.shutdown()


def _join_or_start() -> bool:
    """Join the cluster at RAY_ADDRESS or the one that runs on this machine, else start one; return whether it did."""
    address = os.environ.get("RAY_ADDRESS", "auto")
    try:
        if address == "local":  # Ray's word for: a new one in any case
            raise ConnectionError
        ray.init(address=address, logging_level=logging.WARNING)
    except ConnectionError:
        if address not in ("auto", "local"):
            raise ConfigError(f"RAY_ADDRESS={address}: no Ray cluster answers there") from None
        ray.init(
            address="local",
            num_cpus=os.cpu_count(),
            include_dashboard=False,
            object_store_memory=_LOCAL_OBJECT_STORE_BYTES,
            logging_level=logging.WARNING,
        )
        return True
    return False


def _check_data_and_start(config: TrainConfig, store: CheckpointStore, is_local: bool) -> Start:
    """Check data and starting point where this machine can see them; a cluster's nodes may have data that it has not.

    Raises:
        UserError: something is missing, damaged or does not fit.
    """
    vocab_size, data = None, None
    try:
        data = open_dataset(config.data_dir, config.dataset, sampling_of(config))
        vocab_size = data.vocab_size
    except DataError:
        if is_local:
            raise
        logger.warning("dataset %s is not on this machine: the workers will check theirs", config.dataset)
        saved = next(store.newest_first(), None)
        vocab_size = saved.state["model_args"]["vocab_size"] if saved else None
    start = check_start(config, store, vocab_size)
    if data:
        data.check_fits(start.model_args["vocab_size"])
    return start


def _check_capacity(config: TrainConfig) -> float:
    """Return the GPUs of each worker, if the cluster has room for all workers.

    Raises:
        ConfigError: it has not; says what is there and what was asked.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    has_gpus = any(node.get("GPU") for node in nodes) and config.device != "cpu"
    gpus = config.gpus_per_worker if config.gpus_per_worker is not None else float(has_gpus)
    wanted = {"CPU": config.cpus_per_worker, "GPU": gpus}
    room = sum(min(int(node.get(kind, 0) / each) for kind, each in wanted.items() if each) for node in nodes)
    if room < config.num_workers:
        there = {kind: sum(node.get(kind, 0) for node in nodes) for kind in wanted}
        raise ConfigError(
            f"num_workers={config.num_workers} with {config.cpus_per_worker:g} CPU and {gpus:g} GPU each is more than "
            f"the cluster can give: it has {there['CPU']:g} CPU and {there['GPU']:g} GPU on {len(nodes)} node(s), "
            f"room for {room}. Lower --num_workers, --cpus_per_worker or --gpus_per_worker, or add nodes"
        )
    return gpus


def _prepare_out_dir(config: TrainConfig, store: CheckpointStore) -> str:
    """Write run.json, which shows that storage can be written, and return the id by which workers will know it.

    Raises:
        ConfigError: it cannot.
    """
    run_id = uuid.uuid4().hex
    try:
        store.write_json("run.json", {"run_id": run_id, "config": asdict(config), "ray": ray.__version__})
        if store.fs.exists(store.path(REGISTRY_FILE)):  # it may name what is gone, and Ray would not start then
            store.fs.rm_file(store.path(REGISTRY_FILE))
    except UserError as error:
        raise ConfigError(f"out_dir={config.out_dir} cannot be written: {error}") from None
    except OSError as error:
        raise ConfigError(f"out_dir={config.out_dir} cannot be written: {type(error).__name__}: {error}") from None
    return run_id


class _LostAttempts(UserCallback):  # type: ignore[misc]
    """Runs in Ray's controller: posts a line whenever workers were lost. It must never raise."""

    def __init__(self, board: Any, max_failures: int) -> None:
        self._board, self._max_failures, self._count = board, max_failures, 0

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:  # noqa: ARG002
        self._count += 1
        limit = "no limit" if self._max_failures < 0 else f"{self._max_failures} allowed"
        lost = "; ".join(f"rank {rank}: {_first_line(error)}" for rank, error in sorted(worker_exceptions.items()))
        text = f"attempt lost ({self._count}, {limit}): {lost}"
        self._board.post.remote([{"kind": "note", "level": "WARNING", "text": text}])


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[-1]


def _trainer(
    config: TrainConfig, store: CheckpointStore, gpus: float, worker: Callable[..., Any], job: dict[str, Any]
) -> TorchTrainer:
    from pyarrow.fs import FSSpecHandler, LocalFileSystem, PyFileSystem

    parent, _, name = store.root.rstrip("/").rpartition("/")
    return TorchTrainer(
        worker,
        train_loop_config=job,
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if gpus and config.backend == "nccl" else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=config.num_workers,
            use_gpu=gpus > 0,
            resources_per_worker={"CPU": config.cpus_per_worker} | ({"GPU": gpus} if gpus else {}),
        ),
        run_config=RunConfig(
            name=name,
            storage_path=parent or "/",
            storage_filesystem=LocalFileSystem()
            if isinstance(store.fs, LocalStorage)
            else PyFileSystem(FSSpecHandler(store.fs)),
            failure_config=FailureConfig(max_failures=config.max_failures),
            checkpoint_config=CheckpointConfig(),  # what is kept is decided where it is written (CheckpointStore.prune)
            logging_config=LoggingConfig(log_level="WARNING"),
            callbacks=[_LostAttempts(job["board"], config.max_failures)],
        ),
    )


def _fit(trainer: TorchTrainer, board: Any, config: TrainConfig, stop: threading.Event) -> dict[str, Any]:
    """Run Ray's fit in a thread and show what the workers post; return what rank 0 returned.

    Raises:
        RunFailedError: fit failed.
    """
    ended: dict[str, Any] = {}

    def fit() -> None:
        try:
            ended["value"] = trainer.fit().return_value
        except Exception as error:  # all of Ray's failures are one to us: this is the driver's top
            ended["error"] = error

    thread = threading.Thread(target=fit, name="fit", daemon=True)
    thread.start()
    told = False
    with Display(config.max_iters) as display:
        while thread.is_alive():
            thread.join(timeout=0.2)
            if stop.is_set() and not told:
                told = True
                display.show(_note("stopping: the iteration is finished and saved (Ctrl-C again: stop at once)"))
            for record in take_from(board, stop.is_set()):
                display.show(record)
        for record in take_from(board, stop.is_set()):
            display.show(record)
    if "error" in ended:
        raise RunFailedError(f"the run failed: {ended['error']}") from ended["error"]
    return dict(ended["value"])


def _note(text: str) -> dict[str, Any]:
    return {"kind": "note", "text": text}


def _outcome(value: dict[str, Any], config: TrainConfig) -> Outcome:
    if "error" in value:
        raise UserError(value["error"])
    outcome = Outcome(**value)
    if outcome.stopped:
        raise InterruptedRunError(
            f"stopped at iteration {outcome.iter_num} of {config.max_iters}, saved in {config.out_dir}; "
            "the same command goes on from there"
        )
    return outcome
