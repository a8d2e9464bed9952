"""What can be known about a run before a cluster is started: data, starting point, storage. Knows no Ray.

A refused run leaves everything as it was: nothing in out_dir is created or changed.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, replace
from pathlib import Path

from orchestrator.checkpoint.restore.init_from import StartingPoint, Vocabulary, check_start
from orchestrator.checkpoint.store import CheckpointStore
from orchestrator.config import TrainConfig, check
from orchestrator.data.dataset import Dataset, open_dataset
from orchestrator.errors import ConfigError, DataError
from orchestrator.storage.options import storage_options_of
from orchestrator.storage.run_folder import RunFolder
from orchestrator.storage.writable import check_writable
from orchestrator.training.attempt import batch_order
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


def plan(config: TrainConfig) -> Plan:
    """Check settings, data, starting point and storage as far as this machine can see them.

    Raises:
        UserError: a setting, the data, what out_dir or init_from holds, or storage that cannot be read and written.
        FinishedRunError: out_dir holds a run that has nothing left to do.
    """
    config = check(config)
    _check_extras(config)
    folder = RunFolder(config.out_dir, storage_options_of(config))
    if folder.is_local:
        remedy = "a path that all nodes share, or a URL (s3://b/run)"
        _refuse_job_files(f"out_dir={config.out_dir}", folder.root, remedy)
        config = replace(config, out_dir=folder.root)
    if "/" not in folder.root:
        raise ConfigError(
            f"out_dir={config.out_dir} is a whole bucket: give a folder in it, {config.out_dir.rstrip('/')}/run"
        )
    data, no_data = _open_data(config)
    if no_data:
        _refuse_job_files(
            f"data_dir={config.data_dir}", config.data_dir, "the path at which every node has the dataset"
        )
    start = check_start(config, CheckpointStore(folder), _vocabulary(data))
    if data:
        data.check_fits(start.model_args["vocab_size"])
    if not config.eval_only:  # which writes nothing that a run needs
        check_writable(folder)
    tell_doubts(config)
    return Plan(config, folder, start, no_data)


def _check_extras(config: TrainConfig) -> None:
    """Check that the packages of the extras that are asked for are here; the workers' environment is the same one.

    Raises:
        ConfigError: one is not.
    """
    for key, package in (("wandb_log", "wandb"), ("tensorboard_log", "tensorboard")):
        if getattr(config, key) and not importlib.util.find_spec(package):
            raise ConfigError(f"{key}=True needs a package: pip install 'nanogpt-orchestrator[{package}]'")


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


def _open_data(config: TrainConfig) -> tuple[Dataset | None, DataError | None]:
    try:
        return open_dataset(config.data_dir, config.dataset, batch_order(config)), None
    except DataError as error:
        return None, error


def _vocabulary(data: Dataset | None) -> Vocabulary | None:
    """Return what is known of the dataset's tokens, None where the dataset is elsewhere."""
    if not data:
        return None
    return Vocabulary(data.vocab_size, data.tokenizer.to_json() if data.tokenizer else None)
