"""Trainer: Ray's TorchTrainer for a run, less those of its parts that start a process each and do nothing for us.

    Ray's datasets              we have none
    requests for machines       left out where no autoscaler listens, and where the number of workers is fixed: then
                                the group's own request for places says as much
    PlacementGroupCleaner       frees the places of a dead controller's group. Left out where the driver leaves the
                                cluster when it loses the controller, which frees them too

Each of them takes a core for a second or two, just when the workers start. Two parts run otherwise:

    a group's end   no worker leaves its process group in order. With NCCL, leaving waits for the collectives under
                    way, and one whose peer is gone never ends: Ray would wait 35 s, and kill the workers after all
    the monitor     comes before Ray's own callbacks: when a healthy group ends, it has the state rescued first

We override methods that are not public: a test pins them, and where Ray has changed them, Ray's parts run.
"""

from __future__ import annotations

import logging
import os
from typing import Any

from ray.train import CheckpointConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.torch.config import _TorchBackend
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

from orchestrator.cluster import autoscaler
from orchestrator.config import TrainConfig
from orchestrator.controller import spares
from orchestrator.controller.attempts import AttemptMonitor
from orchestrator.controller.budgets import Budgets
from orchestrator.controller.gpu_check import GpuCheck
from orchestrator.controller.scaling import FixedPolicy, LiveNodesPolicy, UnscaledLiveNodesPolicy
from orchestrator.distributed.join import process_group_backend
from orchestrator.driver.driver import Driver
from orchestrator.driver.registry import storage_for_ray
from orchestrator.storage.options import redacted
from orchestrator.worker.job import Job

logger = logging.getLogger(__name__)

EVALUATION_FOLDER = ".evaluation"  # the folder that Ray knows when eval_only is set; nothing is put there
_SET_UP_S = 1800.0  # in which all workers of a group have met; from then on the watchdog decides


class _EndingAtOnce(_TorchBackend):  # type: ignore[misc]
    def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
        """Leave everything to the end of the processes, which Ray kills next."""


class TorchGroup(TorchConfig):  # type: ignore[misc]
    """Ray's way to make a process group; ours ends with its processes."""

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        return _EndingAtOnce


class Trainer(TorchTrainer):  # type: ignore[misc]
    """A TorchTrainer whose number of workers, where that is a range, follows the nodes that live.

    mailbox: of the run; the policy posts there that there are too few machines, or more than before.
    leaves_cluster: whether the driver leaves the cluster when Ray's controller is lost.
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


def trainer_of(driver: Driver, job: Job, each: dict[str, float], *, leaves_cluster: bool, is_new: bool) -> Trainer:
    """Make the trainer of a run.

    each: the resources of a worker.
    leaves_cluster: as of `Trainer`. is_new: as of `AttemptMonitor`.
    """
    config, folder, worker = driver.config, driver.plan.folder, driver.worker
    budgets = Budgets(config.max_failures, config.max_preemptions, config.iters_per_checkpoint)
    monitor = AttemptMonitor(job.mailbox, budgets, each if config.warm_spares else None, is_new)
    needs_gpus = "GPU" in each and config.device != "cpu"
    parent, _, name = folder.root.rstrip("/").rpartition("/")
    if config.eval_only:  # it reads no registry: that one may be another driver's, and names what is gone
        parent, name = folder.root, EVALUATION_FOLDER
    if config.is_elastic:  # nodes that were counted and turn out to be gone are not waited for
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "10")

    def train_one_rank(_shown: dict[str, Any]) -> dict[str, Any]:
        return worker(job)

    return Trainer(
        train_one_rank,
        mailbox=job.mailbox,
        leaves_cluster=leaves_cluster,
        train_loop_config=redacted(config),  # Ray shows it; the worker has its own in the job
        torch_config=TorchGroup(
            backend=_backend(config, each),
            timeout_s=int(max(_SET_UP_S, 2 * config.hang_timeout_s)),
        ),
        scaling_config=ScalingConfig(
            num_workers=(config.min_workers, config.max_workers) if config.is_elastic else config.min_workers,
            use_gpu="GPU" in each,
            resources_per_worker=each,
        ),
        run_config=RunConfig(
            name=name,
            storage_path=parent or "/",
            storage_filesystem=storage_for_ray(folder),
            # Ray restarts without end; the monitor decides whether a restart is worth it
            failure_config=FailureConfig(max_failures=-1, max_preemption_failures=-1, controller_failure_limit=-1),
            checkpoint_config=CheckpointConfig(),  # CheckpointStore.prune decides which checkpoints are kept
            worker_runtime_env=spares.runtime_env(config.warm_spares),
            logging_config=LoggingConfig(log_level="WARNING"),
            callbacks=[monitor, GpuCheck(monitor)] if needs_gpus else [monitor],
        ),
    )


def _backend(config: TrainConfig, each: dict[str, float]) -> str:
    """Return the backend of the workers' process group; each: the resources of a worker."""
    gpus = each.get("GPU", 0.0) if config.device != "cpu" else 0.0
    if 0 < gpus < 1 and config.backend == "nccl":
        logger.info("workers share GPUs (gpus_per_worker=%g), which NCCL cannot: backend=gloo", gpus)
    return process_group_backend(config) if gpus >= 1 else "gloo"
