"""Trainer: Ray's TorchTrainer, less those parts of it that start a process each and do nothing for a run.

    for datasets of Ray's          a run has none
    that asks for machines         left out where no autoscaler is there to hear it, and where the number of workers is
                                   fixed: then the group's request for its places says the same
    that frees a dead group's      where the driver leaves the cluster when Ray's controller is lost, which frees them
    places

Each of them takes a second or two of a core, just when the workers start. What is overridden here is not public: a test
pins it, and where Ray has changed it, those parts run.
"""

from __future__ import annotations

from typing import Any

from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

from orchestrator import autoscaler
from orchestrator.recovery.elastic import FixedPolicy, LivePolicy


class Trainer(TorchTrainer):  # type: ignore[misc]
    """A TorchTrainer whose number of workers, where that is a range, follows the nodes that live.

    board: where it is told that there are too few machines, or more than before.
    leaves_cluster: the driver does, when Ray's controller is lost.
    """

    def __init__(self, *args: Any, board: Any, leaves_cluster: bool, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._board = board
        self._left_out = (DatasetsCallback, *((PlacementGroupCleanerCallback,) if leaves_cluster else ()))

    def _initialize_and_run_controller(self, **kwargs: Any) -> Any:
        if self.scaling_config.elasticity_enabled:
            policy = LivePolicy(self.scaling_config, self._board, asks_for_machines=bool(autoscaler.version()))
        else:
            policy = FixedPolicy(self.scaling_config)
        callbacks = [each for each in kwargs["callbacks"] if not isinstance(each, self._left_out)]
        return super()._initialize_and_run_controller(
            **{**kwargs, "scaling_policy": policy, "callbacks": callbacks},
        )
