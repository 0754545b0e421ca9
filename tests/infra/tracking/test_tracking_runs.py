"""Attempts, cancellations, older runs and several drivers at once, as MLflow shows them."""

from __future__ import annotations

import json
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import engine
import metric_stages
import psutil
import pytest
from object_store_server import new_bucket, object_store_server
from run_records import RecordBuilder, store_with_database
from shown_runs import recorded_points, shown_points, shown_runs

from ropewalk.infra.store import Store
from ropewalk.infra.tracking import sync as tracking
from ropewalk.infra.tracking.database import default_tracking_uri, locked, open_client
from ropewalk.infra.tracking.sync import Synced


@pytest.fixture(autouse=True)
def _no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return store_with_database(tmp_path / "store")


def client_of(root: Path) -> Any:
    return open_client(default_tracking_uri(root))


def dead_process() -> dict[str, Any]:
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    return {"pid": int(gone.stdout), "process_started": 1.0}


# Attempts


def test_a_curve_over_failed_attempts_has_every_step_once(root: Path) -> None:
    result = engine.run(metric_stages.pipeline(num_steps=30, fail_at=(3, 12, 13)), root)
    assert result.status == "succeeded"
    tracking.sync(Store(root), result.run_id)
    client = client_of(root)
    run = shown_runs(client, result.run_id)["train"]
    curve = [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, "loss")]
    assert curve == [(step, 1 / step) for step in range(1, 31)]
    assert shown_points(client, result.run_id) == recorded_points(root, result.run_id)
    assert (run.info.status, run.data.tags["ropewalk.attempts"]) == ("FINISHED", "4")
    failed = {name: value for name, value in run.data.tags.items() if name.startswith("ropewalk.failed_attempt.")}
    assert failed == {
        f"ropewalk.failed_attempt.{n}": "infrastructure: ConnectionResetError: the network is gone" for n in (1, 2, 3)
    }
    logs = [entry.path for entry in client.list_artifacts(run.info.run_id, "logs")]
    assert len(logs) == 3


def test_preemptions_waiting_and_lost_leases_are_shown(root: Path) -> None:
    record = RecordBuilder(root, "run", "attempts")
    record.start(train={})
    record.add("step_waiting", step="train", key="k", holder="run other", reason="locked by run other")
    for number in range(1, 4):
        record.begin("train", attempt=f"a{number}")
        record.add("running", step="train", attempt=f"a{number}", node=f"10.0.0.{number}", pid=1)
        counts = {"num_failed": number // 3, "num_preempted": min(number, 2)}
        failure = {"kind": ["preempted", "preempted", "timeout"][number - 1], "error": "node lost", **counts}
        record.add("timed_out", step="train", attempt="a3", reason="stalled") if number == 3 else None
        record.add("attempt_failed", step="train", attempt=f"a{number}", seconds=1.0, retry_in_seconds=2.0, **failure)
    record.begin("train", attempt="a4")
    record.add("lease_lost", step="train", attempt="a4")
    record.add("warning", step="train", attempt="a4", text="slow disk")
    tracking.sync(Store(root), "run")
    runs = shown_runs(client_of(root), "run")
    tags = {name.removeprefix("ropewalk."): value for name, value in runs["train"].data.tags.items()}
    shown = {name: tags[name] for name in ("attempts", "preemptions", "node", "timed_out", "lease_lost", "status")}
    assert shown == {
        "attempts": "4",
        "preemptions": "2",
        "node": "10.0.0.3",
        "timed_out": "stalled",
        "lease_lost": "a4",
        "status": "running",
    }
    assert [tags[f"failed_attempt.{n}"].split(":")[0] for n in (1, 2, 3)] == ["preempted", "preempted", "timeout"]
    assert runs["run"].data.tags["ropewalk.waited.train"] == "locked by run other"


def test_cancelled_steps_are_killed_and_failed_ones_failed(root: Path) -> None:
    record = RecordBuilder(root, "run", "cancelled")
    record.start(first={}, second={}, third={})
    for step, kind in (("first", "cancelled"), ("second", "user")):
        record.begin(step)
        counts = {"num_failed": 1, "num_preempted": 0}
        record.add("step_failed", step=step, attempt="a1", kind=kind, error="why it ended", seconds=1.0, **counts)
    # It failed before it began: the store did not answer.
    facts = {"key": None, "attempt": None, "seconds": 0.0, "num_failed": 0, "num_preempted": 0}
    record.add("step_failed", step="third", kind="infrastructure", error="the store does not answer", **facts)
    record.add("cancel_asked", level=1)
    record.finish("cancelled")
    tracking.sync(Store(root), "run")
    runs = shown_runs(client_of(root), "run")
    assert {name: run.info.status for name, run in runs.items()} == {
        "run": "KILLED",
        "first": "KILLED",
        "second": "FAILED",
    }
    assert runs["first"].data.tags["ropewalk.ended"] == "why it ended"
    assert runs["second"].data.tags["ropewalk.error"] == "why it ended"
    assert runs["run"].data.tags["ropewalk.failed.third"] == "the store does not answer"


def test_a_step_that_another_run_commits_meanwhile_is_a_reused_one(root: Path) -> None:
    first = RecordBuilder(root, "run-1", "twins")
    first.start(train={})
    first.begin("train")
    first.succeed("train", "rows")
    record = RecordBuilder(root, "run-2", "twins")
    record.start(train={})
    record.begin("train")
    record.reuse("train", first)
    record.finish()
    tracking.sync(Store(root), "run-2")
    run = shown_runs(client_of(root), "run-2")["train"]
    assert (run.info.status, run.data.tags["ropewalk.status"]) == ("FINISHED", "reused")
    assert (run.data.tags["ropewalk.cache"], run.data.tags["ropewalk.attempts"]) == ("hit", "1")


# Older runs


def test_all_runs_are_brought_to_mlflow_and_dead_ones_are_closed(root: Path) -> None:
    store = Store(root)
    drivers = {
        "r1-dead": dead_process(),
        "r2-elsewhere": {"host": "another"},
        "r3-here": {},
        "r4-ended": dead_process(),
    }
    for run_id, driver in drivers.items():
        record = RecordBuilder(root, run_id, "older", driver=driver)
        record.start(train={})
        record.begin("train")
        if run_id == "r4-ended":
            record.finish()
    assert {each.run_id: each.status for each in tracking.sync_all(store)} == dict.fromkeys(drivers, "written")
    client = client_of(root)
    states = {run_id: shown_runs(client, run_id)[run_id].info.status for run_id in drivers}
    assert states == {"r1-dead": "KILLED", "r2-elsewhere": "RUNNING", "r3-here": "RUNNING", "r4-ended": "FINISHED"}
    assert list(tracking.sync_all(store)) == []


def test_a_run_that_grew_is_brought_again_and_those_that_cannot_be_read_stop_no_other(root: Path) -> None:
    store = Store(root)
    good, bad, odd = (RecordBuilder(root, f"run-{number}", "older") for number in (1, 2, 3))
    for record in (good, bad, odd):
        record.start(train={})
        record.begin("train")
    assert {each.status for each in tracking.sync_all(store)} == {"written"}
    good.finish()
    with bad.path.open("a") as file:
        file.write("{oops\n")
    odd.add("step_succeeded", step="train", note="without its output")
    strange, failed, written = tracking.sync_all(store)
    assert (strange.run_id, strange.status) == ("run-3", "failed") and "'output'" in str(strange.error)
    assert (failed.run_id, failed.status) == ("run-2", "failed") and "no JSON" in str(failed.error)
    assert written == Synced("run-1", "written")


def test_a_run_that_another_process_is_at_is_told_of_and_left_to_it(root: Path) -> None:
    record = RecordBuilder(root, "run", "older")
    record.start(train={})
    with locked(record.folder / "mlflow.lock"):
        assert list(tracking.sync_all(Store(root))) == [Synced("run", "busy")]
        assert tracking.mlflow_run_id(Store(root), "run") is None


# The command


def ropewalk(*arguments: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "ropewalk.pipelines.cli", *arguments, "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def run_command(root: Path, *settings: str) -> list[str]:
    options = [option for setting in settings for option in ("--set", setting)]
    return ["run", metric_stages.__file__, "--store", str(root), "--executor", "local", *options]


def await_tracking_process(run_id: str) -> None:
    for process in psutil.process_iter(["cmdline"]):
        if run_id in (process.info["cmdline"] or []):
            process.wait(60)


def test_a_database_that_was_removed_is_filled_again(root: Path) -> None:
    store = Store(root)
    record = RecordBuilder(root, "run", "removed")
    record.start(train={})
    record.begin("train")
    record.metrics("train", {"loss": 1.0}, at=1)
    record.finish()
    tracking.sync(store, "run")
    (root / "mlflow.db").unlink()
    # In a process of its own: MLflow keeps the removed file open.
    assert [row["status"] for row in ropewalk("sync", "--all", "--store", str(root))["runs"]] == ["written"]
    shutil.move(root / "mlflow.db", root / "new.db")
    client = open_client(f"sqlite:///{root}/new.db")
    assert shown_points(client, "run") == recorded_points(root, "run")


def test_a_run_in_which_nothing_runs_starts_no_process_and_is_brought_to_mlflow_later(root: Path) -> None:
    first = ropewalk(*run_command(root))
    await_tracking_process(first["run_id"])
    reused = ropewalk(*run_command(root))
    assert isinstance(tracking.mlflow_run_id(Store(root), first["run_id"]), str)
    assert tracking.mlflow_run_id(Store(root), reused["run_id"]) is reused["mlflow_run_id"] is None
    assert not (root / "runs" / reused["run_id"] / "logs" / "tracking.log").exists()
    synced = ropewalk("sync", "--all", "--store", str(root))["runs"]
    assert [(row["run_id"], row["status"]) for row in synced] == [(reused["run_id"], "written")]
    again = ropewalk(*run_command(root))
    # The process of the next run that does something takes along what is left.
    await_tracking_process(ropewalk(*run_command(root, "train.num_steps=31"))["run_id"])
    runs = shown_runs(client_of(root), again["run_id"])
    assert {run.data.tags["ropewalk.status"] for name, run in runs.items() if name != again["run_id"]} == {"reused"}


def test_four_drivers_at_once_on_a_store_without_a_database(tmp_path: Path) -> None:
    root = tmp_path / "fresh"
    commands = [run_command(root, f"train.num_steps={30 + number // 2}") for number in range(4)]
    drivers = [
        subprocess.Popen([sys.executable, "-m", "ropewalk.pipelines.cli", *command, "--json"], stdout=subprocess.PIPE)
        for command in commands
    ]
    results = [json.loads(driver.communicate(timeout=180)[0].splitlines()[-1]) for driver in drivers]
    assert [result["status"] for result in results] == ["succeeded"] * 4
    for result in results:
        tracking.sync(Store(root), result["run_id"])
    client = client_of(root)
    for result in results:
        assert {run.info.status for run in shown_runs(client, result["run_id"]).values()} == {"FINISHED"}
        assert shown_points(client, result["run_id"]) == recorded_points(root, result["run_id"])
    with closing(sqlite3.connect(root / "mlflow.db")) as database:
        assert database.execute("pragma integrity_check").fetchall() == [("ok",)]
    experiment = client.get_experiment_by_name("curves")
    models = client.search_logged_models([experiment.experiment_id])
    assert len(models) == len({model.tags["ropewalk.digest"] for model in models}) == 2


def test_runs_of_an_object_store_are_shown_on_any_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with object_store_server():
        uri = f"{new_bucket()}/store"
        shown = []
        for machine in ("one", "other"):
            monkeypatch.setenv("ROPEWALK_SCRATCH", str(tmp_path / machine))
            root = Store(uri).root
            store_with_database(root)
            if machine == "one":
                result = ropewalk("run", metric_stages.__file__, "--store", uri, "--executor", "local")
                ropewalk("sync", result["run_id"], "--store", uri)
            else:
                rows = ropewalk("sync", "--all", "--store", uri)["runs"]
                assert [(row["run_id"], row["status"]) for row in rows] == [(result["run_id"], "written")]
            client = client_of(root)
            runs = shown_runs(client, result["run_id"])
            parent = runs[result["run_id"]].info
            (model,) = client.search_logged_models([parent.experiment_id])
            report = client.download_artifacts(parent.run_id, "evaluate/data/report.html", str(root))
            assert shown_points(client, result["run_id"]) == recorded_points(root, result["run_id"])
            shown.append((Path(report).read_text(), model.tags["ropewalk.digest"], {*runs}))
    assert shown[0] == shown[1]
