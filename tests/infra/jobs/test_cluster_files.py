"""The files in infra/cluster: as far as they can be checked without Docker and Kubernetes."""

import json
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import jsonschema
import mlflow.cli
import pytest
import ray
import yaml

REPOSITORY = Path(__file__).parents[3]
CLUSTER = REPOSITORY / "infra/cluster"
DOCKERFILES = {CLUSTER / "Dockerfile": REPOSITORY, CLUSTER / "mlflow/Dockerfile": CLUSTER / "mlflow"}
"""Each with the folder that it is built from."""
INSTRUCTIONS = {"ARG", "FROM", "WORKDIR", "COPY", "RUN", "ENV", "USER", "ENTRYPOINT"}


def instructions(path):
    """Name and arguments of each instruction of a Dockerfile."""
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    logical = "\n".join(lines).replace("\\\n", " ").splitlines()
    return [tuple(line.split(maxsplit=1)) for line in logical if line.strip()]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.parent.name)
def test_dockerfiles_copy_what_exists_from_fixed_versions_and_run_valid_shell(path):
    stages = []
    for name, arguments in instructions(path):
        assert name in INSTRUCTIONS
        words = arguments.split()
        if name == "FROM":
            image = words[0]
            assert image == "${BASE_IMAGE}" or re.fullmatch(r"[\w./-]+:[\w.-]*\d[\w.-]*", image), "a tag with a version"
            stages += words[2:] if words[1:2] == ["AS"] else []
        elif name == "COPY" and words[0].startswith("--from="):
            assert words[0].removeprefix("--from=") in stages
        elif name == "COPY":
            for source in words[:-1]:
                assert (DOCKERFILES[path] / source).exists(), source
        elif name == "RUN":
            assert "--no-cache-dir" in arguments or "pip" not in arguments
            subprocess.run(["bash", "-n", "-c", arguments], check=True)


def test_the_image_is_given_what_it_copies_and_nothing_else():
    ignored = (CLUSTER / "Dockerfile.dockerignore").read_text().splitlines()
    assert "*" in ignored
    allowed = {line.removeprefix("!") for line in ignored if line.startswith("!")}
    copied = set()
    for name, arguments in instructions(CLUSTER / "Dockerfile"):
        if name == "COPY" and not arguments.startswith("--from"):
            copied |= {source.removeprefix("./") for source in arguments.split()[:-1]}
    assert copied == allowed


def test_versions_agree_with_the_pinned_ones():
    pins = dict(line.split("==") for line in (REPOSITORY / "constraints.txt").read_text().splitlines() if "==" in line)
    image = (CLUSTER / "Dockerfile").read_text()
    assert f"BASE_IMAGE=rayproject/ray:{pins['ray']}-py311-gpu" in image
    assert f"mlflow=={pins['mlflow']} " in (CLUSTER / "mlflow/Dockerfile").read_text()
    rayjob = yaml.safe_load((CLUSTER / "kuberay-rayjob.yaml").read_text())
    assert rayjob["spec"]["rayClusterSpec"]["rayVersion"] == pins["ray"]


def test_the_cluster_file_follows_rays_schema_and_ray_can_prepare_it():
    cluster = yaml.safe_load((CLUSTER / "ray-cluster.yaml").read_text())
    schema = json.loads((Path(ray.__file__).parent / "autoscaler/ray-schema.json").read_text())
    jsonschema.validate(cluster, schema)
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(cluster)
    validate_config(prepared)
    [node] = prepared["available_node_types"].values()
    assert node["min_workers"] == len(cluster["provider"]["worker_ips"]), "all machines are used from the start"


def test_start_commands_are_valid_shell_and_valid_options_of_ray():
    cluster = yaml.safe_load((CLUSTER / "ray-cluster.yaml").read_text())
    known = subprocess.run(
        [sys.executable, "-m", "ray.scripts.scripts", "start", "--help"], capture_output=True, text=True, check=True
    ).stdout
    for command in cluster["head_start_ray_commands"] + cluster["worker_start_ray_commands"]:
        subprocess.run(["bash", "-n", "-c", command], check=True)
        for option in re.findall(r"(--[a-z-]+)", command):
            # Left out of the help text; the launcher's own examples use it.
            assert option in known or option == "--autoscaling-config"
    assert all(
        "RAY_AUTH_MODE=token" in commands[-1]
        for commands in (cluster["head_start_ray_commands"], cluster["worker_start_ray_commands"])
    )


def test_the_tracking_servers_options_exist_and_hold_what_it_promises():
    compose = yaml.safe_load((CLUSTER / "mlflow/compose.yaml").read_text())
    server = compose["services"]["mlflow"]
    known = subprocess.run(
        [sys.executable, "-m", "mlflow", "server", "--help"], capture_output=True, text=True, check=True
    ).stdout
    options = dict(option.partition("=")[::2] for option in server["command"])
    assert all(option in known for option in options)
    variables = {parameter.envvar for parameter in mlflow.cli.cli.commands["server"].params}
    assert "MLFLOW_BACKEND_STORE_URI" in variables
    assert "--no-serve-artifacts" in options and "${MLFLOW_HOST" in options["--allowed-hosts"]
    assert server["environment"]["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] == "false"
    assert server["environment"]["MLFLOW_BACKEND_STORE_URI"].startswith("postgresql")
    assert all(port.startswith("127.0.0.1:") for port in server["ports"]), "listens on loopback"
    # Every value that differs from place to place is asked for; none has a default that would be forgotten.
    text = (CLUSTER / "mlflow/compose.yaml").read_text()
    asked = set(re.findall(r"\$\{(\w+):\?", text))
    assert asked == set(re.findall(r"\$\{(\w+)", text)) == {"POSTGRES_PASSWORD", "ARTIFACT_ROOT", "MLFLOW_HOST"}


def test_every_file_is_explained():
    for path in CLUSTER.rglob("*"):
        if path.is_file() and path.suffix != ".md":
            assert path.read_text().startswith("# "), path
            assert path.name in (CLUSTER / "README.md").read_text(), path


def test_the_installed_ray_is_new_enough_for_the_files():
    assert tuple(map(int, metadata.version("ray").split(".")[:2])) >= (2, 60)
