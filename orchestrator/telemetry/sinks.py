"""Sinks: where rank 0 writes records. The run's folder, and TensorBoard, W&B and MLflow, each an optional extra.

If a sink fails we drop it with one warning: no sink ends a training run. Knows neither the loop nor its settings.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any, ParamSpec, Protocol

from orchestrator.errors import ConfigError
from orchestrator.storage.reasons import reason_of
from orchestrator.storage.run_folder import RunFolder
from orchestrator.telemetry.charts import missing_package, scalars
from orchestrator.telemetry.metrics import MetricsLog
from orchestrator.telemetry.mlflow_sink import MlflowSink
from orchestrator.telemetry.records import LoopRecord, Stamped

logger = logging.getLogger(__name__)

P = ParamSpec("P")

_WANDB_INIT_TIMEOUT_S = 30.0


class Sink(Protocol):
    """Takes the records of a run."""

    def write(self, stamped: Stamped) -> None:
        """Take a record."""

    def flush(self) -> None:
        """Pass on the records so far."""

    def close(self) -> None:
        """Pass on the rest, and end."""


class Sinks:
    """Several sinks as one; one that raises is warned about and left out from then on."""

    def __init__(self, sinks: list[Sink]) -> None:
        self._sinks = list(sinks)

    def write(self, stamped: Stamped) -> None:
        """Pass a record to every sink."""
        self._sinks = [sink for sink in self._sinks if _succeeds(type(sink).__name__, sink.write, stamped)]

    def flush(self) -> None:
        """Flush every sink."""
        self._sinks = [sink for sink in self._sinks if _succeeds(type(sink).__name__, sink.flush)]

    def close(self) -> None:
        """Close every sink; later records go nowhere."""
        for sink in self._sinks:
            _succeeds(type(sink).__name__, sink.close)
        self._sinks = []


class TensorBoardSink:
    """Scalars in out_dir/tensorboard. What an earlier attempt computed beyond the first record's iteration is hidden.

    Raises:
        ConfigError: tensorboard is not installed.
    """

    def __init__(self, out_dir: str) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError(missing_package("tensorboard", "tensorboard_log")) from error
        self._make: Any = SummaryWriter
        self._folder = f"{out_dir.rstrip('/')}/tensorboard"
        self._writer: Any = None

    def write(self, stamped: Stamped) -> None:
        record = stamped.record
        if not isinstance(record, LoopRecord):
            return
        if self._writer is None:
            # The iteration resumed from was evaluated before its checkpoint was written, and is not evaluated again.
            self._writer = self._make(self._folder, purge_step=record.iter + 1 if record.iter else None)
        for name, value in scalars(record).items():
            self._writer.add_scalar(name, value, record.iter)

    def flush(self) -> None:
        if self._writer:
            self._writer.flush()

    def close(self) -> None:
        if self._writer:
            self._writer.close()


class WandbSink:
    """nanoGPT's charts in Weights & Biases; a run's later attempts continue its W&B run.

    Raises:
        ConfigError: wandb is not installed.
    """

    def __init__(self, folder: RunFolder, project: str, run_name: str, config: dict[str, Any]) -> None:
        try:
            from wandb import Settings, init  # by name: a folder ./wandb of old runs would pass as the module
        except ImportError as error:
            raise ConfigError(missing_package("wandb", "wandb_log")) from error
        self._run = init(
            project=project,
            name=run_name,
            id=_run_id(folder),
            resume="allow",
            config=config,
            dir=folder.root if folder.is_local else None,  # offline runs lie with the run, ready for a sync
            settings=Settings(init_timeout=_WANDB_INIT_TIMEOUT_S),
        )
        # Iterations computed again after a restart come as new W&B steps: charts go by iteration.
        self._run.define_metric("*", step_metric="iter")

    def write(self, stamped: Stamped) -> None:
        record = stamped.record
        if isinstance(record, LoopRecord) and (values := scalars(record)):
            self._run.log({"iter": record.iter, **values})

    def flush(self) -> None:
        pass  # wandb sends from a process of its own

    def close(self) -> None:
        self._run.finish()


def open_sinks(
    folder: RunFolder,
    attempt: str,
    *,
    wandb_log: bool = False,
    wandb_project: str = "owt",
    wandb_run_name: str = "gpt2",
    tensorboard_log: bool = False,
    mlflow_log: bool = False,
    mlflow_experiment: str = "owt",
    config: dict[str, Any] | None = None,
) -> Sinks:
    """Open the metrics file of a run and the sinks that its settings ask for. Call it on rank 0 only.

    Raises:
        ConfigError: a sink is asked for whose package is not installed.
    """
    makers: list[Callable[[], Sink]] = [lambda: MetricsLog(folder, attempt)]
    if tensorboard_log:
        makers.append(lambda: TensorBoardSink(folder.out_dir))
    if wandb_log:
        makers.append(lambda: WandbSink(folder, wandb_project, wandb_run_name, config or {}))
    if mlflow_log:
        makers.append(lambda: MlflowSink(folder, mlflow_experiment, config or {}))
    return sinks_of(*makers)


def sinks_of(*makers: Callable[[], Sink]) -> Sinks:
    """Make sinks; one that cannot be made is warned about and left out.

    Raises:
        ConfigError: its package is not installed.
    """
    sinks: list[Sink] = []
    for make in makers:
        _succeeds("a sink", _append, sinks, make)
    return Sinks(sinks)


def _append(sinks: list[Sink], make: Callable[[], Sink]) -> None:
    sinks.append(make())


def _succeeds(name: str, call: Callable[P, None], *args: P.args, **kwargs: P.kwargs) -> bool:
    """Return whether it succeeds; if not, say that the sink is left out.

    Raises:
        ConfigError: its package is not installed.
    """
    try:
        call(*args, **kwargs)
    except ConfigError:
        raise
    except Exception as error:  # no network, no account, a full disk, a bug of a library: training goes on
        logger.warning("%s is left out from now on (%s); training goes on", name, reason_of(error))
        return False
    return True


def _run_id(folder: RunFolder) -> str:
    """Return the W&B id that lies in the run's folder, a new one at the first start.

    It is kept, not computed from out_dir and name: a folder that was emptied and begun anew is another run.
    """
    if (known := folder.read("wandb_run_id")) is not None:
        return known.decode().strip()
    run_id = os.urandom(8).hex()
    folder.write("wandb_run_id", run_id.encode())
    return run_id
