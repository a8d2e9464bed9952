"""Trainer: Ray's TorchTrainer, less those parts of it that start a process each and do nothing for a run.

    what is for datasets of Ray's    a run has none
    what asks for machines           where no autoscaler is there to hear it; and where the number of workers is fixed:
                                     then the group's own request for places says as much
    what frees the places of a dead  where the driver leaves the cluster when that is lost, which frees them too
    controller's group

Each of them takes a second or two of a core, just when the workers start. And two parts run otherwise:

    a group's end     no worker leaves its process group in order. With NCCL, leaving waits for the collectives under
                      way, and one whose peer is gone never ends: Ray would wait 35 s, and kill the workers after all
    the monitor      comes before Ray's own callbacks: when a group ends that is well, it has the state rescued first

What is overridden here is not public: a test pins it, and where Ray has changed it, Ray's parts run.
"""

from __future__ import annotations

from typing import Any

from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.torch.config import _TorchBackend
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

from orchestrator.cluster import autoscaler
from orchestrator.controller.attempts import AttemptMonitor
from orchestrator.controller.scaling import FixedPolicy, LiveNodesPolicy, UnscaledLiveNodesPolicy


class _EndingAtOnce(_TorchBackend):  # type: ignore[misc]
    def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
        """Leave everything to the end of the processes, which Ray kills next."""


class TorchGroup(TorchConfig):  # type: ignore[misc]
    """How Ray makes a process group, which ends with its processes."""

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        return _EndingAtOnce


class Trainer(TorchTrainer):  # type: ignore[misc]
    """A TorchTrainer whose number of workers, where that is a range, follows the nodes that live.

    mailbox: where it is told that there are too few machines, or more than before.
    leaves_cluster: the driver does, when Ray's controller is lost.
    """

    def __init__(self, *args: Any, mailbox: Any, leaves_cluster: bool, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._mailbox = mailbox
        self._left_out = (DatasetsCallback, *((PlacementGroupCleanerCallback,) if leaves_cluster else ()))

    def _initialize_and_run_controller(self, **kwargs: Any) -> Any:
        if not self.scaling_config.elasticity_enabled:
            policy = FixedPolicy(self.scaling_config)
        else:
            policy = (LiveNodesPolicy if autoscaler.version() else UnscaledLiveNodesPolicy)(
                self.scaling_config, self._mailbox
            )
        callbacks = [each for each in kwargs["callbacks"] if not isinstance(each, self._left_out)]
        callbacks.sort(key=lambda each: not isinstance(each, AttemptMonitor))
        return super()._initialize_and_run_controller(**{**kwargs, "scaling_policy": policy, "callbacks": callbacks})
