"""Checks before a cluster is started: settings, packages, data, starting point, storage. Knows no Ray.

A refused run leaves everything as it was: nothing in out_dir is created or changed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from orchestrator.checkpoint.restore.init_from import StartingPoint, Vocabulary, check_start
from orchestrator.checkpoint.store import CheckpointStore
from orchestrator.config import TrainConfig, check
from orchestrator.data.token_files import TokenFiles, open_token_files
from orchestrator.errors import ConfigError, DataError, UserError
from orchestrator.storage.run_folder import RunFolder, open_run_folder
from orchestrator.storage.writable import check_writable
from orchestrator.telemetry.mlflow_sink import store_of
from orchestrator.training.lr_schedule import tell_doubts

_JOB_FILES = "working_dir_files"  # where Ray unpacks the --working-dir of a job


@dataclass(frozen=True)
class Plan:
    """A run that may be started.

    config: checked, with an absolute out_dir where that is a path.
    no_data: why this machine has no dataset. The nodes of a cluster may have one, so who knows the cluster decides.
    """

    config: TrainConfig
    folder: RunFolder
    start: StartingPoint
    no_data: DataError | None


@dataclass(frozen=True)
class Check:
    """One thing that was looked at; problem: the user's mistake, None if all is well."""

    name: str
    problem: UserError | None


def plan(config: TrainConfig) -> Plan:
    """Check a run as far as this machine can see it.

    Raises:
        UserError: the first check's that finds a problem.
        FinishedRunError: out_dir holds a run that has nothing left to do.
    """
    preflight = Preflight(config)
    for each in preflight.checks():
        if each.problem:
            raise each.problem
    tell_doubts(preflight.config)
    assert preflight.folder
    assert preflight.start
    return Plan(preflight.config, preflight.folder, preflight.start, preflight.no_data)


class Preflight:
    """The checks of one run, and what they have found so far. A check that needs what is missing is left out."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.folder: RunFolder | None = None
        self.data: TokenFiles | None = None
        self.no_data: DataError | None = None
        self.start: StartingPoint | None = None

    def checks(self) -> Iterator[Check]:
        """Make the checks, each when it is asked for.

        Raises:
            FinishedRunError: out_dir holds a run that has nothing left to do.
        """
        for name, check_it in self._all():
            try:
                check_it()
            except UserError as problem:
                yield Check(name, problem)
            else:
                yield Check(name, None)

    def _all(self) -> Iterator[tuple[str, Callable[[], None]]]:
        yield "settings", self._check_settings
        yield "packages", self._check_packages
        yield "out_dir", self._open_out_dir
        yield "dataset", self._open_data
        if self.folder:
            yield "starting point", self._check_start
        if self.data and self.start:
            yield "vocabulary", self._check_vocabulary
        if self.folder and not self.config.eval_only:  # an evaluation writes nothing that a run needs
            yield "storage", self._check_writable

    def _check_settings(self) -> None:
        self.config = check(self.config)

    def _check_packages(self) -> None:
        """Check that the packages of the extras are here; the workers' environment is the same one."""
        for key, package in (("wandb_log", "wandb"), ("tensorboard_log", "tensorboard"), ("mlflow_log", "mlflow")):
            if getattr(self.config, key) and not importlib.util.find_spec(package):
                raise ConfigError(f"{key}=True needs a package: pip install 'nanogpt-orchestrator[{package}]'")

    def _open_out_dir(self) -> None:
        config = self.config
        folder = open_run_folder(config)
        if config.mlflow_log:
            store_of(folder)
        if folder.is_local:
            remedy = "a path that all nodes share, or a URL (s3://b/run)"
            _refuse_job_files(f"out_dir={config.out_dir}", folder.root, remedy)
            self.config = replace(config, out_dir=folder.root)
        if "/" not in folder.root:
            raise ConfigError(
                f"out_dir={config.out_dir} is a whole bucket: give a folder in it, {config.out_dir.rstrip('/')}/run"
            )
        self.folder = folder

    def _open_data(self) -> None:
        """Open the dataset, if this machine has it."""
        config = self.config
        try:
            self.data = open_token_files(config.data_dir, config.dataset)
        except DataError as error:
            self.no_data = error
            remedy = "the path at which every node has the dataset"
            _refuse_job_files(f"data_dir={config.data_dir}", config.data_dir, remedy)

    def _check_start(self) -> None:
        assert self.folder
        self.start = check_start(self.config, CheckpointStore(self.folder), _vocabulary_of(self.data))

    def _check_vocabulary(self) -> None:
        assert self.data
        assert self.start
        self.data.check_fits(self.config.block_size, self.start.model_args["vocab_size"])

    def _check_writable(self) -> None:
        assert self.folder
        check_writable(self.folder)


def _refuse_job_files(setting: str, path: str, remedy: str) -> None:
    """Check that a folder is not in the copy of the code that Ray makes for a job: it holds no data, and is deleted.

    Raises:
        ConfigError: it is.
    """
    if _JOB_FILES in Path(path).absolute().parts:
        raise ConfigError(
            f"{setting} is a folder in this job's copy of the code, which has no data in it and is deleted "
            f"after the job: give {remedy}"
        )


def _vocabulary_of(data: TokenFiles | None) -> Vocabulary | None:
    """Return the dataset's vocabulary, None if the dataset is elsewhere."""
    if not data:
        return None
    return Vocabulary(data.vocab_size, data.tokenizer.to_json() if data.tokenizer else None)
