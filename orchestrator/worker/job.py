"""Job: what the driver hands to every worker of a run. Knows neither Ray nor torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from orchestrator.config import TrainConfig
from orchestrator.storage.options import Secret


@dataclass(frozen=True)
class Job:
    """One for all attempts of a driver. Ray keeps it and may show it: storage options, which hold secrets, are hidden.

    config: without storage_options.
    run_id: the run's, the same for all its drivers. start_id: this driver's (`prepare_out_dir`).
    cwd: the folder in which the user gave the command. mailbox: the handle of the run's mailbox.
    """

    config: TrainConfig
    storage_options: Secret
    run_id: str | None
    start_id: str | None
    cwd: str
    mailbox: Any

    @classmethod
    def of(cls, config: TrainConfig, **rest: Any) -> Job:
        """Make a job of a config as the user gave it; rest: the other fields."""
        return cls(replace(config, storage_options=""), Secret(config.storage_options), **rest)

    @property
    def full_config(self) -> TrainConfig:
        """The config with its storage options."""
        return replace(self.config, storage_options=self.storage_options.text)
