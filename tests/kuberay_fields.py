"""The documented fields of a RayJob, as a CRD that manifests are checked against.

Source: https://github.com/ray-project/kuberay/blob/v1.6.2/docs/reference/api.md (KubeRay 1.6.2), and for pods
https://kubernetes.io/docs/reference/kubernetes-api/workload-resources/pod-v1/ (those fields that we could set).
"""

from __future__ import annotations

from typing import Any

TEXT: dict[str, Any] = {"type": "string"}
WHOLE: dict[str, Any] = {"type": "integer", "format": "int32"}
SWITCH: dict[str, Any] = {"type": "boolean"}
NUMBER: dict[str, Any] = {"type": "number"}
TEXTS: dict[str, Any] = {"type": "object", "additionalProperties": TEXT}
QUANTITIES: dict[str, Any] = {
    "type": "object",
    "additionalProperties": {"anyOf": [{"type": "integer"}, TEXT], "x-kubernetes-int-or-string": True},
}
ANY: dict[str, Any] = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}


def record(*required: str, **fields: Any) -> dict[str, Any]:
    return (
        {"type": "object", "required": list(required), "properties": fields}
        if required
        else {
            "type": "object",
            "properties": fields,
        }
    )


def many(item: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": item}


CONTAINER = record(
    "name",
    name=TEXT,
    image=TEXT,
    imagePullPolicy=TEXT,
    command=many(TEXT),
    args=many(TEXT),
    workingDir=TEXT,
    env=many(record("name", name=TEXT, value=TEXT, valueFrom=ANY)),
    envFrom=many(record(prefix=TEXT, secretRef=record(name=TEXT, optional=SWITCH), configMapRef=ANY)),
    resources=record(requests=QUANTITIES, limits=QUANTITIES, claims=many(ANY)),
    volumeMounts=many(record("name", "mountPath", name=TEXT, mountPath=TEXT, subPath=TEXT, readOnly=SWITCH)),
    ports=many(ANY),
    securityContext=ANY,
)
VOLUME = record(
    "name",
    name=TEXT,
    configMap=record(
        name=TEXT,
        optional=SWITCH,
        defaultMode=WHOLE,
        items=many(record("key", "path", key=TEXT, path=TEXT, mode=WHOLE)),
    ),
    secret=ANY,
    persistentVolumeClaim=ANY,
    emptyDir=ANY,
)
POD = record(
    metadata=ANY,
    spec=record(
        "containers",
        containers=many(CONTAINER),
        initContainers=many(CONTAINER),
        volumes=many(VOLUME),
        nodeSelector=TEXTS,
        tolerations=many(ANY),
        affinity=ANY,
        serviceAccountName=TEXT,
        restartPolicy=TEXT,
        imagePullSecrets=many(ANY),
        securityContext=ANY,
    ),
)
HEAD_GROUP = record(
    "template",
    template=POD,
    headService=ANY,
    enableIngress=SWITCH,
    resources=TEXTS,
    labels=TEXTS,
    rayStartParams=TEXTS,
    serviceType=TEXT,
)
WORKER_GROUP = record(
    "groupName",
    "maxReplicas",
    "minReplicas",
    "template",
    suspend=SWITCH,
    groupName=TEXT,
    replicas=WHOLE,
    minReplicas=WHOLE,
    maxReplicas=WHOLE,
    idleTimeoutSeconds=WHOLE,
    resources=TEXTS,
    labels=TEXTS,
    rayStartParams=TEXTS,
    template=POD,
    scaleStrategy=ANY,
    numOfHosts=WHOLE,
)
CLUSTER = record(
    "headGroupSpec",
    upgradeStrategy=ANY,
    authOptions=record(mode={**TEXT, "enum": ["disabled", "token"]}, secretName=TEXT, enableK8sTokenAuth=SWITCH),
    suspend=SWITCH,
    managedBy=TEXT,
    autoscalerOptions=ANY,
    headServiceAnnotations=TEXTS,
    enableInTreeAutoscaling=SWITCH,
    gcsFaultToleranceOptions=ANY,
    headGroupSpec=HEAD_GROUP,
    rayVersion=TEXT,
    workerGroupSpecs=many(WORKER_GROUP),
)
JOB = record(
    activeDeadlineSeconds=WHOLE,
    backoffLimit={**WHOLE, "minimum": 0},
    rayClusterSpec=CLUSTER,
    submitterPodTemplate=POD,
    metadata=TEXTS,
    clusterSelector=TEXTS,
    submitterConfig=record(backoffLimit=WHOLE),
    managedBy=TEXT,
    deletionStrategy=ANY,
    entrypoint=TEXT,
    runtimeEnvYAML=TEXT,
    jobId=TEXT,
    submissionMode={**TEXT, "enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
    entrypointResources=TEXT,
    entrypointNumCpus=NUMBER,
    entrypointNumGpus=NUMBER,
    ttlSecondsAfterFinished=WHOLE,
    preRunningDeadlineSeconds={**WHOLE, "minimum": 1},
    shutdownAfterJobFinishes=SWITCH,
    suspend=SWITCH,
)


def rayjob_crd() -> dict[str, Any]:
    """A CustomResourceDefinition of RayJob as documented."""
    schema = record(apiVersion=TEXT, kind=TEXT, metadata={"type": "object"}, spec=JOB, status=ANY)
    version = {"name": "v1", "served": True, "storage": True, "schema": {"openAPIV3Schema": schema}}
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": "rayjobs.ray.io"},
        "spec": {"group": "ray.io", "names": {"kind": "RayJob", "plural": "rayjobs"}, "versions": [version]},
    }
