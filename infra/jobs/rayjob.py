"""A pipeline as a KubeRay RayJob: a Ray cluster made for the run, sized by what its steps ask for, gone afterwards.

KubeRay starts a new cluster for every retry and runs the same command again. So a retry is a new run, which reuses
what earlier ones have committed: correctness comes from the store, the retry only goes on.
Fields: https://docs.ray.io/en/latest/cluster/kubernetes/references/api.html (KubeRay 1.6).
"""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ropewalk.infra.scrub import names_credential
from ropewalk.infra.step import Pipeline, Resources, UserError

PIPELINE_FOLDER = "/home/ray/pipeline"
"""Where a pipeline file and its modules are mounted in every pod."""
MAX_NAME = 47
"""Of a RayJob: KubeRay makes longer names from it."""
MAX_CONFIG_MAP_BYTES = 1_000_000
HEAD = {"cpu": 2, "memory_gib": 8}
DEFAULT_MEMORY_GIB = 8
MEMORY_HEADROOM = 1.5
"""Memory of a pod over what a task asks for: Ray keeps 30 percent of it for its object store."""
BACKOFF_LIMIT = 3
TTL_SECONDS = 600
DEADLINE_SECONDS = 7 * 24 * 3600

HEADER = """\
# {title}
# Printed by `ropewalk submit --kuberay`. Start it with `kubectl apply -f FILE`, follow it with
# `kubectl get rayjob {name} -w`.
# The image holds ropewalk and all packages it needs (infra/cluster/Dockerfile). Nothing but the store outlives the job.
"""


@dataclass(frozen=True)
class RayJob:
    """What a manifest is made of."""

    pipeline: Pipeline
    command: Sequence[str]
    image: str
    ray_version: str
    workers: int = 1
    """Pods in each group of workers; more where a gang needs them."""
    variables: Mapping[str, str] = field(default_factory=dict)
    secrets: Sequence[str] = ()
    """Names of Kubernetes secrets whose entries become environment variables."""
    files: Mapping[str, str] = field(default_factory=dict)
    """Text of the pipeline file and its modules, by path under `PIPELINE_FOLDER`."""
    gangs: Mapping[str, int] = field(default_factory=dict)
    """Processes that a step's training takes at a time, by step."""

    @property
    def name(self) -> str:
        """The manifest's name: `ropewalk-` and the pipeline's."""
        name = re.sub(r"[^a-z0-9]+", "-", f"ropewalk-{self.pipeline.name}".lower())
        return name[:MAX_NAME].strip("-")

    def documents(self) -> list[dict[str, Any]]:
        """The manifest's documents: a ConfigMap if there are files, and the RayJob."""
        for name in self.variables:
            if names_credential(name):
                raise UserError(
                    f"--env {name} would stand in the manifest: put it into a secret and name that (--secret)"
                )
        return [*self._config_map(), self._job()]

    def text(self) -> str:
        """The manifest as YAML."""
        import yaml

        title = f"Pipeline {self.pipeline.name} as a RayJob."
        parts = [yaml.dump(document, Dumper=_dumper(), sort_keys=False, width=110) for document in self.documents()]
        return HEADER.format(title=title, name=self.name) + "---\n".join(parts)

    def _job(self) -> dict[str, Any]:
        return {
            "apiVersion": "ray.io/v1",
            "kind": "RayJob",
            "metadata": {"name": self.name, "labels": {"app.kubernetes.io/name": "ropewalk"}},
            "spec": {
                "entrypoint": shlex.join(self.command),
                "runtimeEnvYAML": self._runtime_env(),
                "submissionMode": "K8sJobMode",
                "backoffLimit": BACKOFF_LIMIT,
                "activeDeadlineSeconds": DEADLINE_SECONDS,
                "shutdownAfterJobFinishes": True,
                "ttlSecondsAfterFinished": TTL_SECONDS,
                "rayClusterSpec": self._cluster(),
            },
        }

    def _runtime_env(self) -> str:
        import yaml

        from ropewalk.infra.jobs.submit import STOP_WAIT_SECONDS

        fixed = {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_SECONDS), "RAY_USAGE_STATS_ENABLED": "0"}
        return yaml.safe_dump({"env_vars": {**fixed, **self.variables}}, sort_keys=True)

    def _cluster(self) -> dict[str, Any]:
        head = Resources(num_cpus=HEAD["cpu"], memory_gib=HEAD["memory_gib"] / MEMORY_HEADROOM)
        return {
            "rayVersion": self.ray_version,
            # A token of the operator's own making guards the dashboard and the job server.
            "authOptions": {"mode": "token"},
            "headGroupSpec": {
                # The head keeps the cluster together and runs the driver; steps go to the workers.
                "rayStartParams": {"num-cpus": "0"},
                "template": self._pod("ray-head", head),
            },
            "workerGroupSpecs": [self._group(needs) for needs in worker_needs(self.pipeline)],
        }

    def _group(self, needs: Resources) -> dict[str, Any]:
        gangs = [self.gangs.get(step.name, 1) for step in self.pipeline if step.worker_resources == needs]
        replicas = max([self.workers, *gangs])
        start: dict[str, str] = {}
        if needs.custom:
            # A JSON text inside a shell word: KubeRay puts it on the command line as it is.
            start["resources"] = json.dumps(json.dumps(dict(needs.custom)))
        return {
            "groupName": _group_name(needs),
            "replicas": replicas,
            "minReplicas": replicas,
            "maxReplicas": replicas,
            "rayStartParams": start,
            "template": self._pod("ray-worker", needs),
        }

    def _pod(self, name: str, needs: Resources) -> dict[str, Any]:
        memory = math.ceil((needs.memory_gib or DEFAULT_MEMORY_GIB / MEMORY_HEADROOM) * MEMORY_HEADROOM)
        amounts: dict[str, Any] = {"cpu": str(max(1, math.ceil(needs.num_cpus))), "memory": f"{memory}Gi"}
        if needs.num_gpus:
            amounts["nvidia.com/gpu"] = str(math.ceil(needs.num_gpus))
        container: dict[str, Any] = {
            "name": name,
            "image": self.image,
            "resources": {"requests": amounts, "limits": dict(amounts)},
        }
        spec: dict[str, Any] = {"containers": [container]}
        if self.secrets:
            container["envFrom"] = [{"secretRef": {"name": secret}} for secret in self.secrets]
        if self.files:
            container["volumeMounts"] = [{"name": "pipeline", "mountPath": PIPELINE_FOLDER, "readOnly": True}]
            items = [{"key": _config_key(path), "path": path} for path in self.files]
            spec["volumes"] = [{"name": "pipeline", "configMap": {"name": self.name, "items": items}}]
        return {"spec": spec}

    def _config_map(self) -> list[dict[str, Any]]:
        if not self.files:
            return []
        size = sum(len(text.encode()) for text in self.files.values())
        if size > MAX_CONFIG_MAP_BYTES:
            raise UserError(
                f"the pipeline file and its modules have {size} bytes, a ConfigMap holds 1 MB: add them to the image"
            )
        data = {_config_key(path): text for path, text in self.files.items()}
        return [{"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": self.name}, "data": data}]


def worker_needs(pipeline: Pipeline) -> list[Resources]:
    """The distinct needs of a pipeline's steps and of their workers, the greatest first; the free ones left out."""
    found: list[Resources] = []
    for step in pipeline:
        for needs in (step.resources, step.worker_resources):
            if (needs.num_cpus or needs.num_gpus or needs.custom) and needs not in found:
                found.append(needs)
    return sorted(found, key=lambda needs: (needs.num_gpus, needs.num_cpus, needs.memory_gib or 0), reverse=True)


def check_against_crd(document: Mapping[str, Any], crd_path: Path) -> None:
    """Refuse a RayJob that breaks the schema of a CustomResourceDefinition file, unknown fields included.

    The API server itself drops fields that it does not know. Raises UserError naming the field.
    """
    import jsonschema
    import yaml

    try:
        crd = yaml.safe_load(crd_path.read_text(encoding="utf-8"))
        versions = {version["name"]: version["schema"]["openAPIV3Schema"] for version in crd["spec"]["versions"]}
        schema = versions[document["apiVersion"].rpartition("/")[2]]
    except OSError as error:
        raise UserError(f"--crd {crd_path}: {error.strerror}; name the file of the CustomResourceDefinition") from None
    except (UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError):
        raise UserError(f"--crd {crd_path}: this is no CustomResourceDefinition of {document['kind']} v1") from None
    if crd["spec"]["names"]["kind"] != document["kind"]:
        raise UserError(f"--crd {crd_path}: this file defines {crd['spec']['names']['kind']}, not {document['kind']}")
    # Kubernetes' schemas are of the age in which `exclusiveMinimum` was a switch.
    errors = sorted(
        jsonschema.Draft4Validator(_strict(schema)).iter_errors(document), key=lambda e: list(map(str, e.path))
    )
    if errors:
        place = ".".join(map(str, errors[0].absolute_path))
        raise UserError(f"the manifest breaks {crd_path} at {place or 'its top'}: {errors[0].message}")


def _strict(schema: Any) -> Any:
    """The schema, refusing fields that it does not name."""
    if isinstance(schema, list):
        return [_strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    strict = {name: _strict(item) for name, item in schema.items()}
    open_ended = "additionalProperties" in schema or schema.get("x-kubernetes-preserve-unknown-fields")
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object" and not open_ended:
        strict["additionalProperties"] = False
    return strict


def _group_name(needs: Resources) -> str:
    parts = [f"cpu{needs.num_cpus:g}"]
    parts += [f"gpu{needs.num_gpus:g}"] if needs.num_gpus else []
    parts += [f"mem{needs.memory_gib:g}"] if needs.memory_gib else []
    parts += [f"{name}{amount:g}" for name, amount in sorted(needs.custom.items())]
    return re.sub(r"[^a-z0-9-]+", "-", "-".join(parts).lower()).strip("-")


def _config_key(path: str) -> str:
    """A path as a ConfigMap's key, which has no slashes."""
    return path.replace("/", "__")


def _dumper() -> type[Any]:
    """PyYAML's, with texts of several lines as blocks that people can read."""
    import yaml

    class Dumper(yaml.SafeDumper):
        def ignore_aliases(self, data: Any) -> bool:
            return True

    def text(dumper: Any, value: str) -> Any:
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)

    Dumper.add_representer(str, text)
    return Dumper
