"""A run is tracked by a team's server: MLflow on PostgreSQL, artifacts in S3, killed and started in between."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import metric_stages
import pytest
from object_store_server import new_bucket, object_store_server
from shown_runs import recorded_points, shown_points, shown_runs
from team_server import MlflowServer, postgres

from ropewalk.infra.tracking.database import open_client

pytestmark = pytest.mark.services
PIPELINE = Path(metric_stages.__file__)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    log = tmp_path_factory.mktemp("server") / "mlflow.log"
    with object_store_server(), postgres() as database:
        server = MlflowServer(database, f"{new_bucket()}/mlflow", log)
        server.start()
        try:
            yield server
        finally:
            server.kill()


def ropewalk(server: MlflowServer, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "ropewalk.pipelines.cli", *arguments]
    environment = {**os.environ, "MLFLOW_TRACKING_URI": server.url}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def answer(process: subprocess.Popen[str]) -> dict[str, Any]:
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0, output
    return json.loads(output.splitlines()[-1])


def run(server: MlflowServer, store: Path, *settings: str) -> subprocess.Popen[str]:
    options = [option for setting in settings for option in ("--set", setting)]
    return ropewalk(server, "run", str(PIPELINE), "--store", str(store), "--executor", "local", "--json", *options)


def test_runs_metrics_models_and_files_are_on_the_server(server: MlflowServer, tmp_path: Path) -> None:
    result = answer(run(server, tmp_path))
    assert result["status"] == "succeeded"
    client = open_client(server.url)
    runs = shown_runs(client, result["run_id"])
    parent = runs[result["run_id"]]
    assert parent.info.run_id == result["mlflow_run_id"]
    assert parent.info.artifact_uri.startswith("s3://")
    assert {name: run.info.status for name, run in runs.items()} == dict.fromkeys(runs, "FINISHED")
    assert shown_points(client, result["run_id"]) == recorded_points(tmp_path, result["run_id"])
    (model,) = client.search_logged_models([parent.info.experiment_id])
    assert [(metric.key, metric.step, metric.value) for metric in model.metrics] == [("score", 1024, 30)]
    report = client.download_artifacts(parent.info.run_id, "evaluate/data/report.html", str(tmp_path))
    assert Path(report).read_text() == "<h1>30</h1>"


def test_a_server_that_is_killed_and_started_again_during_a_run_has_all_of_it(
    server: MlflowServer, tmp_path: Path
) -> None:
    process = run(server, tmp_path, "train.num_steps=250", "train.step_seconds=0.1")
    events = tmp_path / "runs"
    while '"metric_step": 60' not in "".join(path.read_text() for path in events.glob("*/events.jsonl")):
        assert process.poll() is None
        time.sleep(0.1)
    server.kill()
    server.start()
    result = answer(process)
    assert "trying again" in (events / result["run_id"] / "logs/tracking.log").read_text()
    client = open_client(server.url)
    assert shown_points(client, result["run_id"]) == recorded_points(tmp_path, result["run_id"])
    assert len(recorded_points(tmp_path, result["run_id"])["train"]) == 251
    assert shown_runs(client, result["run_id"])[result["run_id"]].info.status == "FINISHED"


def test_a_run_while_the_server_is_down_succeeds_and_sync_brings_it(server: MlflowServer, tmp_path: Path) -> None:
    server.kill()
    result = answer(run(server, tmp_path, "train.num_steps=31"))
    assert (result["status"], result["mlflow_run_id"]) == ("succeeded", None)
    server.start()
    synced = answer(ropewalk(server, "sync", "last", "--store", str(tmp_path), "--json"))
    assert (synced["run_id"], isinstance(synced["mlflow_run_id"], str)) == (result["run_id"], True)
    assert answer(ropewalk(server, "sync", "--all", "--store", str(tmp_path), "--json")) == {"runs": []}
    client = open_client(server.url)
    assert shown_points(client, result["run_id"]) == recorded_points(tmp_path, result["run_id"])
