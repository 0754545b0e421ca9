"""Manifests for KubeRay, checked against its documented fields."""

import json
import re
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from kuberay_fields import rayjob_crd
from toy_stages import NumberConfig, number

from ropewalk.infra.jobs.rayjob import RayJob, check_against_crd, worker_needs
from ropewalk.infra.step import Pipeline, Resources, Step, UserError

REPOSITORY = Path(__file__).parents[3]


@pytest.fixture
def crd(tmp_path):
    path = tmp_path / "crd.yaml"
    path.write_text(yaml.safe_dump(rayjob_crd()))
    return path


def step(name, own=None, workers=None):
    return Step(name, number, NumberConfig(), resources=own or Resources(), worker_resources=workers or Resources())


def job(*steps, **rest):
    pipeline = Pipeline("My pipeline_2", steps or (step("a"),))
    return RayJob(pipeline, ["ropewalk", "run", "x y"], "image:1", "2.60.0", **rest)


def groups(manifest):
    return {
        group["groupName"]: group for group in manifest.documents()[-1]["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    }


def ropewalk(*arguments, code=0, cwd=None):
    command = [sys.executable, "-m", "ropewalk.pipelines.cli", "submit", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)
    assert done.returncode == code, done.stdout + done.stderr
    return done


def test_workers_are_grouped_by_what_the_steps_and_their_workers_need():
    gpu = Resources(num_cpus=8, num_gpus=2, memory_gib=64)
    zone = Resources(num_cpus=1, custom={"Zone_A": 1})
    manifest = job(step("a"), step("b", Resources(num_cpus=0), gpu), step("c", Resources(), gpu), step("d", zone))
    assert list(groups(manifest)) == ["cpu8-gpu2-mem64", "cpu1", "cpu1-zone-a1"]
    container = groups(manifest)["cpu8-gpu2-mem64"]["template"]["spec"]["containers"][0]
    assert container["resources"]["limits"] == {"cpu": "8", "memory": "96Gi", "nvidia.com/gpu": "2"}
    assert container["resources"]["requests"] == container["resources"]["limits"]
    start = groups(manifest)["cpu1-zone-a1"]["rayStartParams"]
    [word] = shlex.split(start["resources"])
    assert json.loads(word) == {"Zone_A": 1}


def test_steps_that_only_wait_need_no_pod():
    assert worker_needs(Pipeline("p", (step("a", Resources(num_cpus=0)),))) == [Resources()]


def test_a_group_has_as_many_pods_as_a_gang_has_processes():
    gpu = Resources(num_cpus=4, num_gpus=1)
    manifest = job(step("a"), step("b", Resources(num_cpus=0), gpu), workers=2, gangs={"b": 8})
    assert {name: group["replicas"] for name, group in groups(manifest).items()} == {"cpu4-gpu1": 8, "cpu1": 2}
    assert all(g["replicas"] == g["minReplicas"] == g["maxReplicas"] for g in groups(manifest).values())


def test_the_head_runs_no_steps_and_the_job_ends_with_its_cluster():
    spec = job().documents()[-1]["spec"]
    assert spec["rayClusterSpec"]["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0"}
    assert spec["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    assert spec["shutdownAfterJobFinishes"] is True and spec["ttlSecondsAfterFinished"] > 0
    assert spec["backoffLimit"] > 0 and spec["activeDeadlineSeconds"] > 0
    assert shlex.split(spec["entrypoint"]) == ["ropewalk", "run", "x y"]


def test_the_text_is_commented_yaml_that_reads_back_as_the_documents(crd):
    manifest = job(files={"mine.py": "x = 1\n", "lib/one.py": "y = 2\n"}, secrets=["s3"], variables={"A": "b"})
    assert list(yaml.safe_load_all(manifest.text())) == manifest.documents()
    assert manifest.text().startswith("# Pipeline My pipeline_2 as a RayJob.")
    config_map, rayjob = manifest.documents()
    assert rayjob["metadata"]["name"] == config_map["metadata"]["name"] == "ropewalk-my-pipeline-2"
    assert config_map["data"] == {"mine.py": "x = 1\n", "lib__one.py": "y = 2\n"}
    head = rayjob["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    assert head["volumes"][0]["configMap"]["items"][1] == {"key": "lib__one.py", "path": "lib/one.py"}
    assert head["containers"][0]["envFrom"] == [{"secretRef": {"name": "s3"}}]
    assert yaml.safe_load(rayjob["spec"]["runtimeEnvYAML"])["env_vars"]["A"] == "b"
    check_against_crd(rayjob, crd)


def test_a_credential_does_not_get_into_a_manifest():
    with pytest.raises(UserError, match="--env HF_TOKEN would stand in the manifest"):
        job(variables={"HF_TOKEN": "x"}).documents()


@pytest.mark.parametrize(
    ("change", "place"),
    [
        (lambda spec: spec.update(backofLimit=3), "spec: .*backofLimit"),
        (lambda spec: spec.update(backoffLimit="3"), "spec.backoffLimit: '3' is not of type 'integer'"),
        (lambda spec: spec["rayClusterSpec"]["authOptions"].update(mode="on"), "spec.rayClusterSpec.authOptions.mode"),
        (
            lambda spec: spec["rayClusterSpec"]["workerGroupSpecs"][0].pop("groupName"),
            "spec.rayClusterSpec.workerGroupSpecs.0: 'groupName' is a required property",
        ),
    ],
)
def test_a_manifest_that_breaks_the_schema_is_refused_with_the_field(crd, change, place):
    manifest = job().documents()[-1]
    change(manifest["spec"])
    with pytest.raises(UserError, match=f"breaks .*crd.yaml at {place}"):
        check_against_crd(manifest, crd)


@pytest.mark.parametrize("text", ["", "a: [", "spec: {versions: []}", "spec: {versions: [{name: v1}]}"])
def test_a_file_that_is_no_crd_is_refused(tmp_path, text):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"--crd .*x\.yaml: this is no CustomResourceDefinition of RayJob v1"):
        check_against_crd(job().documents()[-1], path)


def test_a_crd_of_another_kind_is_refused(tmp_path):
    other = rayjob_crd()
    other["spec"]["names"]["kind"] = "RayCluster"
    path = tmp_path / "x.yaml"
    path.write_text(yaml.safe_dump(other))
    with pytest.raises(UserError, match="this file defines RayCluster, not RayJob"):
        check_against_crd(job().documents()[-1], path)


def test_the_manifest_in_the_repository_is_the_one_that_the_command_prints(crd, tmp_path):
    path = tmp_path / "rayjob.yaml"
    options = ["--kuberay", "--store", "s3://bucket/prefix", "--crd", str(crd), "-o", str(path)]
    ropewalk("quickstart", *options, cwd=tmp_path)
    kept = (REPOSITORY / "infra/cluster/kuberay-rayjob.yaml").read_text()
    assert path.read_text() == re.sub(r"rayVersion: \S+", f"rayVersion: {metadata.version('ray')}", kept)


def test_a_pipeline_file_travels_in_the_manifest_with_the_options_of_the_run(tmp_path, crd):
    (tmp_path / "mine.py").write_text("from lib import one\nfrom toy_copy import diamond as pipeline\nassert one\n")
    (tmp_path / "lib.py").write_text("one = 1\n")
    (tmp_path / "toy_copy.py").write_text((REPOSITORY / "tests/toy_stages.py").read_text())
    options = [
        "--kuberay",
        "--store",
        "s3://b/p",
        "--set",
        "first.value=4",
        "--force",
        "left",
        "--crd",
        str(crd),
        "--json",
    ]
    done = ropewalk("mine.py", *options, cwd=tmp_path)
    config_map, rayjob = json.loads(done.stdout.splitlines()[-1])["documents"]
    assert sorted(config_map["data"]) == ["lib.py", "mine.py", "toy_copy.py"]
    command = shlex.split(rayjob["spec"]["entrypoint"])
    assert command[:6] == ["python", "-P", "-m", "ropewalk.pipelines.cli", "run", "/home/ray/pipeline/mine.py"]
    assert command[6:] == ["--store", "s3://b/p", "--set", "first.value=4", "--force", "left", "--address", "auto"]


def test_a_store_in_a_pods_own_folder_is_refused(tmp_path):
    done = ropewalk("quickstart", "--kuberay", "--store", "here", code=1, cwd=tmp_path)
    assert "--store here would be a folder of a pod, gone with it" in done.stderr
