"""A sink for MLflow, an optional extra. Knows neither the loop nor its settings."""

from __future__ import annotations

import logging
import os
import re
import sys
import time
from collections import deque
from functools import partial
from importlib.util import find_spec
from typing import Any

from orchestrator.errors import ConfigError
from orchestrator.host.background import BackgroundQueue
from orchestrator.storage.run_folder import RunFolder
from orchestrator.telemetry.charts import missing_package, scalars
from orchestrator.telemetry.records import LoopRecord, Stamped

_SEND_S = 5.0
_CLOSE_S, _CLOSE_FAILED_S = 30.0, 2.0  # an attempt that has failed is reported behind this
_BATCH = 1000  # values that MLflow's stores take at once
_KEPT_VALUES = 100_000  # while the store does not answer

_Value = tuple[str, float, int, int]  # name, value, milliseconds since 1970, iteration


def store_of(folder: RunFolder) -> str:
    """Return the URI of MLflow's store: MLFLOW_TRACKING_URI, or without it a database in the run's folder.

    Raises:
        ConfigError: that folder is none on a disk or a URI cannot name it, or the URI holds a password.
    """
    if uri := os.environ.get("MLFLOW_TRACKING_URI"):
        if re.search(r"://[^/]*:[^/]*@", uri):  # Ray shows the variables that it passes on
            raise ConfigError(
                "MLFLOW_TRACKING_URI holds a password: leave it out of the URL, and set MLFLOW_TRACKING_USERNAME and "
                "MLFLOW_TRACKING_PASSWORD on the nodes"
            )
        return uri
    if not folder.is_local:
        raise ConfigError(
            f"mlflow_log=True needs a store, and out_dir={folder.out_dir} can hold none: set MLFLOW_TRACKING_URI to "
            "the address of your MLflow server"
        )
    if "?" in folder.root:  # SQLAlchemy would take the rest for options, and write a database beside the folder
        raise ConfigError(
            f"mlflow_log=True keeps its database in out_dir={folder.out_dir}, and its URI can hold no `?`: give "
            "another out_dir, or set MLFLOW_TRACKING_URI"
        )
    return f"sqlite:///{folder.root}/mlflow.db"


class MlflowSink:
    """A run of MLflow's, which a run's later attempts continue. A thread speaks to its store, training waits for none.

    Raises:
        ConfigError: MLflow is not installed, or there is no store.
    """

    def __init__(self, folder: RunFolder, experiment: str, config: dict[str, Any]) -> None:
        spec = find_spec("mlflow")  # to import it takes seconds
        if not (spec and spec.origin):  # a folder ./mlflow has none
            raise ConfigError(missing_package("mlflow", "mlflow_log"))
        self._folder, self._uri, self._experiment = folder, store_of(folder), experiment
        self._client: Any = None
        self._run_id = ""
        self._waiting = deque[_Value](maxlen=_KEPT_VALUES)
        self._sent_at_s = time.monotonic()
        self._thread = BackgroundQueue("mlflow")
        self._last = self._begun = self._thread.submit(partial(self._begin, config))

    def write(self, stamped: Stamped) -> None:
        record = stamped.record
        if isinstance(record, LoopRecord):
            time_ms = int(stamped.time_s * 1000)
            self._waiting.extend((name, value, time_ms, record.iter) for name, value in scalars(record).items())
        if self._last.done():
            self._last.result()  # raises what has failed
            if time.monotonic() >= self._sent_at_s + _SEND_S:
                self.flush()

    def flush(self) -> None:
        self._sent_at_s = time.monotonic()
        self._last = self._thread.submit(partial(self._send, list(self._waiting)))
        self._waiting.clear()

    def close(self) -> None:
        self.flush()
        status, patience_s = ("FAILED", _CLOSE_FAILED_S) if sys.exception() else ("FINISHED", _CLOSE_S)
        self._begun.result(timeout=patience_s)
        last = self._thread.submit(lambda: self._client.set_terminated(self._run_id, status))
        self._thread.close()
        last.result(timeout=patience_s)

    def _begin(self, config: dict[str, Any]) -> None:
        """Go on with the run whose id lies in the run's folder, if the store has it; otherwise begin one."""
        from mlflow import MlflowClient
        from mlflow.entities import Param

        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.WARNING)
        self._client = MlflowClient(tracking_uri=self._uri)
        known = self._folder.read("mlflow_run_id")
        run = self._known_run(known.decode().strip()) if known else None
        if run:
            self._client.update_run(run.info.run_id, status="RUNNING")
        else:
            name = self._folder.root.rstrip("/").rpartition("/")[2]
            run = self._client.create_run(self._experiment_id(), run_name=name)
            self._folder.write("mlflow_run_id", run.info.run_id.encode())
        self._run_id = run.info.run_id
        new = [Param(key, str(value)) for key, value in config.items() if key not in run.data.params]  # they are final
        self._client.log_batch(self._run_id, params=new)

    def _known_run(self, run_id: str) -> Any:
        from mlflow.exceptions import MlflowException

        try:
            run = self._client.get_run(run_id)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":  # another store than before
                return None
            raise
        return run if run.info.lifecycle_stage == "active" else None

    def _experiment_id(self) -> str:
        if known := self._client.get_experiment_by_name(self._experiment):
            return str(known.experiment_id)
        place = None if "MLFLOW_TRACKING_URI" in os.environ else f"{self._folder.root}/mlflow-artifacts"
        return str(self._client.create_experiment(self._experiment, artifact_location=place))

    def _send(self, waiting: list[_Value]) -> None:
        from mlflow.entities import Metric

        self._begun.result()
        for begin in range(0, len(waiting), _BATCH):
            batch = [Metric(*each) for each in waiting[begin : begin + _BATCH]]
            self._client.log_batch(self._run_id, metrics=batch)
