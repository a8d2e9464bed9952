"""What KubeRay takes in a RayJob and a RayCluster: its schema without the pods in it, which are Kubernetes' own.

Source: the Go types in ray-operator/apis/ray/v1 of KubeRay, from which its CRDs are generated. Of their fields those
are here that 1.6 has and later versions still have, so what passes is accepted by all of them. No registry carries
the CRDs, which have every field of a pod's written out, and are a megabyte each.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

_TEXT: Schema = {"type": "string"}
_SWITCH: Schema = {"type": "boolean"}
_NUMBER: Schema = {"type": "number"}
_COUNT: Schema = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}
_TEXTS: Schema = {"type": "object", "additionalProperties": _TEXT}
_OF_KUBERNETES: Schema = {"type": "object"}  # described elsewhere


def _one_of(*values: str) -> Schema:
    return {"enum": list(values)}


def _many(item: Schema) -> Schema:
    return {"type": "array", "items": item}


def _fields(required: tuple[str, ...] = (), **fields: Schema) -> Schema:
    """Return the schema of an object that has no other fields: Kubernetes would drop one without a word."""
    return {"type": "object", "properties": fields, "required": list(required), "additionalProperties": False}


_MANAGED_BY = _one_of("ray.io/kuberay-operator", "kueue.x-k8s.io/multikueue")
_SECRET = _fields(value=_TEXT, valueFrom=_OF_KUBERNETES)

_GROUP: Schema = {"rayStartParams": _TEXTS, "resources": _TEXTS, "labels": _TEXTS, "template": _OF_KUBERNETES}
_HEAD_GROUP = _fields(
    ("rayStartParams", "template"),
    **_GROUP,
    headService=_OF_KUBERNETES,
    enableIngress=_SWITCH,
    serviceType=_one_of("ClusterIP", "NodePort", "LoadBalancer", "ExternalName"),
)
_WORKER_GROUP = _fields(
    ("groupName", "minReplicas", "maxReplicas", "rayStartParams", "template"),
    **_GROUP,
    groupName=_TEXT,
    replicas=_COUNT,
    minReplicas=_COUNT,
    maxReplicas=_COUNT,
    numOfHosts=_COUNT,
    idleTimeoutSeconds=_COUNT,
    suspend=_SWITCH,
    scaleStrategy=_fields(workersToDelete=_many(_TEXT)),
)
_AUTOSCALER = _fields(
    version=_one_of("v1", "v2"),
    upscalingMode=_one_of("Default", "Aggressive", "Conservative"),
    idleTimeoutSeconds=_COUNT,
    image=_TEXT,
    imagePullPolicy=_one_of("Always", "IfNotPresent", "Never"),
    resources=_OF_KUBERNETES,
    securityContext=_OF_KUBERNETES,
    env=_many(_OF_KUBERNETES),
    envFrom=_many(_OF_KUBERNETES),
    volumeMounts=_many(_OF_KUBERNETES),
)
_REDIS = _fields(
    ("redisAddress",),
    redisAddress=_TEXT,
    redisUsername=_SECRET,
    redisPassword=_SECRET,
    externalStorageNamespace=_TEXT,
)
_CLUSTER_SPEC = _fields(
    ("headGroupSpec",),
    rayVersion=_TEXT,
    authOptions=_fields(mode=_one_of("disabled", "token")),
    enableInTreeAutoscaling=_SWITCH,
    autoscalerOptions=_AUTOSCALER,
    gcsFaultToleranceOptions=_REDIS,
    headServiceAnnotations=_TEXTS,
    headGroupSpec=_HEAD_GROUP,
    workerGroupSpecs=_many(_WORKER_GROUP),
    upgradeStrategy=_fields(type=_one_of("Recreate", "None")),
    managedBy=_MANAGED_BY,
    suspend=_SWITCH,
)
_JOB_SPEC = _fields(
    entrypoint=_TEXT,
    entrypointNumCpus=_NUMBER,
    entrypointNumGpus=_NUMBER,
    entrypointResources=_TEXT,
    runtimeEnvYAML=_TEXT,
    metadata=_TEXTS,
    jobId=_TEXT,
    submissionMode=_one_of("K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode"),
    submitterConfig=_fields(backoffLimit=_COUNT),
    submitterPodTemplate=_OF_KUBERNETES,
    backoffLimit=_COUNT,
    activeDeadlineSeconds={**_COUNT, "minimum": 1},
    shutdownAfterJobFinishes=_SWITCH,
    ttlSecondsAfterFinished=_COUNT,
    clusterSelector=_TEXTS,
    rayClusterSpec=_CLUSTER_SPEC,
    managedBy=_MANAGED_BY,
    suspend=_SWITCH,
)


def schema_of(kind: str) -> Schema:
    """Return the JSON schema of a whole object; kind: RayJob or RayCluster."""
    spec = {"RayJob": _JOB_SPEC, "RayCluster": _CLUSTER_SPEC}[kind]
    metadata = {**_OF_KUBERNETES, "required": ["name"]}
    fields = {"apiVersion": _one_of("ray.io/v1"), "kind": _one_of(kind), "metadata": metadata, "spec": spec}
    return _fields(tuple(fields), **fields)
