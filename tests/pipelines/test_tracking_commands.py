"""`run` does its work whatever becomes of MLflow, and `sync` mends it or says in one sentence why it cannot."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import metric_stages
import pytest
from faulty_proxy import Fault, FaultyProxy, faulty_mlflow
from run_records import RecordBuilder, small_record, store_with_database
from shown_runs import client_of, recorded_points, shown_points, shown_runs

from ropewalk.infra.tracking.database import open_client


def ropewalk(*arguments: str, uri: str = "", timeout_seconds: int = 1) -> subprocess.Popen[str]:
    environment = {**os.environ, "MLFLOW_TRACKING_URI": uri, "MLFLOW_HTTP_REQUEST_TIMEOUT": str(timeout_seconds)}
    command = [sys.executable, "-m", "ropewalk.pipelines.cli", *arguments, "--json"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def ended(process: subprocess.Popen[str]) -> tuple[int, dict[str, Any], str]:
    """Exit status, the object at the end of standard output, and what was said."""
    output, said = process.communicate(timeout=120)
    return process.returncode, json.loads(output.splitlines()[-1]), said


def run(root: Path, uri: str = "", *options: str) -> tuple[int, dict[str, Any], str]:
    pipeline = metric_stages.__file__
    return ended(ropewalk("run", pipeline, "--store", str(root), "--executor", "local", *options, uri=uri))


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultyProxy]:
    with faulty_mlflow(store_with_database(tmp_path_factory.mktemp("served")), delay_seconds=5.0) as proxy:
        yield proxy


@pytest.mark.parametrize("fault", ["refuse", "slow answer", "403"])
def test_a_run_during_an_outage_succeeds_and_names_the_command_that_catches_up(
    fault: Fault, proxy: FaultyProxy, tmp_path: Path
) -> None:
    proxy.fault = fault
    code, result, said = run(tmp_path, proxy.url)
    assert (code, result["status"], result["mlflow_run_id"]) == (0, "succeeded", None)
    assert f"`ropewalk sync {result['run_id']} --store {tmp_path}` catches up" in said
    proxy.fault = "none"
    code, answer, _ = ended(ropewalk("sync", "--store", str(tmp_path), uri=proxy.url, timeout_seconds=60))
    client = open_client(proxy.url)
    runs = shown_runs(client, result["run_id"])
    assert (code, answer["mlflow_run_id"]) == (0, runs[result["run_id"]].info.run_id)
    assert shown_points(client, result["run_id"]) == recorded_points(tmp_path, result["run_id"])


@pytest.mark.parametrize("fault", ["refuse", "500"])
def test_sync_during_an_outage_is_one_sentence(fault: Fault, proxy: FaultyProxy, tmp_path: Path) -> None:
    small_record(tmp_path, "run")
    proxy.fault = fault
    for which, key in ((["run"], "error"), (["--all"], "runs")):
        code, answer, said = ended(ropewalk("sync", *which, "--store", str(tmp_path), uri=proxy.url))
        assert (code, list(answer)) == (1, [key])
        assert f"MLflow at {proxy.url} does not take run run: " in said
        assert said.count("\n") == 1 + (which == ["--all"])
    proxy.fault = "none"


def test_a_run_does_not_wait_for_a_database_that_others_lock(tmp_path: Path) -> None:
    root = store_with_database(tmp_path)
    with contextlib.closing(sqlite3.connect(root / "mlflow.db", isolation_level=None)) as database:
        database.execute("begin exclusive")
        code, result, said = run(root)
        assert (code, result["status"], result["mlflow_run_id"]) == (0, "succeeded", None)
        assert f"`ropewalk sync {result['run_id']}" in said
        database.execute("rollback")
    assert ended(ropewalk("sync", "--store", str(root)))[0] == 0
    assert shown_points(client_of(root), result["run_id"]) == recorded_points(root, result["run_id"])


def test_a_run_whose_tracking_process_cannot_be_started_goes_on_without(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "chosen" / "logs" / "tracking.log"
    folder.mkdir(parents=True)
    code, result, said = run(tmp_path, "", "--run-id", "chosen")
    assert (code, result["status"], result["mlflow_run_id"]) == (0, "succeeded", None)
    assert "its tracking process could not be started: [Errno 21] Is a directory" in said


def test_syncs_of_one_run_at_the_same_time_write_it_once(tmp_path: Path) -> None:
    root = store_with_database(tmp_path)
    record = small_record(root, "run")
    record.add("something_of_a_later_version", step="train")
    syncs = [ropewalk("sync", *which, "--store", str(root)) for which in (["run"], ["last"], ["--all"], ["run"])]
    results = [ended(process) for process in syncs]
    assert [code for code, _, _ in results] == [0] * 4
    client = client_of(root)
    parent = shown_runs(client, "run")["run"].info.run_id
    assert [answer["mlflow_run_id"] for _, answer, _ in (*results[:2], results[3])] == [parent] * 3
    assert shown_points(client, "run") == recorded_points(root, "run")


def test_all_runs_are_told_of_one_by_one_and_the_exit_status_says_whether_any_failed(tmp_path: Path) -> None:
    root = store_with_database(tmp_path)
    small_record(root, "run-1")
    broken = RecordBuilder(root, "run-2", "broken")
    broken.path.write_text("{oops\n")
    code, answer, said = ended(ropewalk("sync", "--all", "--store", str(root)))
    assert (code, [(row["run_id"], row["status"]) for row in answer["runs"]]) == (
        1,
        [("run-2", "failed"), ("run-1", "written")],
    )
    assert "MLflow did not take 1 of 2 runs" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing", "--store", "STORE"], "no run is called 'nothing'"),
        (["--store", "STORE/typo"], "there are no runs in STORE/typo"),
        (["--all", "--store", "STORE/typo"], "there are no runs in STORE/typo"),
        (["run", "--all", "--store", "STORE"], "sync takes a RUN or --all, not both"),
    ],
)
def test_what_cannot_be_synced_is_named(arguments: list[str], message: str, tmp_path: Path) -> None:
    small_record(tmp_path, "run")
    there = [argument.replace("STORE", str(tmp_path)) for argument in arguments]
    code, answer, said = ended(ropewalk("sync", *there))
    assert (code, said.count("\n")) == (1, 1)
    assert answer["error"].startswith(message.replace("STORE", str(tmp_path)))
    assert not (tmp_path / "typo").exists()
