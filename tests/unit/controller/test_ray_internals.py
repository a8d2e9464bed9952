"""What we use of Ray that is not public: where one of these fails, read the module that uses it again."""

from __future__ import annotations

import inspect
import pickle
import re
import threading
import time
from typing import Any

import pytest
import ray
from ray._private.ray_constants import WORKER_PROCESS_SETUP_HOOK_ENV_VAR
from ray._private.state import state as cluster
from ray.autoscaler.v2 import monitor
from ray.core.generated.autoscaler_pb2 import AutoscalingState, DrainNodeReason, GetClusterStatusReply
from ray.core.generated.node_manager_pb2 import PrestartWorkersRequest
from ray.scripts import scripts
from ray.train import RunConfig
from ray.train.torch import TorchTrainer
from ray.train.torch.config import _TorchBackend
from ray.train.v2._internal.callbacks.backend_setup import BackendSetupCallback
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.preemption import PreemptionContext
from ray.train.v2._internal.execution.scaling_policy import ScalingPolicy
from ray.train.v2._internal.execution.worker_group import RayTrainWorker, Worker, WorkerGroup
from ray.train.v2._internal.execution.worker_group.thread_runner import ThreadRunner
from ray.train.v2._internal.metrics.base import RUN_ID_TAG_KEY, RUN_NAME_TAG_KEY
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from orchestrator.controller.attempts import AttemptMonitor
from orchestrator.controller.budgets import Budgets
from orchestrator.controller.scaling import (
    FixedPolicy,
    LiveNodesPolicy,
    UnscaledLiveNodesPolicy,
    WithoutAutoscaler,
)
from orchestrator.driver.ray_metrics import RUN_LABELS
from orchestrator.driver.trainer import TorchGroup, Trainer
from orchestrator.worker.failure import AttemptFailedError, Cause, WorkerFailure


def test_the_version_is_the_one_that_was_read() -> None:
    assert ray.__version__.startswith("2.60.")


def test_the_hooks_of_the_monitor_are_called() -> None:
    hooks = [name for name in vars(AttemptMonitor) if name.startswith(("before_", "after_"))]
    assert len(hooks) == 6
    assert "on_controller_start_worker_group" in vars(ControllerCallback)
    for name in hooks:
        assert list(inspect.signature(getattr(WorkerGroupCallback, name)).parameters) == list(
            inspect.signature(getattr(AttemptMonitor, name)).parameters
        )
        assert f"callback.{name}(" in inspect.getsource(WorkerGroup)


def test_a_trainer_knows_the_labels_of_ray_trains_own_metrics() -> None:
    run = TorchTrainer(lambda: None, run_config=RunConfig(name="mine")).train_run_context
    assert run.run_config.name == "mine"
    assert re.fullmatch("[0-9a-f]{32}", run.run_id)
    assert RUN_LABELS == (RUN_NAME_TAG_KEY, RUN_ID_TAG_KEY)
    assert "self.train_run_context" in inspect.getsource(DataParallelTrainer.fit), "it is the one that Ray uses"


def test_a_worker_can_be_asked_to_call_something() -> None:
    assert list(inspect.signature(Worker.execute_async).parameters)[:2] == ["self", "fn"]


def test_any_thread_of_a_worker_can_fail_it() -> None:
    runner = ThreadRunner()
    ending = WorkerFailure(1, Cause.HANG, "no progress", 7, "", 1.5)
    error = UserExceptionWithTraceback(AttemptFailedError(ending), traceback_str=ending.text)

    def train() -> None:  # as final_reports does, whose context is Ray Train's
        runner.get_exception_queue().put(error)
        released.wait(30)

    released = threading.Event()
    runner.run(train)
    deadline_s = time.monotonic() + 30
    while runner.get_error() is None and time.monotonic() < deadline_s:
        time.sleep(0.01)
    assert runner.get_error() is error
    assert runner.is_running(), "it need not end"
    released.set()
    restored = pickle.loads(pickle.dumps(error))
    assert restored._base_exc.failure == ending
    assert "error = execution_context.training_thread_runner.get_error()" in inspect.getsource(
        RayTrainWorker.poll_status
    )


def test_the_drain_notice_is_kept_where_it_is_read() -> None:
    assert PreemptionContext().preemption_info is None


def test_spares_can_be_asked_for() -> None:
    fields = {field.name for field in PrestartWorkersRequest.DESCRIPTOR.fields}
    assert fields == {"language", "job_id", "runtime_env_info", "keep_alive_duration_secs", "num_workers"}
    assert WORKER_PROCESS_SETUP_HOOK_ENV_VAR


def test_the_trainer_takes_a_scaling_policy() -> None:
    assert "scaling_policy=create_scaling_policy(self.scaling_config)" in inspect.getsource(TorchTrainer.fit)
    assert "def _initialize_and_run_controller(self, **controller_init_kwargs)" in inspect.getsource(
        DataParallelTrainer
    )
    for name in ("_send_resource_request", "_maybe_send_resource_request", "_cancel_resource_request"):
        assert {name} <= vars(ScalingPolicy).keys() & vars(WithoutAutoscaler).keys()
        assert all(
            getattr(policy, name) is vars(WithoutAutoscaler)[name] for policy in (FixedPolicy, UnscaledLiveNodesPolicy)
        )
    for name in ("make_decision_for_non_running_worker_group", "make_decision_for_running_worker_group"):
        ours, rays = (
            inspect.signature(getattr(policy, name)).parameters for policy in (LiveNodesPolicy, ScalingPolicy)
        )
        assert list(ours) == list(rays)
    assert callable(cluster.get_draining_nodes)
    assert callable(cluster.available_resources_per_node)


def test_parts_of_the_trainer_can_be_left_out() -> None:
    assert "callbacks=self._create_default_callbacks()" in inspect.getsource(DataParallelTrainer.fit)
    assert "PlacementGroupCleanerCallback()" in inspect.getsource(DataParallelTrainer._create_default_callbacks)
    provider = inspect.signature(RayTrainWorker.init_train_context).parameters["dataset_shard_provider"]
    assert provider.default is None, "it is only given where DatasetsCallback is among the callbacks"


def test_a_node_can_be_drained() -> None:
    assert "is_accepted, rejection_error_message = gcs_client.drain_node(" in inspect.getsource(
        scripts.drain_node.callback
    )
    assert DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")


def test_the_autoscaler_tells_what_it_cannot_bring() -> None:
    assert {field.name for field in GetClusterStatusReply.DESCRIPTOR.fields} == {
        "autoscaling_state",
        "cluster_resource_state",
    }
    fields = {field.name for field in AutoscalingState.DESCRIPTOR.fields}
    told = {"infeasible_gang_resource_requests", "last_seen_cluster_resource_state_version"}
    assert fields >= told | {"pending_instances", "pending_instance_requests", "failed_instance_requests"}
    assert "report_autoscaling_state(" in inspect.getsource(monitor)


@pytest.mark.filterwarnings("default")  # Ray warns of its own parts
def test_the_monitor_is_asked_before_the_process_group_is_left() -> None:
    config = TorchGroup(backend="gloo")
    assert isinstance(config.backend_cls(), _TorchBackend)
    ours, rays = config.backend_cls.on_shutdown, _TorchBackend.on_shutdown
    assert list(inspect.signature(ours).parameters) == list(inspect.signature(rays).parameters)
    assert "destroy_process_group" in inspect.getsource(rays)
    assert "self._backend = backend_config.backend_cls()" in inspect.getsource(BackendSetupCallback)
    assert "callback.before_worker_group_shutdown(self)" in inspect.getsource(WorkerGroup.shutdown)

    order: list[type] = []

    def run(_trainer: object, **kwargs: Any) -> None:
        order.extend(type(callback) for callback in kwargs["callbacks"])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TorchTrainer, "_initialize_and_run_controller", run)
        monitor = AttemptMonitor(None, Budgets(0, 0, 1), None)
        trainer = Trainer(print, mailbox=None, leaves_cluster=False, run_config=RunConfig(callbacks=[monitor]))
        trainer._initialize_and_run_controller(callbacks=trainer._create_default_callbacks())
    assert order[0] is AttemptMonitor
    assert BackendSetupCallback in order
